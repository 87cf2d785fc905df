"""Sum twice: a weighted sum of A and B, and of that and C.

Source: meh sd_meh/merge_methods.py; "Twice" of SuperMerger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.merges.merge import Chunk, Merge, between

if TYPE_CHECKING:
    from torch import Tensor


class SumTwice(Merge):
    """(1 - beta) ((1 - alpha) A + alpha B) + beta C. Models: a, b, c. alpha, beta: any numbers."""

    is_plain = True

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        return between(between(a, b, self.job.number("alpha")), c, self.job.number("beta"))
