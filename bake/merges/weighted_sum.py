"""Weighted sum: A + alpha * (B - A).

What AUTOMATIC1111, SuperMerger, meh and sd-mecha call weighted sum, written so that equal models stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.merges.merge import Chunk, Merge, between

if TYPE_CHECKING:
    from torch import Tensor


class WeightedSum(Merge):
    """(1 - alpha) A + alpha B. Models: a, b. alpha: any number."""

    is_plain = True

    def blend(self, chunk: Chunk) -> Tensor:
        a, b = chunk.models
        return between(a, b, self.job.number("alpha"))
