"""Two checkpoints -> which differences become LoRA modules, under which names. From headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bake.dtypes import DTYPES
from bake.errors import FamilyMismatch, Mismatch, ShapeMismatch, Unsupported, UsageError
from bake.identify.checkpoint import BaseIdentity, identify_checkpoint
from bake.identify.families import title
from bake.identify.quantised import ORIGINAL, quantisation_of
from bake.io.checkpoint import Checkpoint, open_checkpoint
from bake.io.header import TensorInfo
from bake.keys import hf
from bake.keys.factors import as_matrix, updates_nothing
from bake.keys.modules import ModuleIndex
from bake.keys.places import Place
from bake.keys.spoken import NAMES, Names, is_layer, prefix_of, spelled, spoken_modules, usual_names
from bake.plan.adapter import Ranks
from bake.plan.inputs import input_of
from bake.plan.model import Input, Stored
from bake.plan.recipe import is_text_encoder

_VAE = "vae"
_LISTED = 6


@dataclass(frozen=True)
class ExtractionRequest:
    """What was asked for, before anything is opened."""

    tuned: Path
    base: Path
    names: str | None = None  # one of bake.keys.spoken.NAMES; None: the usual one of the family
    ranks: Ranks = field(default_factory=Ranks)
    only: tuple[str, ...] = ()  # components; "te" is every text encoder
    rest: bool = False  # store what is no product of thin matrices as full differences
    dora: bool = False
    allow_unmatched: bool = False


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows of one stored tensor of a model."""

    stored: Stored
    rows: tuple[int, int]  # of the tensor, in the orientation of the module
    transposed: bool = False  # the tensor is stored (in, out)

    @property
    def columns(self) -> int:
        """Of the matrix that the rows are of."""
        return as_matrix(self.stored.shape[::-1] if self.transposed else self.stored.shape)[1]

    @property
    def nbytes(self) -> int:
        """What is read for the rows."""
        return (self.rows[1] - self.rows[0]) * self.columns * DTYPES[self.stored.dtype].bits // 8


@dataclass(frozen=True, slots=True)
class DifferencePlan:
    """One parameter of one module in both models."""

    module: str  # as the adapter calls it, without suffix
    path: str  # the same without prefix, dotted
    component: str
    parameter: str  # "weight" or "bias"
    shape: tuple[int, ...]  # as the adapter's dialect has it: (out, in, kernel...)
    tuned: tuple[Stretch, ...]
    base: tuple[Stretch, ...]
    low_rank: bool  # it becomes a LoRA; else it is part of the rest

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the difference as a matrix."""
        return as_matrix(self.shape)

    @property
    def nbytes(self) -> int:
        """What is read of both models to know it."""
        return sum(each.nbytes for each in (*self.tuned, *self.base))


@dataclass(frozen=True)
class ExtractionPlan:
    """What is read and compared, and what becomes of it."""

    request: ExtractionRequest
    family: str
    variant: str | None
    names: Names
    inputs: tuple[Input, ...]
    differences: tuple[DifferencePlan, ...]
    stored_in_out: bool  # the base's Linear weights are stored (in, out), as GPT-2's
    prefixes: Mapping[str, str]  # component -> what its modules' names begin with
    notes: tuple[str, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of both models that are read at least once."""
        return sum(difference.nbytes for difference in self.differences)


@dataclass(frozen=True)
class _Model:
    """One of the two, with the names that the dialect has for its parameters."""

    identity: BaseIdentity
    tensors: Mapping[str, tuple[int, str, TensorInfo]]  # full name -> number of its file, its name there, what it is
    parameters: Mapping[tuple[str, str], _Parameter]  # (module, parameter)
    prefixes: Mapping[str, str]
    stored_in_out: bool


@dataclass(frozen=True, slots=True)
class _Parameter:
    path: str
    component: str
    places: tuple[Place, ...]
    shape: tuple[int, ...]


def plan_extraction(request: ExtractionRequest) -> ExtractionPlan:
    """What the extraction will compare and write.

    Raises InputError for unreadable files, FamilyMismatch and ShapeMismatch for models that do not fit together,
    Mismatch for modules that only one of them has, Unsupported for quantised ones, UsageError for requests that
    cannot be meant.
    """
    with ExitStack() as opened:
        checkpoints = []
        for path in (request.tuned, request.base):
            checkpoint = open_checkpoint(path)
            opened.callback(checkpoint.close)
            found = quantisation_of((name for name, _, _ in checkpoint.tensors()), checkpoint.configs.get(""))
            if found is not None:
                remedy = found.remedy if found.remedy != ORIGINAL else "Extract from the 16-bit originals."
                raise Unsupported(f"{path}: a {found.kind} checkpoint ({found.evidence!r} tells). {remedy}")
            checkpoints.append(checkpoint)
        identities = [identify_checkpoint(checkpoint) for checkpoint in checkpoints]
        _check_families(request, *identities)
        names = _chosen_names(request, identities[1])
        tuned, base = (_named(*each, names) for each in zip(checkpoints, identities, strict=True))
        notes: list[str] = []
        differences = tuple(_pair(request, tuned, base, names, len(checkpoints[0].files), notes))
        notes += _outside(checkpoints[1], base)
        _check_expressible(request, names, differences)
        return ExtractionPlan(
            request=request,
            family=base.identity.family,
            variant=base.identity.variant,
            names=names,
            inputs=tuple(input_of(part.file, "base") for checkpoint in checkpoints for part in checkpoint.files),
            differences=differences,
            stored_in_out=base.stored_in_out,
            prefixes=base.prefixes,
            notes=tuple(notes),
        )


def _check_families(request: ExtractionRequest, tuned: BaseIdentity, base: BaseIdentity) -> None:
    if tuned.family != base.family:
        raise FamilyMismatch(
            f"{request.tuned} is {title(tuned.family)}, {request.base} is {title(base.family)}: "
            f"a difference needs two models of one family",
            tuned_family=tuned.family,
            base_family=base.family,
        )


def _chosen_names(request: ExtractionRequest, identity: BaseIdentity) -> Names:
    usual = usual_names(identity.family, identity.language_model)
    names = next((each for each in NAMES if each == (request.names or usual)), None)
    if names is None:
        raise UsageError(f"--names {request.names}: unknown; it is {', '.join(NAMES)}")
    if identity.language_model and names != "peft":
        raise UsageError(f"--names {names}: adapters of language models have PEFT's names; leave it out")
    return names


def _named(checkpoint: Checkpoint, identity: BaseIdentity, names: Names) -> _Model:
    """Every parameter of the model under the name that the dialect has for its module."""
    shapes = {name: info.shape for name, _, info in checkpoint.tensors()}
    index = ModuleIndex(identity.components, shapes)
    parameters: dict[tuple[str, str], _Parameter] = {}
    prefixes: dict[str, str] = {}
    in_out: set[str] = set()
    for component in identity.components:
        own = index.own[component.name]
        is_model = component.name != _VAE
        found = spoken_modules(component, identity.family, own, shapes, names) if is_model else own
        prefix = prefix_of(component, identity.family, names) if is_model else component.prefix
        prefixes[component.name] = prefix
        if hf.stores_in_out(own, shapes):
            in_out.add(component.name)
        for path, places_of in found.items():
            flipped = component.name in in_out and path.endswith(hf.CONV1D_LEAVES)
            for parameter, places in places_of.items():
                if flipped and parameter == "weight":
                    places = tuple(place._replace(transposed=not place.transposed) for place in places)
                shape = _shape_of(places, shapes)
                name = spelled(prefix, path, names) if is_model else prefix + path
                parameters[name, parameter] = _Parameter(path, component.name, places, shape)
    numbers = {part.relative: number for number, part in enumerate(checkpoint.files)}
    tensors = {
        name: (numbers[part.relative], name[len(part.group) :], info) for name, part, info in checkpoint.tensors()
    }
    return _Model(identity, tensors, parameters, prefixes, bool(in_out))


def _shape_of(places: Sequence[Place], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a parameter that lies in `places` one after the other."""
    first = shapes[places[0].tensor]
    if places[0].transposed:
        first = first[::-1]
    if len(places) == 1 and places[0].rows is None:
        return first
    heights = (place.rows[1] - place.rows[0] if place.rows else shapes[place.tensor][0] for place in places)
    return (sum(heights), *first[1:])


def _pair(
    request: ExtractionRequest, tuned: _Model, base: _Model, names: Names, offset: int, notes: list[str]
) -> Iterator[DifferencePlan]:
    """The parameters that both models have, in the base's order; offset: of the base's files among the inputs."""
    shared = {part.name for part in tuned.identity.components} & {part.name for part in base.identity.components}
    shared |= {each.component for key, each in base.parameters.items() if key in tuned.parameters}
    wanted = {component for component in shared if _wants(request, component)}
    for name in request.only:
        if not any(_is_called(component, name) for component in shared):
            raise UsageError(f"--only {name}: the two models have no such component in common")
    for model, path in ((tuned, request.tuned), (base, request.base)):
        alone = [part.name for part in model.identity.components if part.name not in shared]
        if alone:
            notes.append(f"only {path.name} has {', '.join(alone)}: not compared")
    _check_same(request, tuned, base, wanted, notes)
    in_dialect = [part.name for part in base.identity.components if part.name in wanted and part.name != _VAE]
    if names == "peft" and len(in_dialect) > 1:
        raise UsageError(
            f"a PEFT adapter is for one model, and these have {', '.join(in_dialect)}: choose one with --only"
        )
    for key, there in base.parameters.items():
        here = tuned.parameters.get(key)
        if here is None or there.component not in wanted or not _is_compared(base, there):
            continue
        if as_matrix(here.shape) != as_matrix(there.shape):
            raise ShapeMismatch(
                f"{key[0]}: {list(here.shape)} in {request.tuned}, {list(there.shape)} in {request.base}", module=key[0]
            )
        yield DifferencePlan(
            module=key[0],
            path=there.path,
            component=there.component,
            parameter=key[1],
            shape=there.shape,
            tuned=tuple(_stretches(tuned, here.places, 0)),
            base=tuple(_stretches(base, there.places, offset)),
            low_rank=key[1] == "weight" and _is_low_rank(base, key[0], there),
        )


def _wants(request: ExtractionRequest, component: str) -> bool:
    return not request.only or any(_is_called(component, name) for name in request.only)


def _is_called(component: str, name: str) -> bool:
    return component == name or (name == "te" and is_text_encoder(component))


def _is_compared(model: _Model, parameter: _Parameter) -> bool:
    """True for floats that bake can compute with; positions and other integers are no weights."""
    tensor = parameter.places[0].tensor
    _, _, info = model.tensors[tensor]
    return DTYPES[info.dtype].computable and math.prod(info.shape) > 0 and not updates_nothing(tensor)


def _is_low_rank(model: _Model, module: str, parameter: _Parameter) -> bool:
    """True if a LoRA can stand for it: a whole Linear layer or convolution of a model that adapters are for."""
    is_bare = not any(place.tensor.endswith("weight") for place in parameter.places)
    named = parameter.component != _VAE and not any(place.stacked for place in parameter.places)
    return named and is_layer(parameter.path, parameter.shape) and (not is_bare or parameter.places[0].transposed)


def _check_same(request: ExtractionRequest, tuned: _Model, base: _Model, wanted: set[str], notes: list[str]) -> None:
    """Raise Mismatch if, in components that both have, one has layers that the other lacks."""
    for mine, theirs, path in ((tuned, base, request.tuned), (base, tuned, request.base)):
        alone = [
            key
            for key, each in mine.parameters.items()
            if key not in theirs.parameters and each.component in wanted and _is_compared(mine, each)
        ]
        vae = [key for key in alone if mine.parameters[key].component == _VAE]
        rest = [key for key in alone if key not in vae]
        if vae:
            notes.append(f"{len(vae)} tensors of the vae are called differently in the two models: not compared")
        if not rest:
            continue
        listed = ", ".join(".".join(key) for key in rest[:_LISTED])
        if not request.allow_unmatched:
            raise Mismatch(
                f"only {path} has {len(rest)} of the parameters that are compared ({listed}"
                f"{', ...' if len(rest) > _LISTED else ''}). Use --allow-unmatched to leave them out.",
                parameters=[".".join(key) for key in rest],
            )
        notes.append(f"only {path.name} has {len(rest)} parameters, e.g. {listed}: left out")


def _outside(checkpoint: Checkpoint, base: _Model) -> Iterator[str]:
    """What is said of tensors that are part of no model: averaged copies, noise schedules."""
    inside = {place.tensor for each in base.parameters.values() for place in each.places}
    outside = [name for name, _, _ in checkpoint.tensors() if name not in inside]
    if outside:
        yield f"{len(outside)} tensors belong to no model (e.g. {outside[0]}): not compared"


def _check_expressible(request: ExtractionRequest, names: Names, differences: Sequence[DifferencePlan]) -> None:
    if not any(each.low_rank for each in differences):
        raise Mismatch(f"{request.tuned} and {request.base} have no layer in common that a LoRA could be for")
    if request.rest and names == "diffusers":
        raise UsageError(
            "--full-rest: diffusers has no names for stored differences; use --names kohya, or leave it out"
        )


def _stretches(model: _Model, places: Sequence[Place], offset: int) -> Iterator[Stretch]:
    """The stored rows behind `places`; offset: of the model's files among the inputs."""
    for place in places:
        number, name, info = model.tensors[place.tensor]
        height = as_matrix(info.shape[::-1] if place.transposed else info.shape)[0]
        stored = Stored(offset + number, name, info.dtype, info.shape, (info.begin, info.end))
        yield Stretch(stored, place.rows or (0, height), place.transposed)
