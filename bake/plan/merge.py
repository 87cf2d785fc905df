"""MergeRecipe -> Plan: checkpoints with each other. Every refusal that headers allow happens here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bake.errors import FamilyMismatch, Mismatch, Unsupported, UsageError
from bake.garbage import without_collecting
from bake.identify.checkpoint import BaseIdentity, identify_checkpoint
from bake.identify.families import FAMILIES, title
from bake.identify.scaled import ScaledBase, scaled_layers
from bake.io.adapter import content_key
from bake.io.checkpoint import Checkpoint, CheckpointFile, open_checkpoint
from bake.io.header import TensorInfo, lay_out
from bake.keys.nearest import nearest_names
from bake.merges import METHODS, Method
from bake.plan.build import input_of
from bake.plan.casts import Casting, check_casts
from bake.plan.counterparts import Counterparts, Opened, is_merged
from bake.plan.files import plan_side_files
from bake.plan.match import Matching
from bake.plan.model import Coverage, FilePlan, MergeStep, Merging, ModelUse, Plan, Share, TensorPlan
from bake.plan.parameters import Parameters, permuted, setting_to_json
from bake.plan.recipe import ROUNDINGS, Recipe, is_text_encoder
from bake.plan.record import carried_metadata, history_of
from bake.plan.refuse import refuse_quantised
from bake.plan.selection import Setting
from bake.plan.tokens import Growth
from bake.plan.vocabulary import check_vocabularies

_ALONE = "passthrough"  # what a tensor of one model goes through if its bytes cannot simply be copied
_LISTED = 4  # tensors spelled out in a message


@dataclass(frozen=True)
class MergeRecipe:
    """One merge: a method, models, and how to write the result."""

    method: str  # a row of bake.merges.METHODS
    models: tuple[Path, ...]  # in the order of the method's roles
    base: Path | None = None  # for the role of that name
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | Mapping[str, str] = "keep"  # as in Recipe
    only: tuple[str, ...] = ()  # merge these components alone; "te" is every text encoder
    allow_missing: bool = False  # what one model lacks stays the first one's; what only others have is left out
    metadata: Mapping[str, str] = field(default_factory=dict)  # added to the output's
    record: bool = True  # write names, parameters and digests of the inputs into the output
    rounding: str = "nearest"  # or "stochastic"
    seed: int = 0  # of methods by chance, and of stochastic rounding

    def output(self, first: Path) -> Recipe:
        """How the output is written, as a bake of its first model."""
        return Recipe(
            base=first,
            adapters=(),
            dtype=self.dtype,
            only=self.only,
            metadata=self.metadata,
            record=self.record,
            rounding=self.rounding,
            seed=self.seed,
        )


def build_merge_plan(recipe: MergeRecipe) -> Plan:
    """The plan for `recipe`, from headers, a few samples of the data, and configuration files alone.

    Raises UsageError for methods, parameters and selections that cannot be meant; InputError for unreadable files;
    Mismatch and its kin for models that do not fit together; Unsupported for quantised ones.
    """
    with ExitStack() as opened, without_collecting():
        method = _method(recipe)
        roles = _roles(method, recipe)
        models, parameters = _opened(recipe, method, roles, opened)
        first = models[0]
        output = recipe.output(first.checkpoint.root)
        _check_output(recipe, output, first.identity)
        for other in models[1:]:
            _check_family(first, other)
            check_vocabularies(first, other)
        names = [full for full, _, _ in first.checkpoint.tensors()]
        values = Parameters(method, roles, parameters, first.identity, names)
        casting = Casting(output, first.identity.components, ScaledBase(), Matching(), Growth())
        steps = _Steps(recipe, method, roles, models, values, casting)
        files = steps.files()
        steps.check()
        return Plan(
            family=first.identity.family,
            layout=first.identity.layout,
            variant=first.identity.variant,
            packaging=first.checkpoint.packaging,
            base=first.checkpoint.root,
            inputs=tuple(
                input_of(part.file, "base" if model is first else "model")
                for model in models
                for part in model.checkpoint.files
            ),
            files=files,
            side_files=plan_side_files(output, first.checkpoint, first.identity, Growth(), Matching(), files),
            adapters=(),
            components=steps.coverage(),
            unmatched=(),
            skipped=(),
            notes=tuple(steps.notes()),
            settings={
                "dtype": output.plain_dtype,
                "only": list(recipe.only),
                "allow_missing": recipe.allow_missing,
                "rounding": recipe.rounding,
                "seed": recipe.seed,
            },
            record=recipe.record,
            rounding=recipe.rounding,
            seed=recipe.seed,
            merge=Merging(
                method.name,
                tuple(_use(model, role, recipe.record) for model, role in zip(models, roles, strict=True)),
                {name: setting_to_json(setting) for name, setting in sorted(parameters.items())},
            ),
        )


def _method(recipe: MergeRecipe) -> Method:
    method = METHODS.get(recipe.method)
    if method is None:
        close = nearest_names(recipe.method, METHODS, 1)
        raise UsageError(
            f"there is no merge method {recipe.method!r}{f', is it {close[0]}?' if close else ''} "
            f"'bake merge --list' shows all of them."
        )
    return method


def _roles(method: Method, recipe: MergeRecipe) -> tuple[str, ...]:
    """The role of each model, the base's first if there is one. Raises UsageError for too many or few models."""
    base = next((role for role in method.roles if role.name == "base"), None)
    if recipe.base is not None and base is None:
        raise UsageError(f"{method.name} has no base: it takes {method.models}")
    if recipe.base is None and base is not None and not base.optional:
        raise UsageError(f"{method.name} needs a base: the model that the others were trained from (--base MODEL)")
    try:
        return method.roles_of(len(recipe.models) + (recipe.base is not None), recipe.base is not None)
    except ValueError:
        others = ", ".join(part for part in method.models.split(", ") if part not in ("base", "[base]"))
        beside = " beside the base" if base is not None else ""
        raise UsageError(f"{method.name} takes {others}{beside}, and {len(recipe.models)} models are named") from None


def _opened(
    recipe: MergeRecipe, method: Method, roles: Sequence[str], opened: ExitStack
) -> tuple[list[Opened], dict[str, Setting]]:
    """The models, and the parameters in their order: as named, or where that means nothing an order by content.

    Then the first model is the first by content of those that are built like the one named first.
    """
    paths = [*([recipe.base] if recipe.base is not None else []), *recipe.models]
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
                _asked(recipe.parameters, place - start),
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
    return models, {name: permuted(setting, within) for name, setting in recipe.parameters.items()}


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


def _check_output(recipe: MergeRecipe, output: Recipe, identity: BaseIdentity) -> None:
    """Raise UsageError for components, dtypes and roundings that there are none of."""
    present = [component.name for component in identity.components]
    for name in recipe.only:
        if name not in present and not (name == "te" and any(map(is_text_encoder, present))):
            raise UsageError(f"--only {name}: the first model has no such component; it has {', '.join(present)}")
    check_casts(output, identity.components)
    if recipe.rounding not in ROUNDINGS or recipe.rounding == "fast":
        raise UsageError(f"--rounding {recipe.rounding}: merges have nearest and stochastic")
    for dtype in output.dtypes.values():
        if dtype.endswith(("_scaled", "_old")):
            raise UsageError(
                f"--dtype {dtype}: merge to 16 bits first (--dtype bf16 or fp16); "
                f"'bake fuse MERGED --dtype {dtype}' then scales the result"
            )


def _check_family(first: Opened, other: Opened) -> None:
    """Raise FamilyMismatch if both models are known and of different families."""
    one, two = first.identity, other.identity
    is_known = all(each.family in FAMILIES or each.language_model for each in (one, two))
    if is_known and one.family != two.family and "language-model" not in (one.family, two.family):
        raise FamilyMismatch(
            f"{first.name} is {title(one.family)}, {other.name} is {title(two.family)}: only models of one family can "
            f"be merged.",
            families=[one.family, two.family],
        )


def _use(model: Opened, role: str, record: bool) -> ModelUse:
    files = model.checkpoint.files
    history = next(filter(None, (history_of(part.file.metadata) for part in files)), {}) if record else {}
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
        recipe: MergeRecipe,
        method: Method,
        roles: Sequence[str],
        models: Sequence[Opened],
        values: Parameters,
        casting: Casting,
    ) -> None:
        self._recipe, self._method, self._roles = recipe, method, tuple(roles)
        self._models, self._values, self._casting = models, values, casting
        self._counterparts = [Counterparts(models[0], other) for other in models[1:]]
        self._merged: Counter[str] = Counter()
        self._total: Counter[str] = Counter()
        self._missing: list[tuple[str, str]] = []  # (tensor, model)
        self._absent: dict[tuple[str, str], int] = {}  # (component, model) -> tensors
        self._differing: list[str] = []
        self._outside: list[str] = []
        self._narrow: list[str] = []

    def files(self) -> tuple[FilePlan, ...]:
        """One output file for each file of the first model, with the same tensors."""
        first = self._models[0]
        planned = [self._tensors(part) for part in first.checkpoint.files]
        recorded = next((place for place, tensors in enumerate(planned) if any(each.merge for each in tensors)), 0)
        return tuple(
            FilePlan(
                relative="" if first.checkpoint.packaging == "file" else part.relative,
                metadata=carried_metadata(part.file.metadata, first.identity, self._recipe.metadata),
                is_recorded=place == recorded,
                history={},
                tensors=tensors,
            )
            for place, (part, tensors) in enumerate(zip(first.checkpoint.files, planned, strict=True))
        )

    def _tensors(self, part: CheckpointFile) -> tuple[TensorPlan, ...]:
        stored = part.file.tensors
        placed = lay_out(
            (name, self._casting.dtype(part.group + name, info), info.shape) for name, info in stored.items()
        )
        return tuple(self._tensor(part.group + name, stored[name], name, info) for name, info in placed.items())

    def _tensor(self, full: str, info: TensorInfo, name: str, placed: TensorInfo) -> TensorPlan:
        """How one tensor of the output is made."""
        component = self._casting.component_of(full)
        own = self._models[0].stored(full)
        kept = TensorPlan(name, info.shape, placed.dtype, (placed.begin, placed.end), own, component)
        shares = self._shares(full, info, component)
        if shares is None:
            return self._alone(kept, full, Share((own,)), 0)
        values = self._values.of(full)
        alone = self._method.alone(values, len(self._models))
        self._total[component] += 1
        wanted = range(len(shares)) if alone is None else [alone]
        lacking = [self._models[place].name for place in wanted if shares[place] is None]
        if lacking:
            self._note_lack(full, component, lacking)
            return self._alone(kept, full, Share((own,)), 0)
        self._merged[component] += 1
        if alone is not None:
            return self._alone(kept, full, _certain(shares[alone]), alone)
        order = self._method.order([model.content for model in self._models], values, self._roles)
        ordered = self._method.ordered(values, order)
        step = MergeStep(
            method=self._method.name,
            name=full,
            models=order,
            shares=tuple(_certain(shares[place]) for place in order),
            roles=tuple(self._roles[place] for place in order),
            values={key: value for key, value in ordered.items() if not isinstance(value, tuple)},
            per_model={key: value for key, value in ordered.items() if isinstance(value, tuple)},
        )
        return dataclasses.replace(kept, merge=step)

    def _shares(self, full: str, info: TensorInfo, component: str) -> list[Share | None] | None:
        """What each model has for a tensor; None if it is not to be merged, but kept as it is."""
        if not component:
            self._outside.append(full)
            return None
        if not self._casting.recipe.wants(component):
            return None
        if not is_merged(full, info):
            self._compare(full, component)
            return None
        shares: list[Share | None] = [Share((self._models[0].stored(full),))]
        for counterpart in self._counterparts:
            share = counterpart.share(full, component)
            shares.append(share)
            if share is not None and not share.transposed and _columns(share) < _columns(_certain(shares[0])):
                self._narrow.append(full)
        return shares

    def _alone(self, kept: TensorPlan, full: str, share: Share, place: int) -> TensorPlan:
        """A tensor that is one model's: its bytes where they are as they are to be, else rounded once."""
        (stored, *more) = share.stored
        fits = not more and not share.transposed and stored.span[1] - stored.span[0] == kept.span[1] - kept.span[0]
        if fits and stored.dtype == kept.dtype:
            return dataclasses.replace(kept, source=dataclasses.replace(stored, shape=kept.shape))
        step = MergeStep(_ALONE, full, (place,), (share,), ("a",), {"scale": 1.0}, {})
        if _columns(share) < _columns(Share((kept.source,))):  # the rest of each row is the first model's
            step = dataclasses.replace(
                step,
                method="weighted_sum",
                models=(0, place),
                shares=(Share((kept.source,)), share),
                roles=("a", "b"),
                values={"alpha": 1.0},
            )
        return dataclasses.replace(kept, merge=step)

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
        if not self._merged and (self._recipe.allow_missing or not self._missing):
            raise Mismatch(
                f"nothing of {self._models[0].name} is in the other models too, so there is nothing to merge. "
                + " ".join(f"{model.name} has {', '.join(model.owned)}." for model in self._models),
                components={model.name: list(model.owned) for model in self._models},
            )
        if self._recipe.allow_missing:
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
        if self._recipe.allow_missing:
            yield from (f"{name} is not in {model}: {first}'s is kept" for name, model in self._missing)
            for counterpart, other in zip(self._counterparts, self._models[1:], strict=True):
                yield from (f"{name} is only in {other.name}: left out" for name in counterpart.left_over(self._merged))
        for full in dict.fromkeys(self._narrow):
            yield f"{full} has further channels in {first}: they are kept"
        if self._differing:
            yield (
                f"constants, integers and single numbers are copied from {first}; the models differ in "
                f"{_some(self._differing)}"
            )
        if self._outside:
            yield f"part of no model, and copied from {first}: {_some(self._outside)}"
        left_out = self._models[0].checkpoint.left_out
        if left_out:
            yield f"not copied from the folder of {first}: {', '.join(left_out)}"


def _certain(share: Share | None) -> Share:
    assert share is not None
    return share


def _columns(share: Share) -> int:
    """Elements in a row of what is stored."""
    return math.prod(share.stored[0].shape[1:])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown
