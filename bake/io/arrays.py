"""Stored bytes <-> NumPy arrays, for work that does not need torch, whose import alone takes a second."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bake.dtypes import DTYPES, decode_scalar
from bake.io.tensorfile import TensorFile

Float = TypeVar("Float", np.float32, np.float64)

# What the bytes are read as; values of the others follow from their bits.
_SELF = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_MANY = 4096  # halves from which on a table is faster than NumPy's conversion, which takes them one at a time
_BITS: dict[int, DTypeLike] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def stored_dtype(tag: str) -> np.dtype[np.generic]:
    """What an array of stored numbers of the dtype `tag` holds: NumPy's float, or else the bits."""
    return np.dtype(_SELF.get(tag) or _BITS[DTYPES[tag].bits])


def widened(stored: NDArray[Any], tag: str, dtype: type[Float]) -> NDArray[Float]:
    """`stored`, as `stored_dtype` says, in float32 or float64: new memory, and exact but for F64 in float32."""
    if tag == "BF16":
        stored = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    elif DTYPES[tag].bits == 8:
        stored = _values_of_bytes(tag)[stored]
    elif tag == "F16" and stored.size > _MANY:
        return _values_of_halves().take(stored.view(np.uint16)).astype(dtype, copy=False)
    values: NDArray[Float] = stored.astype(dtype)
    return values


@functools.cache
def _values_of_bytes(tag: str) -> NDArray[np.float64]:
    return np.array([decode_scalar(tag, bytes([byte])) for byte in range(256)])


@functools.cache
def _values_of_halves() -> NDArray[np.float32]:
    with np.errstate(invalid="ignore"):  # NaN
        return np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)


def read_array(file: TensorFile, begin: int, tag: str, shape: tuple[int, ...], dtype: type[Float]) -> NDArray[Float]:
    """A stored tensor, widened to `dtype`; begin: byte of the data section at which it starts."""
    stored = np.empty(math.prod(shape), stored_dtype(tag))
    file.read_into(begin, as_bytes(stored))
    return widened(stored, tag, dtype).reshape(shape)


def as_bytes(values: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array."""
    return values.reshape(-1).view(np.uint8).data
