"""Multiply quotient: A times a power of B / C, where A and B changed C in opposite directions.

Source: sd-mecha merge_methods/linear.py, which computes with complex numbers; these are their real parts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge
from bake.merges.powers import cosine, logarithm, power


class MultiplyQuotient(Merge):
    """Re(A (B / C)^(alpha m)), m = max(0, -la lb / max(|la|, |lb|)^2), la = log|A / C|, lb = log|B / C|.

    Models: a, b, c. alpha: any number. Where that is no number, A.
    """

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        log_c = logarithm(c.abs())
        of_a, of_b = logarithm(a.abs()) - log_c, logarithm(b.abs()) - log_c
        largest = torch.maximum(of_a.abs(), of_b.abs())
        opposed = (-(of_a * of_b) / (largest * largest)).nan_to_num(nan=0.0).clamp(min=0)
        exponent = opposed * self.job.number("alpha")
        quotient = b / c
        turned = torch.where(quotient < 0, cosine(exponent * math.pi), 1.0)
        factor = power(quotient.abs(), exponent) * turned
        return torch.where(torch.isnan(factor) & ~torch.isnan(a + b + c), a, a * factor)
