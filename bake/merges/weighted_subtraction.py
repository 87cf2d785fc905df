"""Weighted subtraction: what A was before `alpha * beta` of B was merged into it.

Source: meh sd_meh/merge_methods.py, which nudges beta where alpha * beta is 1; that is an error here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.merges.merge import Chunk, Merge

if TYPE_CHECKING:
    from torch import Tensor


class WeightedSubtraction(Merge):
    """(A - alpha beta B) / (1 - alpha beta). Models: a, b."""

    is_plain = True

    def blend(self, chunk: Chunk) -> Tensor:
        a, b = chunk.models
        share = self.job.number("alpha") * self.job.number("beta")
        return (a - b * share) / (1 - share)
