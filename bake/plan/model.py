"""The plan: frozen data that says what every byte of the output is. It serialises to JSON and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Input:
    """A file that is read. `size` and `modified` tell whether it is still the one that was planned with."""

    path: Path
    size: int  # bytes
    modified: int  # nanoseconds
    role: Literal["base", "adapter", "config"]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it lies in an input."""

    input: int  # place in Plan.inputs
    name: str
    dtype: str  # safetensors tag
    shape: tuple[int, ...]
    span: tuple[int, int]  # [begin, end) in that file's data section, bytes


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter module's contribution to one tensor."""

    algorithm: str
    factors: dict[str, Stored]
    scale: float  # alpha / rank * weight; unitless
    rows: tuple[int, int]  # [first, past the last) row of the tensor seen as a matrix
    columns: tuple[int, int]
    transposed: bool  # the factors give (columns, rows)
    adapter: int  # place in Plan.adapters
    module: str
    rank_limit: int | None = None  # of LoRA factors, only this many ranks count


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Everything needed to write one output tensor."""

    name: str  # as in the file
    shape: tuple[int, ...]
    dtype: str  # safetensors tag
    span: tuple[int, int]  # [begin, end) in the output's data section, bytes
    source: Stored
    component: str  # "" for tensors that belong to none
    terms: tuple[Term, ...] = ()  # in the order they are added

    @property
    def is_copy(self) -> bool:
        """True if the stored bytes are the result."""
        return not self.terms and self.dtype == self.source.dtype


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


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many modules an adapter, or all of them, have for one component, and how many found a place."""

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
    """Adapter modules that were left out for a reason the user gave."""

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
    packaging: str
    base: Path
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
    schema: int = SCHEMA

    def tensors(self) -> Iterator[tuple[FilePlan, TensorPlan]]:
        for file in self.files:
            for tensor in file.tensors:
                yield file, tensor

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
