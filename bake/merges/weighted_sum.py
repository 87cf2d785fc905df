"""Weighted sum: A + alpha * (B - A).

What AUTOMATIC1111, SuperMerger, meh and sd-mecha call weighted sum, written so that equal models stay as they are.
"""

from __future__ import annotations

from torch import Tensor

from bake.merges.merge import Chunk, Merge, between


class WeightedSum(Merge):
    """(1 - alpha) A + alpha B. Models: a, b. alpha: any number."""

    def blend(self, chunk: Chunk) -> Tensor:
        a, b = chunk.models
        return between(a, b, self.job.number("alpha"))
