"""Rounding to the stored dtype, exactly: float32 decides almost every element, float64 the few that it cannot.

A value v is known as a float32 number and a bound on the distance between the two. Rounding is monotone, so
where the lower and the upper end of that interval round to the same number, v does too.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bake.dtypes import DTYPES
from bake.execute.narrow import narrow
from bake.io.payload import torch_dtype

UNIT = 2.0**-24  # the largest relative error of one float32 operation

# How far `settle` moves an end of the interval per unit of slack: half a last place for each of the three
# roundings on the way (of the value itself, of the lower end, of the upper one) and a little for the slack's own.
SPREAD = 3.125 * UNIT

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of so many bytes
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # the bits of infinity; those of NaN are larger


class Rounding(Protocol):
    """A way to round to one dtype. It must be monotone in the value of each element."""

    is_fast: bool  # float32 decides alone

    def narrow(self, values: Tensor, out: Tensor, first: int) -> None:
        """Round the float32 `values` into `out`; first: flat index, in the whole tensor, of the first of them."""

    def narrow_each(self, values: Tensor, index: Tensor) -> Tensor:
        """Float64 values (n,) rounded; index: (n,) int64, where in the whole tensor each one is."""


class Nearest:
    """To nearest, ties to even; in 8 bits the largest finite value stands for everything beyond it."""

    def __init__(self, tag: str, is_fast: bool = False) -> None:
        self.is_fast = is_fast
        self._dtype = torch_dtype(tag)
        # A cast beyond the largest 8-bit value saturates on some devices and not on others.
        self._limit = DTYPES[tag].largest if DTYPES[tag].bits == 8 else None

    def narrow(self, values: Tensor, out: Tensor, first: int) -> None:
        out.copy_(values if self._limit is None else values.clamp(-self._limit, self._limit))

    def narrow_each(self, values: Tensor, index: Tensor) -> Tensor:
        return narrow(values if self._limit is None else values.clamp(-self._limit, self._limit), self._dtype)


def settle(near: Tensor, slack: Tensor, rounding: Rounding, out: Tensor, other: Tensor, first: int) -> None:
    """Round the lower ends of the intervals into `out`, the upper ones into `other`: where they agree it is decided.

    near: float32, at most UNIT * |near| + (SPREAD * slack - 3 * UNIT * |near|) away from the true values; slack:
    float32, |near| and more. Both are used up. first: as for `Rounding.narrow`.
    """
    near.sub_(slack, alpha=SPREAD)
    rounding.narrow(near, out, first)
    near.add_(slack, alpha=2 * SPREAD)
    rounding.narrow(near, other, first)


def settle_wide(values: Tensor, near: Tensor, rounding: Rounding, out: Tensor, other: Tensor, first: int) -> None:
    """Round float64 `values` into `out`, once, by way of the float32 numbers on both sides of each.

    near: float32 of the same shape, for intermediate results.
    """
    near.copy_(values)
    bits = near.view(torch.int32)
    bits.sub_(1)  # the neighbour towards zero; that of zero is a NaN, which decides nothing
    rounding.narrow(near, out, first)
    bits.add_(2)
    rounding.narrow(near, other, first)
    places = differing(out, other)
    if len(places):
        put(out, places, rounding.narrow_each(values.reshape(-1)[places], places + first))


def take(values: Tensor, places: Tensor) -> Tensor:
    """The elements at flat `places`, of any dtype: not every device can index 8-bit floats."""
    return values.view(-1).view(INTEGERS[values.element_size()]).index_select(0, places).view(values.dtype)


def put(values: Tensor, places: Tensor, new: Tensor) -> None:
    """Set the elements at flat `places`."""
    kind = INTEGERS[values.element_size()]
    values.view(-1).view(kind).index_copy_(0, places, new.view(kind))


def differing(one: Tensor, two: Tensor) -> Tensor:
    """The flat places at which the bits of two tensors differ: (n,) int64, ascending."""
    kind = INTEGERS[one.element_size()]
    left, right = one.view(-1).view(kind), two.view(-1).view(kind)
    if left.is_cpu:  # ten times as fast there
        return torch.from_numpy(_unequal(left.numpy(), right.numpy()))
    return (left != right).nonzero().view(-1)


def _unequal(one: NDArray[Any], two: NDArray[Any]) -> NDArray[np.int64]:
    """The places at which two vectors of integers differ; eight bytes at a time, as nearly all are equal."""
    each = 8 // one.itemsize
    end = len(one) // each * each
    words = np.flatnonzero(one[:end].view(np.int64) != two[:end].view(np.int64))
    near = np.append((words[:, None] * each + np.arange(each)).reshape(-1), np.arange(end, len(one)))
    places: NDArray[np.int64] = near[one[near] != two[near]]
    return places


def has_nonfinite(values: Tensor) -> bool:
    """True if any of the values is NaN or infinite."""
    if values.numel() == 0:
        return False
    infinity = _INFINITY.get(values.dtype)
    if infinity is None or not values.is_cpu:
        low, high = torch.aminmax(values if values.element_size() > 1 else values.float())
        return not (bool(low.isfinite()) and bool(high.isfinite()))
    bits = values.view(torch.int16).numpy()  # the largest positive numbers; unsigned, the largest negative ones
    return bool(bits.max() >= infinity or bits.view(np.uint16).max() >= 0x8000 + infinity)
