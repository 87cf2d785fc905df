"""Stored bytes <-> torch tensors. The only part of io that needs torch for ordinary files."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bake.dtypes import DTYPES
from bake.io.tensorfile import TensorFile


def torch_dtype(tag: str) -> torch.dtype:
    """The torch dtype of a safetensors tag."""
    name = DTYPES[tag].torch
    if name is None:
        raise ValueError(f"torch has no dtype for {tag}")
    found: torch.dtype = getattr(torch, name)
    return found


def view_as(raw: Tensor, tag: str, shape: tuple[int, ...]) -> Tensor:
    """The first bytes of the uint8 tensor `raw` seen as a tensor of dtype `tag`; shares its memory."""
    count = math.prod(shape)
    return raw[: count * DTYPES[tag].bits // 8].view(torch_dtype(tag)).reshape(shape)


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    found: memoryview = values.view(-1).view(torch.uint8).numpy().data
    return found


def read_rows(file: TensorFile, begin: int, tag: str, columns: int, rows: range, dtype: torch.dtype) -> Tensor:
    """Some rows of a stored tensor seen as a matrix of `columns` columns, widened to `dtype` on the CPU.

    begin: byte of the data section at which the tensor starts. Rows in between are read and dropped.
    """
    if not rows:
        return torch.empty((0, columns), dtype=dtype)
    offset = begin + rows[0] * columns * DTYPES[tag].bits // 8
    return read_tensor(file, offset, tag, (rows[-1] + 1 - rows[0], columns), dtype)[:: rows.step]


def read_padded(
    file: TensorFile, begin: int, tag: str, size: tuple[int, int], columns: int, rows: range, dtype: torch.dtype
) -> Tensor:
    """Contiguous rows of a stored matrix of `size` (rows, columns) in a larger one of `columns`, the rest zeros."""
    found = torch.zeros((len(rows), columns), dtype=dtype)
    stored = range(rows.start, min(rows.stop, size[0]))
    if stored:
        found[: len(stored), : size[1]] = read_rows(file, begin, tag, size[1], stored, dtype)
    return found


def read_tensor(file: TensorFile, begin: int, tag: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A stored tensor, widened to `dtype` on the CPU; begin: byte of the data section at which it starts."""
    raw = torch.empty(math.prod(shape) * DTYPES[tag].bits // 8, dtype=torch.uint8)
    file.read_into(begin, raw.numpy().data)
    return view_as(raw, tag, shape).to(dtype)


def holds_numbers(file: TensorFile, begin: int, tag: str, shape: tuple[int, ...]) -> bool:
    """True if no element of a stored tensor is NaN or infinite."""
    return bool(torch.isfinite(read_tensor(file, begin, tag, shape, torch.float64)).all())
