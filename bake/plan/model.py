"""The plan: frozen data that says what every byte of the output is. It serialises to JSON and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from bake.keys.factors import Decomposition, as_matrix
from bake.plan.selection import Selection

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Input:
    """A file that is read; what is known of it tells whether it is still the one that was planned with."""

    path: Path
    size: int  # bytes
    modified: int  # nanoseconds
    changed: int  # nanoseconds, of what the system knows of the file
    inode: int
    role: Literal["base", "adapter", "config", "model", "component", "like"]

    @property
    def has_tensors(self) -> bool:
        """False for configuration files, which are read while planning alone."""
        return self.role not in ("config", "like")


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it lies in an input."""

    input: int  # place in Plan.inputs
    name: str
    dtype: str  # safetensors tag
    shape: tuple[int, ...]
    span: tuple[int, int]  # [begin, end) in that file's data section, bytes

    @property
    def as_rows(self) -> tuple[int, int]:
        """(rows, columns) of a list of vectors; a single vector is one row."""
        return (1, self.shape[0]) if len(self.shape) == 1 else (self.shape[0], self.shape[1])


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter module's contribution to one tensor."""

    algorithm: str  # a row of bake.keys.factors.ALGORITHMS
    factors: dict[str, Stored]
    scale: float  # alpha / rank; unitless
    weight: float  # what the user typed, for this component and tensor
    rows: tuple[int, int]  # [first, past the last) row of the tensor seen as a matrix
    columns: tuple[int, int]
    part: tuple[int, int]  # the rows of the update, oriented as the tensor is, that go there
    height: int  # all rows that the update has, likewise
    transposed: bool  # the factors give (columns, rows)
    adapter: int  # place in Plan.adapters
    module: str
    dora: Decomposition | None = None  # what the factor "magnitude" means, where there is one
    settings: dict[str, float | None] = field(default_factory=dict)  # further constants of the algorithm
    rank_limit: int | None = None  # of LoRA factors, only this many ranks count
    turn: int = 0  # the update starts at this row of the tensor and, past the last, goes on at the first


@dataclass(frozen=True, slots=True)
class Share:
    """What one model has for a tensor that is merged."""

    stored: tuple[Stored, ...]  # one after the other they hold its rows; narrower ones go on with the first model's
    transposed: bool = False  # the one stored tensor has its rows as columns


@dataclass(frozen=True, slots=True)
class MergeStep:
    """How a tensor is made of those of several models, or of one that stores it otherwise."""

    method: str  # a row of bake.merges.METHODS
    name: str  # what random draws go by: the full tensor name
    models: tuple[int, ...]  # places in Merging.models, in the order in which they are merged; 0 is the first
    shares: tuple[Share, ...]  # one for each of them
    roles: tuple[str, ...]  # likewise
    values: dict[str, Any]  # parameter -> number, switch or word
    per_model: dict[str, tuple[float, ...]]  # parameter -> a number for each model of the last role

    @property
    def parameters(self) -> dict[str, Any]:
        """All values, as the maths wants them."""
        return {**self.values, **self.per_model}


@dataclass(frozen=True, slots=True)
class Rescaling:
    """A new scale, so that the largest value becomes the largest of the dtype."""

    name: str  # of the tensor in the same file that receives it, float32
    by_row: bool  # one for each row, else one for all


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Everything needed to write one output tensor."""

    name: str  # as in the file
    shape: tuple[int, ...]
    dtype: str  # safetensors tag
    span: tuple[int, int]  # [begin, end) in the output's data section, bytes
    source: Stored
    component: str  # "" for tensors that belong to none
    terms: tuple[Term, ...] = ()  # in the order they are applied
    appended: tuple[Stored, ...] = ()  # vectors (n, columns) that follow the source's rows, cast to `dtype`
    replaced: bool = False  # the source is an adapter's tensor, which is looked at like every update
    stacked: bool = False  # a stack of matrices (experts): rows are counted through the stack
    scale: Stored | None = None  # what the source's values count times: one number, or one for each row
    rescaled: Rescaling | None = None  # the values are divided by a new scale before they are rounded
    scale_of: str | None = None  # this is the new scale of that tensor, and is known when that one is
    content: str | None = None  # the bytes themselves, as UTF-8 text; the source only says where they belong
    keeps_nonfinite: bool = False  # elements of the source that are NaN or infinite stay as they are
    merge: MergeStep | None = None  # makes the base's values; the source is only the tensor whose place they take
    pieces: tuple[Stored, ...] = ()  # the source lies in these, one after the other; none: in one piece

    @property
    def is_rescaled(self) -> bool:
        """True if the largest value has to be known before the first one is rounded: the rows are gone over twice."""
        return self.rescaled is not None

    @property
    def is_given(self) -> bool:
        """True if the bytes are neither copied nor computed from the source: they come from the plan, or with
        the tensor of which this is the scale."""
        return self.scale_of is not None or self.content is not None

    @property
    def is_padded(self) -> bool:
        """True if the source is the beginning of a larger tensor of zeros, row by row and column by column."""
        return not self.appended and math.prod(self.source.shape) < math.prod(self.shape)

    @property
    def view(self) -> tuple[int, ...]:
        """The shape in which rows are counted: of a stack (E, h, w) it is (E * h, w). Without what is appended."""
        shape = self.shape if self.is_padded else self.source.shape
        return (shape[0] * shape[1], *shape[2:]) if self.stacked else shape

    @property
    def source_size(self) -> tuple[int, int]:
        """(rows, columns) of the source in that view: all of it, or the upper left corner of what is padded."""
        return as_matrix(self.source.shape if self.is_padded else self.view)

    @property
    def is_copy(self) -> bool:
        """True if the stored bytes are the result, as far as the source goes."""
        changed = self.is_padded or self.replaced or self.scale is not None or self.is_rescaled or self.is_given
        return not self.terms and self.merge is None and self.dtype == self.source.dtype and not changed

    @property
    def copied(self) -> tuple[Stored, ...]:
        """What is copied, one after the other, if it is a copy."""
        return self.pieces or (self.source,)

    @property
    def is_computed(self) -> bool:
        """True if there is arithmetic to be done: the bytes are neither copied nor given."""
        return not (self.is_copy or self.is_given)


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One weight file of the output."""

    relative: str  # path below the output folder; "" if the output is this one file
    metadata: dict[str, str]  # all but the record of the inputs, see bake.plan.record
    is_recorded: bool  # carries that record
    history: dict[str, str]  # the records of earlier bakes and merges in the base file this replaces
    tensors: tuple[TensorPlan, ...]  # in the order of their bytes


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the output folder that is no weight file: copied, or written with new content."""

    relative: str
    source: Path | None
    content: str | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingVectors:
    """The vectors that stand for a token in one text encoder."""

    key: str  # name of the tensor in a file of its own
    encoder: str | None  # clip_l, clip_g, ...; None if neither name nor width tells
    stored: Stored
    tokens: tuple[str, ...] = ()  # added to the output's tokenizer, one for each vector


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """A token's embedding that travels in an adapter, and where it goes."""

    token: str
    adapter: int  # place in Plan.adapters
    vectors: tuple[EmbeddingVectors, ...]  # one for each text encoder
    file: str | None  # its textual-inversion file, a name in the folder beside the output; None: none is written


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter of the recipe, as identified and weighted."""

    name: str
    input: int  # its weights, place in Plan.inputs
    config: int | None  # its adapter_config.json, likewise
    weight: float
    te: float | None
    unet: float | None
    rank_limit: int | None
    dialects: tuple[str, ...]
    algorithms: tuple[str, ...]
    ranks: tuple[int, ...]
    modules: int
    embeddings: tuple[str, ...] = ()
    selection: Selection | None = None  # what the weights are multiplied by, tensor by tensor


@dataclass(frozen=True, slots=True)
class ModelUse:
    """One model of a merge."""

    path: Path
    role: str
    inputs: tuple[int, int]  # its files: [first, past the last) place in Plan.inputs
    packaging: str
    layout: str
    history: dict[str, str]  # the records of earlier bakes and merges in it


@dataclass(frozen=True, slots=True)
class Merging:
    """What is merged, and how. The first model is the one whose layout, side files and metadata the output has."""

    method: str  # a row of bake.merges.METHODS
    models: tuple[ModelUse, ...]
    parameters: dict[str, Any]  # as given, see bake.plan.parameters
    only: tuple[str, ...]  # components; none: all
    allow_missing: bool
    layers: tuple[str, ...] = ()  # that are put one above the other, as bake.plan.recipe.Layers writes them


@dataclass(frozen=True, slots=True)
class Replacement:
    """A component that is another checkpoint's."""

    component: str
    path: Path
    inputs: tuple[int, int]  # its files: [first, past the last) place in Plan.inputs
    packaging: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many of a component's parts found a place: modules of adapters, or tensors that are merged."""

    matched: int
    total: int


@dataclass(frozen=True, slots=True)
class Unmatched:
    """An adapter module that has no place in the base."""

    module: str
    adapter: str
    reason: str
    nearest: str | None


@dataclass(frozen=True, slots=True)
class Skipped:
    """Adapter modules that were left out for a reason: the user asked for it, or the file has them in parts as well."""

    adapter: str
    component: str
    modules: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """One bake, decided to the last byte."""

    family: str
    layout: str
    variant: str | None
    packaging: str  # of the output
    base: Path
    base_packaging: str  # of what is read
    inputs: tuple[Input, ...]
    files: tuple[FilePlan, ...]
    side_files: tuple[SideFile, ...]
    adapters: tuple[AdapterUse, ...]
    components: dict[str, Coverage]
    unmatched: tuple[Unmatched, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    settings: dict[str, Any]  # what the recipe record needs to be replayed
    record: bool
    warnings: tuple[str, ...] = ()
    embeddings: tuple[EmbeddingPlan, ...] = ()
    rounding: str = "nearest"  # one of bake.plan.recipe.ROUNDINGS
    seed: int = 0  # of stochastic rounding, and of merges by chance
    merge: Merging | None = None  # the base is made of several models
    replaced: tuple[Replacement, ...] = ()
    like: Path | None = None  # the diffusers folder whose side files are taken; among the inputs by what was read of it
    schema: int = SCHEMA

    def tensors(self) -> Iterator[tuple[FilePlan, TensorPlan]]:
        for file in self.files:
            for tensor in file.tensors:
                yield file, tensor

    def owner_of(self, place: int) -> Path:
        """The checkpoint, as it was named, that an input belongs to; place: among the inputs."""
        several: list[ModelUse | Replacement] = [*(self.merge.models if self.merge else ()), *self.replaced]
        return next((each.path for each in several if place in range(*each.inputs)), self.base)

    @property
    def data_bytes(self) -> int:
        """Bytes of all output tensors, headers not counted."""
        return sum(file.tensors[-1].span[1] if file.tensors else 0 for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON data."""
        data: dict[str, Any] = _plain(self)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_json` gave; raises ValueError for another schema."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"a plan of schema {data.get('schema')}; this version of bake reads schema {SCHEMA}")
        return _build(cls, data)

    def digest(self) -> str:
        """SHA-256 of the plan's JSON: equal plans have equal digests."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


T = TypeVar("T")


def _build(kind: type[T], data: Any) -> T:
    """The inverse of `_plain`, led by the annotations of the dataclass."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], item) for name, item in data.items()})


def _value(hint: Any, data: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return _value(next(choice for choice in arguments if choice is not type(None)), data)
    if origin is tuple:
        each = arguments if arguments[-1] is not Ellipsis else [arguments[0]] * len(data)
        return tuple(_value(item_hint, item) for item_hint, item in zip(each, data, strict=True))
    if origin is dict:
        return {key: _value(arguments[1], item) for key, item in data.items()}
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), data)
    return Path(data) if hint is Path else data
