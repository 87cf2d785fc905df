"""The tensors of an adapter file by the module, and the parameter of it, that they are for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bake.errors import InputError
from bake.identify.embeddings import is_embedding
from bake.io.adapter import AdapterFile
from bake.io.tensorfile import read_tensor_bytes
from bake.keys.factors import SCALARS, Suffix, algorithm_of, split_key, split_value, updates_nothing

_NUMBERED = re.compile(r"(?P<component>unet|text_encoder):(?P<number>\d{1,4}):(?P<factor>up|down)")
_SAVED_COPY = ".modules_to_save."
_SHARED = frozenset({"vera_a", "vera_b"})  # factors that all modules of a file have in common


class Member(NamedTuple):
    """One tensor of a module."""

    tensor: str
    transposed: bool = False


Members = dict[str, Member]  # factor -> tensor


class Part(NamedTuple):
    """A module, or one of the projections that its trainer split it into."""

    module: str  # as the file spells it, without suffix
    number: int | None = None
    parts: int = 1  # how many projections the module has

    @property
    def title(self) -> str:
        return self.module if self.number is None else f"{self.module}.{self.number}"


@dataclass
class Grouping:
    """What an adapter file holds."""

    modules: dict[Part, dict[str, Members]] = field(default_factory=dict)  # -> parameter -> factors
    shared: Members = field(default_factory=dict)
    values: list[str] = field(default_factory=list)  # tensors that are ordinary ones by name
    embeddings: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # tensors whose names no format uses

    def has_algorithm(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """True if at least one module has all the factors of a known algorithm."""
        return any(
            algorithm_of({factor: shapes[member.tensor] for factor, member in (members | self.shared).items()})
            or "token_rows" in members
            for parameters in self.modules.values()
            for members in parameters.values()
        )


def group(source: AdapterFile) -> Grouping:
    """The tensors of `source` by module. Raises InputError if a module has two tensors for one factor."""
    grouping = Grouping()
    names = _list_names(source) if source.file.is_list else {}
    split: dict[tuple[str, int | None], dict[str, Members]] = {}
    for key in source.file.tensors:
        if _repeats_another(source, key):
            continue
        found = _split_numbered(names.get(key, key)) or split_key(key)
        if found is not None:
            module, suffix = found
            if suffix.factor in _SHARED:
                grouping.shared[suffix.factor] = Member(key)
            else:
                _put(source, split.setdefault((module, suffix.part), {}), module, suffix, key)
        elif is_embedding(key, source.file.metadata):
            grouping.embeddings.append(key)
        elif split_value(key) is not None:
            grouping.values.append(key)
        elif not updates_nothing(key):
            grouping.unknown.append(key)
    grouping.modules = _with_parts(source, split)
    _take_vectors(grouping)
    return grouping


def _take_vectors(grouping: Grouping) -> None:
    """Move the vectors of (IA)3, which LyCORIS calls `weight` as if they were tensors of the base, to their modules."""
    for key in list(grouping.values):
        members = grouping.modules.get(Part(key.removesuffix(".weight")), {}).get("weight", {})
        if "on_input" in members and "ia3_weight" not in members:
            members["ia3_weight"] = Member(key)
            grouping.values.remove(key)


def accept_values(source: AdapterFile, grouping: Grouping) -> None:
    """Take the tensors that stand beside factors under ordinary names for whole new values of their targets."""
    for key in grouping.values:
        found = split_value(key)
        assert found is not None
        module, suffix = found
        _put(source, grouping.modules.setdefault(Part(module), {}), module, suffix, key)
    grouping.values = []


def _repeats_another(source: AdapterFile, key: str) -> bool:
    """True for the second copy that PEFT saves of a replaced module's bias where it saves all biases.

    Source: PEFT utils/save_and_load.py: bias="all" takes `head.modules_to_save.bias` along, and the
    module itself is saved as `head.bias`.
    """
    plain = source.file.tensors.get(key.replace(_SAVED_COPY, "."))
    return (
        _SAVED_COPY in key
        and plain is not None
        and plain.shape == source.file.tensors[key].shape
        and read_tensor_bytes(source.file, key) == read_tensor_bytes(source.file, key.replace(_SAVED_COPY, "."))
    )


def _put(source: AdapterFile, parameters: dict[str, Members], module: str, suffix: Suffix, key: str) -> None:
    members = parameters.setdefault(suffix.parameter, {})
    if suffix.factor in members:
        raise InputError(
            f"{source.path}: module {module!r} has two tensors for {suffix.factor}: "
            f"{members[suffix.factor].tensor!r} and {key!r}"
        )
    members[suffix.factor] = Member(key, suffix.transposed)


def _with_parts(
    source: AdapterFile, split: Mapping[tuple[str, int | None], dict[str, Members]]
) -> dict[Part, dict[str, Members]]:
    """Modules and parts of modules; what is stored once for a split module, its alpha, goes to every part.

    Raises InputError if a part is missing between others.
    """
    counts: dict[str, int] = {}
    for module, number in split:
        if number is not None:
            counts[module] = max(counts.get(module, 0), number + 1)
    for module, count in counts.items():
        missing = [number for number in range(count) if (module, number) not in split]
        if missing:
            raise InputError(f"{source.path}: module {module!r} has {count} parts and lacks part {missing[0]}")
    found: dict[Part, dict[str, Members]] = {}
    for (module, number), parameters in split.items():
        if number is not None:
            common = split.get((module, None), {})
            found[Part(module, number, counts[module])] = {
                parameter: {
                    **{factor: member for factor, member in common.get(parameter, {}).items() if factor in SCALARS},
                    **members,
                }
                for parameter, members in parameters.items()
            }
        elif module not in counts or not set().union(*parameters.values()) <= set(SCALARS):
            found[Part(module)] = parameters
    return found


def _split_numbered(key: str) -> tuple[str, Suffix] | None:
    """(module name, suffix) of cloneofsimo's keys, such as unet:0:up."""
    found = _NUMBERED.fullmatch(key)
    return None if found is None else (f"{found['component']}:{found['number']}", Suffix(found["factor"]))


def _list_names(source: AdapterFile) -> dict[str, str]:
    """Names for the tensors of cloneofsimo's .pt lists: [up, down, up, down, ...] of one component.

    Raises InputError if the list does not hold pairs of matrices.
    """
    tensors = list(source.file.tensors.items())
    if len(tensors) % 2 or any(len(info.shape) < 2 for _, info in tensors):
        raise InputError(f"{source.path}: a list of {len(tensors)} tensors that are not pairs of up and down factors")
    # A text encoder is as wide inside as outside; a UNet has several widths.
    widths = {info.shape[0] for _, info in tensors[::2]} | {info.shape[1] for _, info in tensors[1::2]}
    component = "text_encoder" if len(widths) == 1 else "unet"
    return {key: f"{component}:{i // 2}:{('up', 'down')[i % 2]}" for i, (key, _) in enumerate(tensors)}
