"""Rounding to one of the two neighbours by chance, in proportion to how near they are.

A value of `step * (n + share)`, 0 < share < 1, becomes the larger neighbour in magnitude if `share + draw >= 1`,
where the element's draw is uniform on the multiples of 2**-24 in [0, 1): with the probability `share`, so that
on average nothing of a small update is lost. For one element the result never falls when the value grows, which
is what lets bounds decide about it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bake.draws import DRAW_BITS, draws, draws_at, key_of
from bake.dtypes import DTYPES
from bake.io.payload import torch_dtype

_PIECE = 64 * 1024  # elements worked on at a time: all buffers stay in the cache
_UPPER_HALF = -(1 << 16)  # of an int32
# dtype -> (the integer of its size, bits of its mantissa, exponent bias)
_LAYOUTS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


class Stochastic:
    """Stochastic rounding of one tensor: which way an element goes follows from seed, name and place."""

    is_fast = False

    def __init__(self, seed: int, name: str, tag: str) -> None:
        """seed: any integer. name: of the output tensor, as in its file. tag: its stored dtype, a float."""
        self._key = key_of(seed, name)
        self._row = DTYPES[tag]
        self._dtype = torch_dtype(tag)

    def narrow(self, values: Tensor, out: Tensor, first: int) -> None:
        """Round `values` into `out`.

        values: float32 (rows, columns), contiguous; not changed. out: of the same shape, in the stored dtype.
        first: flat index in the tensor of the first element. Beyond the largest value the result is what nearest
        rounding gives: the largest or infinity, in fp8 the largest. 32-bit and wider dtypes are rounded to nearest.
        """
        if self._row.bits >= 32:
            out.copy_(values)
            return
        source, target = values.reshape(-1), out.view(-1)
        round_piece = _to_bfloat16 if self._dtype == torch.bfloat16 else self._rounded
        for begin in range(0, source.numel(), _PIECE):
            piece = source[begin : begin + _PIECE]
            halves = draws(self._key, first + begin, piece.numel(), piece.device)
            target[begin : begin + _PIECE].copy_(round_piece(piece, halves))

    def narrow_each(self, values: Tensor, index: Tensor) -> Tensor:
        """`values` in the stored dtype, rounded as `narrow` does it: equally, where float32 holds them exactly.

        values: float64 (n,). index: int64 (n,), their flat indices in the tensor.
        """
        if self._row.bits >= 32:
            return values.to(self._dtype)
        return self._rounded(values, draws_at(self._key, index)).to(self._dtype)

    def _rounded(self, values: Tensor, halves: Tensor) -> Tensor:
        """`values` (float32 or float64) at one of their neighbours, still as wide as they were."""
        integer, mantissa, bias = _LAYOUTS[values.dtype]
        magnitude = values.abs()
        overflown = magnitude >= self._row.overflow
        magnitude.clamp_(max=self._row.largest)
        exponent = (magnitude.view(integer) >> mantissa).clamp_(min=self._row.smallest_exponent + bias)
        step = exponent.sub_(self._row.mantissa).bitwise_left_shift_(mantissa).view(values.dtype)
        share = magnitude.div_(step)
        whole = share.floor()
        needed = (halves >> (32 - DRAW_BITS)).to(values.dtype).mul_(-(2.0**-DRAW_BITS)).add_(0.5)
        whole.add_(share.sub_(whole).ge_(needed)).mul_(step)
        if self._row.bits > 8:
            whole.masked_fill_(overflown, torch.inf)
        return whole.copysign_(values)


def _to_bfloat16(values: Tensor, halves: Tensor) -> Tensor:
    """bfloat16 is the upper half of float32: the draw is added to the lower half, which is then cut off."""
    bits = values.view(torch.int32)
    rounded = (halves >> 16).add_(1 << 15).add_(bits).bitwise_and_(_UPPER_HALF).view(torch.float32)
    settled = values.abs() >= DTYPES["BF16"].largest  # nothing but infinity lies beyond, and NaN has no neighbours
    return torch.where(settled | values.isnan(), values, rounded)
