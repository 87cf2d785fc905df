"""Rounding float64 once to a stored dtype, and the spacing of its values; independent of any cast.

Of stochastic rounding only the draws are shared with the run that is checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bake.draws import DRAW_BITS, draws_at
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


@dataclass(frozen=True, slots=True)
class Rule:
    """How the elements of one tensor are rounded."""

    tag: str
    key: int | None = None  # of its draws; None: to nearest
    is_fast: bool = False  # as float32 gives it

    def round(self, values: Tensor, first: int) -> Tensor:
        """`values` (float64, consecutive elements of the tensor) as they are to be stored; still float64.

        first: flat index of the first one.
        """
        row = DTYPES[self.tag]
        if self.key is None or row.bits >= 32:
            return round_once(values, self.tag)
        index = torch.arange(first, first + values.numel(), device=values.device).view(values.shape)
        drawn = (draws_at(self.key, index.view(-1)).view(values.shape).to(torch.int64) >> (32 - DRAW_BITS)).double()
        draw = drawn / 2**DRAW_BITS + 0.5  # the sign bit counts as the uppermost one
        size = values.abs().clamp(max=row.largest)
        step = spacing(size, self.tag)
        below = torch.floor(size / step)
        up = size / step - below >= 1 - draw
        chosen = (below + up) * step
        if row.bits > 8:
            chosen = torch.where(values.abs() >= row.overflow, torch.inf, chosen)
        return torch.copysign(chosen, values)
