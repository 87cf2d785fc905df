"""RAM and RAM+: elements that one model changed are taken as they are, those of several averaged.

Source: arXiv:2601.13572; mergekit merge_methods/ram.py (`ram`, `ramplus_tl`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge, Survey, differences
from bake.merges.sums import Sums, row_sums


class Ram(Merge):
    """W0 + the mean of the differences larger than epsilon of each element. Models: base, others. epsilon: from 0."""

    def blend(self, chunk: Chunk) -> Tensor:
        changes, touched, count = self.touched(chunk)
        total = torch.zeros_like(chunk.models[0])
        for place, (change, is_touched) in enumerate(zip(changes, touched, strict=True)):
            share = torch.where(count == 1, self.boost(place), 1 / count)
            total += torch.where(is_touched, change * share, 0.0)
        return chunk.models[0] + total

    def boost(self, place: int) -> float:
        """By how much a change that no other model made is multiplied."""
        return 1.0

    def touched(self, chunk: Chunk) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(differences from the base, where they count, how many count at each element)."""
        changes = differences(chunk.models)
        touched = [change.abs() > self.job.number("epsilon") for change in changes]
        count = torch.zeros_like(chunk.models[0])
        for is_touched in touched:
            count += is_touched
        return changes, touched, count


class RamPlus(Ram):
    """RAM, with a model's own changes multiplied by 1 + r min(rho, alpha), rho = its shared by its own elements.

    r: any number. alpha: from 0.
    """

    def passes(self) -> Iterator[Survey]:
        counts = Sums(self.view[0], self._counts)
        yield counts
        own, shared = counts.total.reshape(2, -1).tolist()
        r, alpha, epsilon = (self.job.number(name) for name in ("r", "alpha", "epsilon"))
        ratios = (here / max(there, epsilon) if here else 0.0 for here, there in zip(shared, own, strict=True))
        self._boosts = [1 + r * min(ratio, alpha) for ratio in ratios]

    def boost(self, place: int) -> float:
        return self._boosts[place]

    def _counts(self, chunk: Chunk) -> Tensor:
        """In each row: each model's changed elements of its own, then those that others changed too."""
        _, touched, count = self.touched(chunk)
        own = [row_sums((is_touched & (count == 1)).to(count.dtype)) for is_touched in touched]
        shared = [row_sums((is_touched & (count > 1)).to(count.dtype)) for is_touched in touched]
        return torch.stack(own + shared, dim=1)
