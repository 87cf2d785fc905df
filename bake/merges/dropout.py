"""Dropout: the mean of what chance leaves of each model's difference from the base.

Source: sd-mecha merge_methods/ties.py, `dropout` (n-supermario), at the overlaps that have names: masks that are
`independent` (its overlap 1), `disjoint` (0: every kept element is of one model, any of them with the same chance), or
`shared` by all models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bake.merges.chances import uniform
from bake.merges.merge import Chunk, Merge, differences


class Dropout(Merge):
    """W0 + sum(m d) / max(1, sum(m)) / density^rescale, m = masks of 0 and 1. Models: base, one or more.

    density: above 0 to 1. rescale: any number; 1 keeps the mean, 0 does nothing.
    """

    def blend(self, chunk: Chunk) -> Tensor:
        changes = differences(chunk.models)
        total, kept = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
        for change, mask in zip(changes, self._masks(chunk, len(changes)), strict=True):
            total += torch.where(mask, change, 0.0)
            kept += mask
        scale = float(self.job.number("density") ** self.job.number("rescale"))
        return chunk.models[0] + total / kept.clamp(min=1) / scale

    def _masks(self, chunk: Chunk, count: int) -> list[Tensor]:
        density, overlap = self.job.number("density"), self.job.values["overlap"]
        if overlap == "independent":
            return [uniform(self.job, chunk, place) < density for place in range(count)]
        is_kept = uniform(self.job, chunk, 0) < density
        if overlap == "shared":
            return [is_kept] * count
        chosen = (uniform(self.job, chunk, 1) * count).floor()
        return [torch.logical_and(is_kept, chosen == place) for place in range(count)]
