"""Triple sum: (1 - alpha - beta) A + alpha B + beta C.

Source: meh sd_meh/merge_methods.py; "Triple" of SuperMerger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.merges.merge import Chunk, Merge

if TYPE_CHECKING:
    from torch import Tensor


class TripleSum(Merge):
    """A + alpha (B - A) + beta (C - A). Models: a, b, c. alpha, beta: any numbers."""

    is_plain = True

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        return a + ((b - a) * self.job.number("alpha") + (c - a) * self.job.number("beta"))
