"""Geometric sum: A^(1 - alpha) * B^alpha, of which the real part is taken where numbers are negative.

Source: sd-mecha merge_methods/linear.py, which computes with complex numbers; these are their real parts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge
from bake.merges.powers import power


class GeometricSum(Merge):
    """Re(A^(1 - alpha) B^alpha). Models: a, b. alpha: 0 to 1."""

    def blend(self, chunk: Chunk) -> Tensor:
        a, b = chunk.models
        alpha = self.job.number("alpha")
        size = power(a.abs(), 1 - alpha) * power(b.abs(), alpha)
        # The angle of a negative number is pi; a power multiplies it, and angles of factors add up.
        both, only_a, only_b = -size, size * math.cos(math.pi * (1 - alpha)), size * math.cos(math.pi * alpha)
        return torch.where(a < 0, torch.where(b < 0, both, only_a), torch.where(b < 0, only_b, size))
