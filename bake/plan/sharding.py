"""The weight files of the output: one for a model, or shards with an index as Hugging Face's libraries have them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bake.errors import UsageError
from bake.io.header import lay_out
from bake.keys.scaled import GENERATIONS, WEIGHT, side_tensors
from bake.plan.listing import some
from bake.plan.model import FilePlan, SideFile, TensorPlan

# The end of a shard's name, and of any weight file's.
_NUMBER = re.compile(r"(-\d+-of-\d+)?\.safetensors$")
_SUFFIX = ".safetensors"


class Packed(NamedTuple):
    """All files of the output."""

    packaging: str
    files: tuple[FilePlan, ...]
    side_files: tuple[SideFile, ...]
    notes: tuple[str, ...] = ()


def pack(files: Sequence[FilePlan], side_files: Sequence[SideFile], packaging: str, size: int) -> Packed:
    """The weights in shards of `size` bytes at most, their index last; 0: each component in one file.

    A tensor is never cut: one that is larger has a shard of its own. A single file becomes a folder, and the shards
    of a model become one file, without a folder for what lies beside them.
    Raises UsageError for a stack of files.
    """
    if packaging == "stack":
        raise UsageError("--shard-size is for one model: a stack of files stays as many files")
    if size < 0:
        raise UsageError(f"--shard-size {size}: a number of bytes, or 0 for one file")
    groups: dict[str, list[FilePlan]] = {}
    for file in files:
        groups.setdefault(file.relative.rpartition("/")[0], []).append(file)
    divided: list[FilePlan] = []
    indexes: list[SideFile] = []
    for folder, members in groups.items():
        stem = _NUMBER.sub("", members[0].relative.rpartition("/")[2]) or "model"
        joined = _joined(members)
        pieces = _divided(joined.tensors, size) if size else [joined.tensors]
        below = f"{folder}/" if folder else ""
        names = [_name(stem, number, len(pieces)) for number in range(1, len(pieces) + 1)]
        if packaging in ("file", "sharded") and not size:
            names = [""]
        divided += [
            dataclasses.replace(
                joined,
                relative=below + name,
                is_recorded=joined.is_recorded and place == 0,
                history=joined.history if place == 0 else {},
                tensors=placed(tensors),
            )
            for place, (name, tensors) in enumerate(zip(names, pieces, strict=True))
        ]
        if len(pieces) > 1:
            indexes.append(_index(below, stem, divided[-len(pieces) :]))
    becomes = {("file", True): "sharded", ("sharded", False): "file"}.get((packaging, bool(size)), packaging)
    if becomes == "file":
        beside = [side.relative for side in side_files]
        return Packed(becomes, tuple(divided), (), (f"left out beside one file: {some(beside)}",) if beside else ())
    return Packed(becomes, tuple(divided), (*side_files, *indexes))


def placed(tensors: Iterable[TensorPlan]) -> tuple[TensorPlan, ...]:
    """The tensors behind one another in a data section of their own."""
    by_name = {tensor.name: tensor for tensor in tensors}
    found = lay_out((tensor.name, tensor.dtype, tensor.shape) for tensor in by_name.values())
    return tuple(dataclasses.replace(by_name[name], span=(info.begin, info.end)) for name, info in found.items())


def _joined(files: Sequence[FilePlan]) -> FilePlan:
    """The tensors of several files in one, with the metadata of all: the first has the last word."""
    metadata: dict[str, str] = {}
    for file in files:
        metadata = {**file.metadata, **metadata}
    return dataclasses.replace(
        files[0],
        metadata=metadata,
        is_recorded=any(file.is_recorded for file in files),
        history=next((file.history for file in files if file.history), {}),
        tensors=placed(tensor for file in files for tensor in file.tensors),
    )


def _divided(tensors: Sequence[TensorPlan], size: int) -> list[list[TensorPlan]]:
    """The tensors of each shard. Source: huggingface_hub serialization/_base.py split_state_dict_into_shards_factory.

    What lies beside a scaled weight stays with it.
    """
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for together in _units(tensors):
        weight = sum(tensor.span[1] - tensor.span[0] for tensor in together)
        if shards[-1] and filled + weight > size:
            shards.append([])
            filled = 0
        shards[-1] += together
        filled += weight
    return shards


def _units(tensors: Sequence[TensorPlan]) -> list[list[TensorPlan]]:
    """The tensors in their order, those that belong together in one list."""
    names = {tensor.name for tensor in tensors}
    owners = {
        beside: weight
        for weight in names
        if weight.endswith(WEIGHT)
        for generation in GENERATIONS
        for beside in side_tensors(weight, generation)
    }
    units: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        units.setdefault(owners.get(tensor.name, tensor.name), []).append(tensor)
    return list(units.values())


def _name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05d}-of-{count:05d}{_SUFFIX}" if count > 1 else stem + _SUFFIX


def _index(below: str, stem: str, files: Sequence[FilePlan]) -> SideFile:
    total = sum(tensor.span[1] - tensor.span[0] for file in files for tensor in file.tensors)
    weight_map = {tensor.name: file.relative.rpartition("/")[2] for file in files for tensor in file.tensors}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return SideFile(f"{below}{stem}{_SUFFIX}.index.json", None, text)
