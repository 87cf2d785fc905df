"""Checkpoints with each other: what the merged base is made of. Every refusal that headers allow happens here."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack

from bake.errors import Mismatch, Unsupported, UsageError
from bake.identify.checkpoint import identify_checkpoint
from bake.identify.scaled import scaled_layers
from bake.io.adapter import content_key
from bake.io.checkpoint import Checkpoint, open_checkpoint
from bake.io.header import TensorInfo
from bake.keys.nearest import nearest_names
from bake.merges import METHODS, Method
from bake.plan.arranged import Arranged, Origin, arranged, columns, origin_of
from bake.plan.counterparts import Counterparts, Opened, check_alike, is_merged
from bake.plan.inputs import input_of
from bake.plan.listing import some
from bake.plan.model import Coverage, MergeStep, Merging, ModelUse, Share
from bake.plan.parameters import Parameters, permuted, setting_to_json
from bake.plan.recipe import MergeChoice
from bake.plan.record import history_of
from bake.plan.refuse import check_only, refuse_quantised
from bake.plan.selection import Setting
from bake.plan.stacking import stack_layers
from bake.plan.vocabulary import check_vocabularies

_LISTED = 4  # tensors spelled out in a message


def merge_models(
    choice: MergeChoice, replaced: Collection[str], shaped: Callable[[Arranged], Arranged], opened: ExitStack
) -> Arranged:
    """The base that is made by merging: decided from headers, a few samples of the data, and configuration files.

    replaced: components that are not merged, because others will take their place. shaped: what becomes of the first
    model before it is merged. opened: closes the models.
    Raises UsageError for methods, parameters and selections that cannot be meant;
    InputError for unreadable files; Mismatch and its kin for models that do not fit together; Unsupported for
    quantised ones.
    """
    method = _method(choice)
    roles = _roles(method, choice)
    models, parameters = _opened(choice, method, roles, opened)
    base = arranged(models[0].checkpoint)
    if choice.layers:
        base = stack_layers(base, models, choice.layers)
    base = shaped(base)
    first = Opened(models[0].name, base.checkpoint, base.identity, 0, models[0].content)
    check_only(choice.only, first.identity, "the first model")
    for other in models[1:]:
        check_alike(first, other)
        check_vocabularies(models[0], other)
    names = [full for full, _, _ in first.checkpoint.tensors()]
    # Layers of several models are one model by now.
    merged, their_roles = ([first], roles[:1]) if choice.layers else ([first, *models[1:]], roles)
    values = Parameters(method, their_roles, parameters, first.identity, names)
    steps = _Steps(choice, replaced, method, their_roles, merged, values)
    origins = steps.origins()
    steps.check()
    others = [part.file for model in models[1:] for part in model.checkpoint.files]
    count = len(models[0].checkpoint.files)
    return dataclasses.replace(
        base,
        inputs=(*base.inputs[:count], *(input_of(file, "model") for file in others), *base.inputs[count:]),
        files={**base.files, **dict(enumerate(others, count))},
        origins=origins,
        merging=Merging(
            method.name,
            tuple(_use(model, role) for model, role in zip(models, roles, strict=True)),
            {name: setting_to_json(setting) for name, setting in sorted(parameters.items())},
            choice.only,
            choice.allow_missing,
            tuple(map(str, choice.layers)),
        ),
        merged=steps.coverage(),
        notes=(*base.notes, *steps.notes()),
    )


def _method(choice: MergeChoice) -> Method:
    method = METHODS.get(choice.method)
    if method is None:
        close = nearest_names(choice.method, METHODS, 1)
        raise UsageError(
            f"there is no merge method {choice.method!r}{f', is it {close[0]}?' if close else ''} "
            f"'bake merge --list' shows all of them."
        )
    return method


def _roles(method: Method, choice: MergeChoice) -> tuple[str, ...]:
    """The role of each model, the base's first if there is one. Raises UsageError for too many or few models."""
    if choice.layers:
        if method.name != "passthrough":
            raise UsageError(f"--layers is for passthrough: {method.name} merges whole models")
        return (method.roles[0].name,) * len(choice.models)
    base = next((role for role in method.roles if role.name == "base"), None)
    if choice.base is not None and base is None:
        raise UsageError(f"{method.name} has no base: it takes {method.models}")
    if choice.base is None and base is not None and not base.optional:
        raise UsageError(f"{method.name} needs a base: the model that the others were trained from (--base MODEL)")
    try:
        return method.roles_of(len(choice.models) + (choice.base is not None), choice.base is not None)
    except ValueError:
        others = ", ".join(part for part in method.models.split(", ") if part not in ("base", "[base]"))
        beside = " beside the base" if base is not None else ""
        raise UsageError(f"{method.name} takes {others}{beside}, and {len(choice.models)} models are named") from None


def _opened(
    choice: MergeChoice, method: Method, roles: Sequence[str], opened: ExitStack
) -> tuple[list[Opened], dict[str, Setting]]:
    """The models, and the parameters in their order: as named, or where that means nothing an order by content.

    Then the first model is the first by content of those that are built like the one named first.
    """
    paths = [*([choice.base] if choice.base is not None else []), *choice.models]
    checkpoints = []
    for path in paths:
        checkpoint = open_checkpoint(path)
        opened.callback(checkpoint.close)
        refuse_quantised(path, checkpoint, scaled := scaled_layers(checkpoint))
        if scaled.layers:
            raise Unsupported(
                f"{path}: scaled fp8 weights cannot be merged: write them in 16 bits first, with "
                f"'bake fuse {path} --dtype bf16 -o 16bit.safetensors'.",
                path=str(path),
            )
        checkpoints.append(checkpoint)
    contents = [_content(checkpoint) if method.symmetric else "" for checkpoint in checkpoints]
    start = roles.index(method.roles[-1].name)
    order = list(range(len(paths)))
    if method.symmetric:
        alike = _structure(checkpoints[start])
        order[start:] = sorted(
            order[start:],
            key=lambda place: (
                start == 0 and _structure(checkpoints[place]) != alike,
                contents[place],
                _asked(choice.parameters, place - start),
            ),
        )
    models: list[Opened] = []
    inputs = 0
    names = Counter(path.name for path in paths)
    for place in order:
        checkpoint, path = checkpoints[place], paths[place]
        name = path.name if names[path.name] == 1 else str(path)
        models.append(Opened(name, checkpoint, identify_checkpoint(checkpoint), inputs, contents[place]))
        inputs += len(checkpoint.files)
    within = [place - start for place in order[start:]]
    return models, {name: permuted(setting, within) for name, setting in choice.parameters.items()}


def _structure(checkpoint: Checkpoint) -> list[tuple[str, str, tuple[int, ...]]]:
    """What makes the output of one model look like that of another."""
    return [(full, info.dtype, info.shape) for full, _, info in checkpoint.tensors()]


def _content(checkpoint: Checkpoint) -> str:
    """Orders models by what they hold: their tensors, then their metadata."""
    metadata = [part.file.metadata for part in checkpoint.files]
    return "".join(content_key(part.file) for part in checkpoint.files) + json.dumps(metadata, sort_keys=True)


def _asked(parameters: Mapping[str, Setting], place: int) -> str:
    """What is asked for one model alone, for those that are the same."""
    settings = [setting for _, setting in sorted(parameters.items()) if isinstance(setting, (list, tuple))]
    return json.dumps([setting_to_json(setting[place : place + 1]) for setting in settings])


def _use(model: Opened, role: str) -> ModelUse:
    files = model.checkpoint.files
    history = next(filter(None, (history_of(part.file.metadata) for part in files)), {})
    return ModelUse(
        path=model.checkpoint.root,
        role=role,
        inputs=(model.inputs, model.inputs + len(files)),
        packaging=model.checkpoint.packaging,
        layout=model.identity.layout,
        history=history,
    )


class _Steps:
    """Decides about every tensor of the first model, and keeps count of what does not fit."""

    def __init__(
        self,
        choice: MergeChoice,
        replaced: Collection[str],
        method: Method,
        roles: Sequence[str],
        models: Sequence[Opened],
        values: Parameters,
    ) -> None:
        self._choice, self._replaced, self._method, self._roles = choice, replaced, method, tuple(roles)
        self._models, self._values = models, values
        self._components = {name: component for component, (_, names) in models[0].owned.items() for name in names}
        self._counterparts = [Counterparts(models[0], other) for other in models[1:]]
        self._merged: Counter[str] = Counter()
        self._total: Counter[str] = Counter()
        self._missing: list[tuple[str, str]] = []  # (tensor, model)
        self._absent: dict[tuple[str, str], int] = {}  # (component, model) -> tensors
        self._differing: list[str] = []
        self._outside: list[str] = []
        self._narrow: list[str] = []

    def origins(self) -> dict[str, Origin]:
        """Full name -> where the values come from, of the tensors that are not simply the first model's."""
        found = {full: self._origin(full, info) for full, _, info in self._models[0].checkpoint.tensors()}
        return {full: origin for full, origin in found.items() if origin is not None}

    def _origin(self, full: str, info: TensorInfo) -> Origin | None:
        """Where the values of a tensor of the first model come from; None: it stays as it is."""
        component = self._components.get(full, "")
        shares = self._shares(full, info, component)
        if shares is None:
            return None
        values = self._values.of(full)
        alone = self._method.alone(values, len(self._models))
        self._total[component] += 1
        wanted = range(len(shares)) if alone is None else [alone]
        lacking = [self._models[place].name for place in wanted if shares[place] is None]
        if lacking:
            self._note_lack(full, component, lacking)
            return None
        self._merged[component] += 1
        if alone is not None:
            return origin_of(full, self._models[0].stored(full), info.shape, _certain(shares[alone]), alone)
        order = self._method.order([model.content for model in self._models], values, self._roles)
        ordered = self._method.ordered(values, order)
        return MergeStep(
            method=self._method.name,
            name=full,
            models=order,
            shares=tuple(_certain(shares[place]) for place in order),
            roles=tuple(self._roles[place] for place in order),
            values={key: value for key, value in ordered.items() if not isinstance(value, tuple)},
            per_model={key: value for key, value in ordered.items() if isinstance(value, tuple)},
        )

    def _shares(self, full: str, info: TensorInfo, component: str) -> list[Share | None] | None:
        """What each model has for a tensor; None if it is not to be merged, but kept as it is."""
        if not component:
            self._outside.append(full)
            return None
        if component in self._replaced or not self._choice.wants(component):
            return None
        if not is_merged(full, info):
            self._compare(full, component)
            return None
        shares: list[Share | None] = [self._models[0].stored(full)]
        for counterpart in self._counterparts:
            share = counterpart.share(full, component)
            shares.append(share)
            if share is not None and not share.transposed and columns(share) < columns(_certain(shares[0])):
                self._narrow.append(full)
        return shares

    def _note_lack(self, full: str, component: str, lacking: Iterable[str]) -> None:
        for counterpart, other in zip(self._counterparts, self._models[1:], strict=True):
            if other.name in lacking:
                if counterpart.component_for(component) is None:
                    key = component, other.name
                    self._absent[key] = self._absent.get(key, 0) + 1
                else:
                    self._missing.append((full, other.name))

    def _compare(self, full: str, component: str) -> None:
        """Note it if a tensor that is kept is not the same in all models."""
        first = self._models[0]
        path = full[len(first.owned[component][0].prefix) :]
        for counterpart, other in zip(self._counterparts, self._models[1:], strict=True):
            theirs = counterpart.component_for(component)
            name = None if theirs is None else theirs.prefix + path
            if name is not None and name in other.base.tensors and other.read(name) != first.read(full):
                self._differing.append(full)
                return

    def coverage(self) -> dict[str, Coverage]:
        """component -> how many of its tensors are merged, of those that can be."""
        order = [component.name for component in self._models[0].identity.components]
        return {name: Coverage(self._merged[name], self._total[name]) for name in order if self._total[name]}

    def check(self) -> None:
        """Raise Mismatch if tensors of one model have no counterpart in another, unless that is allowed."""
        if not self._merged and (self._choice.allow_missing or not self._missing):
            raise Mismatch(
                f"nothing of {self._models[0].name} is in the other models too, so there is nothing to merge. "
                + " ".join(f"{model.name} has {', '.join(model.owned)}." for model in self._models),
                components={model.name: list(model.owned) for model in self._models},
            )
        if self._choice.allow_missing:
            return
        wanted = list(self._merged)
        lacks = [f"{name} is not in {model}" for name, model in self._missing]
        for counterpart, other in zip(self._counterparts, self._models[1:], strict=True):
            lacks += [f"{name} is only in {other.name}" for name in counterpart.left_over(wanted)]
        if lacks:
            more = f" and {len(lacks) - _LISTED} more" if len(lacks) > _LISTED else ""
            raise Mismatch(
                f"{len(lacks)} tensors have no counterpart: {'; '.join(lacks[:_LISTED])}{more}. If that is as it "
                f"should be, --allow-missing keeps {self._models[0].name}'s and leaves out what only others have.",
                tensors=lacks,
            )

    def notes(self) -> Iterable[str]:
        """What was not merged, and why."""
        first = self._models[0].name
        for (component, model), count in sorted(self._absent.items()):
            yield f"{model} has no {component}: {count} tensors stay as they are in {first}"
        if self._choice.allow_missing:
            yield from (f"{name} is not in {model}: {first}'s is kept" for name, model in self._missing)
            for counterpart, other in zip(self._counterparts, self._models[1:], strict=True):
                yield from (f"{name} is only in {other.name}: left out" for name in counterpart.left_over(self._merged))
        for full in dict.fromkeys(self._narrow):
            yield f"{full} has further channels in {first}: they are kept"
        if self._differing:
            yield (
                f"constants, integers and single numbers are copied from {first}; the models differ in "
                f"{some(self._differing)}"
            )
        if self._outside:
            yield f"part of no model, and copied from {first}: {some(self._outside)}"
        left_out = self._models[0].checkpoint.left_out
        if left_out:
            yield f"not copied from the folder of {first}: {', '.join(left_out)}"


def _certain(share: Share | None) -> Share:
    assert share is not None
    return share
