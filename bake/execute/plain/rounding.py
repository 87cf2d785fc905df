"""Rounding float32 to 16 bits, exactly, and saying where a bound leaves the rounding open.

NumPy knows no bfloat16 and converts halves one at a time. So a number is rounded by adding another, so large
that their sum has no bit more than the dtype: to nearest, ties to even, as every addition. Where ties are left
open anyway, integer arithmetic on the bits of float32 is cheaper.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.dtypes import DTYPES
from bake.execute import kernels
from bake.execute.plain.desk import Desk

Floats = NDArray[np.float32]
Bits = NDArray[np.uint16]

UNIT = 2.0**-24  # the largest relative error of one float32 operation
_MANTISSA, _BIAS = 23, 127  # of float32
_EXPONENT = np.int32(0x7F800000)
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80}  # the bits of infinity; those of NaN are larger
_BELOW = {"F16": 2.0**15, "BF16": 2.0**100}  # from here on numbers may overflow, here or in the dtype

# The bits of a half, moved into those of a float32, mean its value but for this factor.
_HALF_SHIFT, _HALF_FACTOR = 13, np.float32(2.0**112)
_HALF_SIGN_AND_MAGNITUDE = np.int32(-0x80000000 | 0x0FFFFFFF)


class TooLarge(Exception):
    """Numbers that may be beyond the dtype, or are none at all: nothing for this part of bake."""


def widen(stored: NDArray[np.generic], tag: str, out: Floats) -> None:
    """Set `out` to the numbers that `stored` holds, which is as `bake.io.arrays.stored_dtype` says.

    Raises TooLarge for halves that are no finite numbers.
    """
    if kernels.compiled is not None:
        if not kernels.compiled.widen(stored, tag, out):
            raise TooLarge
        return
    if tag == "F32":
        np.copyto(out, stored)
        return
    bits = out.view(np.int32)
    np.copyto(bits, stored.view(np.int16))
    if tag == "BF16":
        np.left_shift(bits, 16, out=bits)
    else:
        if stored.view(np.int16).max(initial=0) >= 0x7C00 or stored.view(np.uint16).max(initial=0) >= 0xFC00:
            raise TooLarge
        np.left_shift(bits, _HALF_SHIFT, out=bits)
        np.bitwise_and(bits, _HALF_SIGN_AND_MAGNITUDE, out=bits)
        np.multiply(out, _HALF_FACTOR, out=out)


def widen_all(stored: NDArray[Any], tag: str, out: NDArray[np.float64], desk: Desk) -> None:
    """`widen` to float64, for every dtype that NumPy knows and bfloat16."""
    if kernels.compiled is not None and tag in ("F16", "BF16", "F32"):
        if not kernels.compiled.widen(stored, tag, out):
            raise TooLarge
    elif tag == "F64":
        np.copyto(out, stored)
    else:
        near = desk.array("near", np.float32, stored.shape)
        widen(stored, tag, near)
        np.copyto(out, near)


def settle(
    stored: NDArray[Any],
    source: str,
    update: Floats,
    tall: Floats | None,
    wide: Floats,
    tag: str,
    out: Bits,
    desk: Desk,
) -> NDArray[np.intp]:
    """Round `stored` + `update` into `out`; return the flat places where what that stands for may round differently.

    tall (rows, 1) times wide (1, columns), or else wide (rows, columns), is a bound: positive, and a little more
    (1 + 2**-20) than how far that is away at most, not counting one rounding to float32. Raises TooLarge.
    """
    if kernels.compiled is not None:
        places = desk.array("places", np.intp, (stored.size,))
        count = kernels.compiled.settle(stored, source, update, tall, wide, tag, out, places)
        if count < 0:
            raise TooLarge
        return places[:count].copy()
    near = desk.array("near", np.float32, stored.shape)
    widen(stored, source, near)
    np.add(near, update, out=near)
    bound = desk.array("bound", np.float32, stored.shape)
    if tall is None:
        np.copyto(bound, wide)
    else:
        np.einsum("ij,jk->ik", tall, wide, out=bound)  # twice as fast as to multiply
    return _settle(near, bound, tag, out, desk)


def _settle(near: Floats, bound: Floats, tag: str, out: Bits, desk: Desk) -> NDArray[np.intp]:
    """`settle` for a sum and its bound. Both are used up."""
    shape, drop = near.shape, _MANTISSA - DTYPES[tag].mantissa  # bits that go
    is_open, signs = desk.array("open", np.bool_, shape), desk.array("signs", np.uint16, shape)
    np.signbit(near, out=is_open)
    np.copyto(signs, is_open.view(np.uint8))
    np.left_shift(signs, 15, out=signs)

    # As integers the bits of positive floats are in order and evenly spaced within each power of two, so that a
    # number is rounded by adding half of what goes. The ends are moved outwards by 2 more than that: at most 1.5
    # units are lost in `near` itself, in the end, and in making it small.
    magnitude = np.abs(near, out=near)
    upper = np.add(magnitude, bound, out=desk.array("upper", np.float32, shape))
    lower = np.subtract(magnitude, bound, out=bound)
    if tag == "F16":
        np.multiply(upper, 1 / _HALF_FACTOR, out=upper)
        np.multiply(lower, 1 / _HALF_FACTOR, out=lower)
    high, low = upper.view(np.uint32), lower.view(np.uint32)
    np.add(high, np.uint32((1 << drop - 1) + 2), out=high)
    np.add(low, np.uint32((1 << drop - 1) - 2), out=low)
    np.bitwise_xor(low, high, out=low)
    np.greater_equal(low, np.uint32(1 << drop), out=is_open)  # they differ in what stays, or in the sign
    if high.max(initial=0) >= _beyond(tag):
        if not magnitude.max() < _BELOW[tag]:
            raise TooLarge
        np.logical_or(is_open, high >= _beyond(tag), out=is_open)
    np.right_shift(high, drop, out=high)
    np.copyto(out, high, casting="unsafe")  # the lower half
    np.bitwise_or(out, signs, out=out)
    return np.flatnonzero(is_open)


def _beyond(tag: str) -> int:
    """From where on the bits of the upper end, as `settle` has them, may belong to a number that is too large."""
    factor = 1 / _HALF_FACTOR if tag == "F16" else np.float32(1)
    return int((np.float32(_BELOW[tag]) * factor).view(np.uint32))


def narrow(near: Floats, tag: str, out: Bits, desk: Desk) -> None:
    """Round `near` itself, which is used up, into `out`. Raises TooLarge."""
    if kernels.compiled is not None:
        if not kernels.compiled.narrow(near, tag, out):
            raise TooLarge
        return
    kind, shape = DTYPES[tag], near.shape
    large, rounded = (desk.array(name, np.float32, shape) for name in ("large", "rounded"))
    np.bitwise_and(near.view(np.int32), _EXPONENT, out=large.view(np.int32))  # the power of two below
    if not large.max(initial=0) < _BELOW[tag]:
        raise TooLarge
    np.maximum(large, np.float32(2.0**kind.smallest_exponent), out=large)
    np.multiply(large, np.float32(1.5 * 2.0 ** (_MANTISSA - kind.mantissa)), out=large)
    np.add(near, large, out=rounded)
    np.subtract(rounded, large, out=rounded)
    np.copysign(rounded, near, out=rounded)  # small negative numbers become -0
    _encode(rounded, tag, out, large.view(np.uint32))


def _encode(rounded: Floats, tag: str, out: Bits, buffer: NDArray[np.uint32]) -> None:
    """Set `out` to the bits of numbers that the dtype can hold; they are used up."""
    bits = rounded.view(np.uint32)
    if tag == "BF16":
        np.right_shift(bits, 16, out=bits)
    else:
        np.multiply(rounded, 1 / _HALF_FACTOR, out=rounded)
        sign = np.bitwise_and(np.right_shift(bits, 16, out=buffer), 0x8000, out=buffer)
        np.bitwise_or(np.right_shift(bits, _HALF_SHIFT, out=bits), sign, out=bits)
    np.copyto(out, bits, casting="unsafe")  # the lower half


def narrow_all(values: NDArray[np.float64], tag: str, out: NDArray[Any], desk: Desk) -> None:
    """Set `out`, which is as `bake.io.arrays.stored_dtype` says, to float64 `values` rounded once.

    Raises TooLarge if one of them is not finite then.
    """
    if kernels.compiled is not None and tag in _INFINITY:
        if not kernels.compiled.narrow(values, tag, out):
            raise TooLarge
        return
    if tag == "BF16":
        _narrow_to_bfloat16(values, out, desk)
    else:
        np.copyto(out, values, casting="same_kind")
    if not _are_finite(out, tag):
        raise TooLarge


def _narrow_to_bfloat16(values: NDArray[np.float64], out: Bits, desk: Desk) -> None:
    """By way of float32. That is wrong only where a number becomes a tie which it was not."""
    near, rounded = (desk.array(name, np.float32, values.shape) for name in ("near", "rounded"))
    np.copyto(near, values, casting="same_kind")
    if not _are_finite(near, "F32"):
        raise TooLarge  # the bits of NaN cannot be counted with
    bits, sums = near.view(np.uint32), rounded.view(np.uint32)
    is_tie, is_off = (desk.array(name, np.bool_, values.shape) for name in ("tie", "off"))
    np.equal(np.bitwise_and(bits, 0xFFFF, out=sums), 0x8000, out=is_tie)
    np.not_equal(near, values, out=is_off)
    places = np.flatnonzero(np.logical_and(is_tie, is_off, out=is_tie))
    if len(places):  # a step back to the side they came from
        exact, found = np.abs(values.reshape(-1)[places]), np.abs(near.reshape(-1)[places])
        near.view(np.int32).reshape(-1)[places] += np.where(exact > found, 1, -1).astype(np.int32)
    np.bitwise_and(np.right_shift(bits, 16, out=sums), 1, out=sums)  # ties go to the even one
    np.add(np.add(sums, 0x7FFF, out=sums), bits, out=sums)
    np.copyto(out, np.right_shift(sums, 16, out=sums), casting="unsafe")


def _are_finite(values: NDArray[Any], tag: str) -> bool:
    """values: as `bake.io.arrays.stored_dtype` says."""
    if tag in _INFINITY:
        infinity = _INFINITY[tag]
        return bool(values.view(np.int16).max() < infinity and values.view(np.uint16).max() < 0x8000 + infinity)
    return bool(np.isfinite(values.max()) and np.isfinite(values.min()))


def narrow_each(values: NDArray[np.float64], tag: str) -> Bits:
    """Float64 `values` rounded once, as bits. Raises TooLarge."""
    if not np.abs(values).max(initial=0.0) < _BELOW[tag]:
        raise TooLarge
    if tag == "F16":
        return values.astype(np.float16).view(np.uint16)
    _, exponent = np.frexp(values)
    step = np.ldexp(1.0, np.maximum(exponent - 1, DTYPES[tag].smallest_exponent) - DTYPES[tag].mantissa)
    rounded = (np.rint(values / step) * step).astype(np.float32)
    bits: Bits = (rounded.view(np.uint32) >> 16).astype(np.uint16)
    return bits
