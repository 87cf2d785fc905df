"""The safetensors header: read as if an enemy had written it, written so that everybody can read it.

Layout: 8 bytes little-endian length N, N bytes of JSON, then the data section that the tensors
must tile without hole or overlap (format description in the safetensors README).
"""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeGuard

from bake.dtypes import DTYPES, RANK, tensor_bytes
from bake.errors import HeaderError
from bake.io.jsontext import parse_object, shortened

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library, checked before allocating
_ALIGNMENT = 8
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 2**63 - 1


class TensorInfo(NamedTuple):
    """One tensor as a header describes it."""

    dtype: str  # safetensors tag
    shape: tuple[int, ...]
    begin: int  # first byte, counted from the start of the data section
    end: int  # one past the last byte

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header."""

    tensors: dict[str, TensorInfo]  # in the order of their bytes
    metadata: dict[str, str]
    data_start: int  # byte of the file at which the data section begins


def header_length(prefix: bytes, file_size: int, path: str) -> int:
    """The length N that the first 8 bytes announce, checked against the file before any reading."""
    if file_size < 8 or len(prefix) < 8:
        raise HeaderError(f"{path}: {file_size} bytes is too short for a safetensors file", path=path)
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"{path}: not a safetensors file (its first 8 bytes announce a header of {length} bytes, "
            f"the format allows {MAX_HEADER_BYTES})",
            path=path,
        )
    if 8 + length > file_size:
        raise HeaderError(
            f"{path}: truncated: the header should end at byte {8 + length}, the file ends at {file_size}",
            path=path,
        )
    return length


def parse_header(text: bytes, file_size: int, path: str) -> Header:
    """The header whose JSON is `text`, for a file of `file_size` bytes in all.

    Raises HeaderError, naming the tensor where one is at fault, for every departure from the
    format: the data section must be tiled exactly and no name may occur twice.
    """
    entries = _parse_json(text, path)
    metadata = _check_metadata(entries.pop("__metadata__", None), path)
    data_start = 8 + len(text)
    tensors = {name: _check_entry(name, entry, path) for name, entry in entries.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    expected = 0
    for name, info in ordered:
        if info.begin != expected:
            fault = "overlaps its neighbour" if info.begin < expected else "leaves a hole before it"
            raise HeaderError(
                f"{path}: tensor {shortened(name)} {fault}: it begins at byte {info.begin} of the data, {expected} was "
                f"due",
                path=path,
                tensor=name,
            )
        expected = info.end
    if data_start + expected != file_size:
        wrong = "truncated" if data_start + expected > file_size else "followed by unknown bytes"
        raise HeaderError(
            f"{path}: {wrong}: the tensors end at byte {data_start + expected}, the file at {file_size}",
            path=path,
        )
    return Header(dict(ordered), metadata, data_start)


def _parse_json(text: bytes, path: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise HeaderError(f"{path}: not a safetensors file (the header does not begin with '{{')", path=path)
    return parse_object(text, f"{path}: the header", HeaderError, constants=False, path=path)


def _check_metadata(found: Any, path: str) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise HeaderError(f"{path}: __metadata__ must map names to text", path=path)
    return found


def _check_entry(name: str, entry: Any, path: str) -> TensorInfo:
    def refuse(why: str) -> NoReturn:
        raise HeaderError(f"{path}: tensor {shortened(name)}: {why}", path=path, tensor=name)

    if not isinstance(entry, dict):
        refuse("its entry is not a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse(f"unknown dtype {shortened(dtype)}")
    if not _is_size_list(shape) or len(shape) > _MAX_DIMENSIONS:
        refuse(f"{shortened(shape)} is not a shape")
    if not _is_size_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"{shortened(offsets)} is not a pair of offsets")
    begin, end = offsets
    # The library multiplies from left to right, and gives up where it cannot count further, zeros to come or not.
    counts = list(itertools.accumulate(shape, operator.mul, initial=1))
    needed = tensor_bytes(dtype, counts[-1]) if max(counts) <= _MAX_ELEMENTS else None
    if needed is None or needed != end - begin:
        refuse(
            f"{dtype} of shape {shortened(shape)} takes {needed if needed is not None else 'no whole number of'} "
            f"bytes, its offsets span {end - begin}"
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _is_size_list(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_ELEMENTS for item in value)


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
) -> dict[str, TensorInfo]:
    """Places for (name, dtype, shape) tensors in a new data section, in the given order if it aligns.

    Readers that map the file view tensors in place, so each must begin at a multiple of its item
    size. Where the given order (the base's own) does not give that, tensors are sorted from wide
    dtypes to narrow, as the safetensors library does, and keep their order within a dtype.
    """
    given = list(tensors)
    placed = _place(given)
    if not all(_is_aligned(info) for info in placed.values()):
        placed = _place(sorted(given, key=lambda item: RANK[item[1]]))
    return placed


def _place(tensors: list[tuple[str, str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    placed, begin = {}, 0
    for name, dtype, shape in tensors:
        size = tensor_bytes(dtype, math.prod(shape))
        if size is None:
            raise ValueError(f"{name}: {dtype} of shape {shape} does not fill whole bytes")
        placed[name] = TensorInfo(dtype, shape, begin, begin + size)
        begin += size
    return placed


def _is_aligned(info: TensorInfo) -> bool:
    return info.begin % max(1, DTYPES[info.dtype].bits // 8) == 0


def build_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], at_least: int = 0) -> bytes:
    """The bytes before the data section, `at_least` so many: length, then JSON padded with spaces to a multiple of 8.

    Begins with `{"`, which some web UIs insist on; metadata keys are sorted and nothing depends on
    hash order or time, so equal input gives equal bytes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, info in tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.begin, info.end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text = text.ljust(at_least - 8)
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise HeaderError(f"the output's header would take {len(text)} bytes, the format allows {MAX_HEADER_BYTES}")
    return len(text).to_bytes(8, "little") + text
