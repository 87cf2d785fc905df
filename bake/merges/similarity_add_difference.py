"""Similarity add difference: a weighted sum where A and B are alike, an added difference where they are not.

Source: meh sd_meh/merge_methods.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge, between


class SimilarityAddDifference(Merge):
    """(1 - k) (A + alpha (B - C)) + k (A + alpha / 2 (B - A)), k = beta (A B / max(|A|, |B|)^2 + 1) / 2.

    Models: a, b, c. alpha: any number. beta: 0 to 1. Where A and B are 0, k = beta.
    """

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        alpha, beta = self.job.number("alpha"), self.job.number("beta")
        largest = torch.maximum(a.abs(), b.abs())
        # One factor after the other: the square of a small number might be 0.
        alike = torch.where(largest == 0, 1.0, (a / largest) * (b / largest))
        return between(a + (b - c) * alpha, between(a, b, alpha / 2), (alike + 1) / 2 * beta)
