"""BOFT of PEFT: input columns are rotated in blocks, several times over shuffled columns; rows are scaled.

S = (X - X^T) / 2,  R = (I - S)(I + S)^-1,  T = T_last ... T_1 T_0,  T_i = P_i blockdiag(R_i) P_i^T
W1 = boft_s * (W T^T),  W' = s W1 + (1 - s) W

P_i works within every 2^i b columns, on pieces of b/2: the pieces with even numbers first, then the odd
ones. PEFT knows no strength; in between, bake goes straight from the old weight to the new one. The bias
is neither rotated nor scaled.
"""

from __future__ import annotations

import math

from torch import Tensor

from bake.adapters.rotations import cayley, multiply_columns, skew, square_blocks
from bake.adapters.rows import part


class Transform:
    """BOFT on input columns. Source: arXiv:2311.06243; PEFT tuners/boft/layer.py."""

    block: int = 1

    def __init__(self, boft_r: Tensor, boft_s: Tensor, *, shape: tuple[int, ...], strength: float) -> None:
        """Prepare the rotations, in the dtype of `boft_r`.

        boft_r: (stages, n, b, b), n * b = in * kernel. boft_s: (out, 1), of a convolution (1, out).
        shape: of the weight tensor. strength: what the user typed.
        Raises ValueError if the factors contradict each other.
        """
        count, size = square_blocks("boft_r", boft_r, 4)
        stages, columns = len(boft_r), math.prod(shape[1:])
        if count * size != columns:
            raise ValueError(f"{count} blocks of {size} columns do not make up the {columns} columns of the weight")
        if stages > 1 and (size % 2 or columns % (size << (stages - 1))):
            raise ValueError(f"{stages} stages of blocks of {size} columns cannot shuffle {columns} columns")
        if boft_s.numel() != shape[0]:
            raise ValueError(f"boft_s {list(boft_s.shape)} does not have one number for each of {shape[0]} rows")
        self._strength = strength
        self._stages = cayley(skew(boft_r) / -2).transpose(-1, -2)
        self._scales = strength * boft_s.reshape(-1, 1)

    def apply(self, weight: Tensor, rows: range) -> None:
        """Overwrite the rows `rows` of the weight, (len(rows), in * kernel), with their new values."""
        if self._strength == 0:
            return
        new = weight
        for stage, blocks in enumerate(self._stages):
            if stage == 0:  # nothing is shuffled yet, and the blocks may be of odd size
                new = multiply_columns(new, blocks)
                continue
            pieces, pairs = blocks.shape[-1] // 2, 1 << stage
            new = new.reshape(len(rows), -1, 2, pairs, pieces).transpose(2, 3).reshape(weight.shape)
            new = multiply_columns(new, blocks)
            new = new.reshape(len(rows), -1, pairs, 2, pieces).transpose(2, 3).reshape(weight.shape)
        weight.mul_(1 - self._strength).addcmul_(new, part(self._scales, rows))
