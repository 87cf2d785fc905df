"""Rounding float64 once to a stored dtype, and the spacing of its values; independent of any cast."""

from __future__ import annotations

import torch
from torch import Tensor

from bake.dtypes import DTYPES

_BIAS, _EXPONENT_SHIFT, _EXPONENT_MASK = 1023, 52, 0x7FF  # of float64


def spacing(values: Tensor, tag: str) -> Tensor:
    """The distance between neighbouring values of dtype `tag` at each of `values` (float64), in float64."""
    row = DTYPES[tag]
    exponent = (values.view(torch.int64) >> _EXPONENT_SHIFT) & _EXPONENT_MASK
    step = (exponent.clamp_min(row.smallest_exponent + _BIAS) - row.mantissa).clamp_min(1)
    return (step << _EXPONENT_SHIFT).view(torch.float64)


def round_once(values: Tensor, tag: str) -> Tensor:
    """`values` (float64) rounded to nearest, ties to even, to what dtype `tag` can hold; still float64.

    Beyond the largest value: infinity, as IEEE has it, or the largest value in fp8.
    """
    if tag == "F64":
        return values
    row = DTYPES[tag]
    if row.bits == 8:
        values = values.clamp(-row.largest, row.largest)
    step = spacing(values, tag)
    rounded = torch.round(values / step) * step
    infinite = torch.copysign(torch.full_like(rounded, torch.inf), rounded)
    return torch.where(rounded.abs() > row.largest, infinite, rounded)
