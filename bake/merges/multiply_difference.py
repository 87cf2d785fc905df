"""Multiply difference: the geometric mean of what A and B made of C.

Source: meh sd_meh/merge_methods.py.
"""

from __future__ import annotations

from torch import Tensor

from bake.merges.merge import Chunk, Merge, between
from bake.merges.powers import power


class MultiplyDifference(Merge):
    """C + sign(s) |A - C|^(1 - alpha) |B - C|^alpha, s = the weighted sum of A and B by beta, less C.

    Models: a, b, c. alpha: 0 to 1. beta: any number.
    """

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        alpha = self.job.number("alpha")
        size = power((a - c).abs(), 1 - alpha) * power((b - c).abs(), alpha)
        return c + (between(a, b, self.job.number("beta")) - c).sign() * size
