"""Extract features: what two models learned from a base in common, or what only one of them did.

Source: SuperMerger scripts/mergers/mergers.py, `extract_super` ("extract").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Job, Merge, between
from bake.merges.powers import power
from bake.merges.sums import row_sums


class ExtractFeatures(Merge):
    """A + lerp(B - A, C - A, alpha) * lerp(s, 1 - s, beta), s = ((cos + 1) / 2)^gamma, the cosine along the last axis.

    Models: a, b, c. alpha, beta: 0 to 1; beta 0 keeps what both share, 1 what differs. gamma: from 0.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.view = (math.prod(job.shape[:-1]), job.shape[-1]) if job.shape else (1, 1)

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        of_b, of_c = b - a, c - a
        size = row_sums(of_b * of_b).sqrt() * row_sums(of_c * of_c).sqrt()
        cosine = torch.where(size == 0, 0.0, row_sums(of_b * of_c) / size).clamp(-1, 1)
        alike = power((cosine + 1) / 2, self.job.number("gamma")).unsqueeze(1)
        share = between(alike, 1 - alike, self.job.number("beta"))
        return a + between(of_b, of_c, self.job.number("alpha")) * share
