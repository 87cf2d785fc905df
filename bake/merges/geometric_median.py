"""Geometric median: the point with the smallest sum of distances to the models, by Weiszfeld's steps.

Source: sd-mecha merge_methods/ties.py (after krishnap25/geom_median). Its steps are made on coordinates here, after one
pass over the tensor for the inner products of the differences from the first model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from bake.merges.combination import Combination, Matrix, combined, dot, times
from bake.merges.merge import Chunk


class GeometricMedian(Combination):
    """sum(w W) / sum(w), w = 1 / max(|W - m|, eps), repeated until m stays. Models: two or more.

    eps: a smaller distance counts as this. maxiter: steps at most. ftol: the relative change of the sum of
    distances that ends it.
    """

    def vectors(self, chunk: Chunk) -> Sequence[Tensor]:
        return [model - chunk.models[0] for model in chunk.models]

    def shares(self, inner: Matrix) -> Sequence[float]:
        eps, ftol = self.job.number("eps"), self.job.number("ftol")
        count = len(inner)
        shares = [1 / count] * count
        distances = _distances(inner, shares)
        total = math.fsum(distances)
        for _ in range(int(self.job.number("maxiter"))):
            weights = [1 / max(distance, eps) for distance in distances]
            shares = [weight / math.fsum(weights) for weight in weights]
            distances, before = _distances(inner, shares), total
            total = math.fsum(distances)
            if abs(before - total) <= ftol * total:
                break
        return shares

    def blend(self, chunk: Chunk) -> Tensor:
        return chunk.models[0] + combined(self.vectors(chunk), self._shares)


def _distances(inner: Matrix, shares: Sequence[float]) -> list[float]:
    """How far each vector is from the combination of all by the `shares`, which add up to 1."""
    along = times(inner, shares)
    middle = dot(shares, along)
    return [math.sqrt(max(0.0, inner[i][i] - 2 * along[i] + middle)) for i in range(len(inner))]
