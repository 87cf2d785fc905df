"""Rounding float64 once to a stored dtype, and the spacing of its values; independent of any cast.

Of stochastic rounding only the draws are shared with the run that is checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bake.dtypes import DTYPES

Doubles = NDArray[np.float64]

_BIAS, _EXPONENT_SHIFT, _EXPONENT_MASK = 1023, 52, 0x7FF  # of float64


def spacing(values: Doubles, tag: str) -> Doubles:
    """The distance between neighbouring values of dtype `tag` at each of `values`, in float64."""
    row = DTYPES[tag]
    exponent = (np.ascontiguousarray(values).view(np.int64) >> _EXPONENT_SHIFT) & _EXPONENT_MASK
    step = np.maximum(np.maximum(exponent, row.smallest_exponent + _BIAS) - row.mantissa, 1)
    found: Doubles = (step << _EXPONENT_SHIFT).view(np.float64)
    return found


def round_once(values: Doubles, tag: str) -> Doubles:
    """`values` rounded to nearest, ties to even, to what dtype `tag` can hold; still float64.

    Beyond the largest value: infinity, as IEEE has it, or the largest value in fp8.
    """
    if tag == "F64":
        return values
    row = DTYPES[tag]
    if row.bits == 8:
        values = np.clip(values, -row.largest, row.largest)
    with np.errstate(all="ignore"):
        step = spacing(values, tag)
        rounded = np.rint(values / step) * step
    return np.where(np.abs(rounded) > row.largest, np.copysign(np.inf, rounded), rounded)


@dataclass(frozen=True, slots=True)
class Rule:
    """How the elements of one tensor are rounded."""

    tag: str
    key: int | None = None  # of its draws; None: to nearest
    is_fast: bool = False  # as float32 gives it

    def round(self, values: Doubles, first: int) -> Doubles:
        """`values` (consecutive elements of the tensor) as they are to be stored; still float64.

        first: flat index of the first one.
        """
        row = DTYPES[self.tag]
        if self.key is None or row.bits >= 32:
            return round_once(values, self.tag)
        draw = _draws(self.key, first, values.size).reshape(values.shape) + 0.5  # the sign bit counts as the uppermost
        size = np.minimum(np.abs(values), row.largest)
        step = spacing(size, self.tag)
        below = np.floor(size / step)
        up = size / step - below >= 1 - draw
        chosen = (below + up) * step
        if row.bits > 8:
            chosen = np.where(np.abs(values) >= row.overflow, np.inf, chosen)
        return np.copysign(chosen, values)


def _draws(key: int, first: int, count: int) -> Doubles:
    """The draws of so many elements from flat index `first` on, in [-0.5, 0.5)."""
    import torch  # which the run that is checked needed too

    from bake.draws import DRAW_BITS, draws

    drawn = draws(key, first, count, torch.device("cpu")).numpy() >> (32 - DRAW_BITS)
    shares: Doubles = np.asarray(drawn, np.float64) / 2**DRAW_BITS
    return shares
