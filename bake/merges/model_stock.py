"""Model stock: from the base toward the mean of the models, less far the more their directions differ.

Source: arXiv:2403.19522; mergekit merge_methods/model_stock.py, without its smallest product of norms of 1e-6, which
makes short differences look perpendicular. sd-mecha takes neighbouring pairs along the last axis only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge, Survey, differences
from bake.merges.sums import Sums, place_of, products

_SMALLEST_DIVISOR = 1e-12


class ModelStock(Merge):
    """W0 + t (mean(W) - W0), t = N cos / (1 + (N - 1) cos), cos = the mean of the cosines of every two differences.

    Models: base, two or more. filter_wise: by row instead of tensor. Where the differences cancel out, so that
    t has no bound, t is 0.
    """

    def passes(self) -> Iterator[Survey]:
        if not self.job.values["filter_wise"]:
            inner = Sums(self.view[0], lambda chunk: products(differences(chunk.models)))
            yield inner
            self._share = float(self._shares(inner.total.unsqueeze(0)))

    def blend(self, chunk: Chunk) -> Tensor:
        changes = differences(chunk.models)
        share: Tensor | float
        share = self._shares(products(changes)).unsqueeze(1) if self.job.values["filter_wise"] else self._share
        total = torch.zeros_like(changes[0])
        for change in changes:
            total += change
        return chunk.models[0] + total / len(changes) * share

    def _shares(self, inner: Tensor) -> Tensor:
        """t of each of n sets of vectors: (n,). inner: (n, pairs), from `products`."""
        count = len(self.job.roles) - 1
        total = torch.zeros_like(inner[:, 0])
        for i in range(count):
            for j in range(i):
                size = (inner[:, place_of(i, i)]).sqrt() * inner[:, place_of(j, j)].sqrt()
                total += torch.where(size == 0, 0.0, inner[:, place_of(i, j)] / size).clamp(-1, 1)
        cosine = total / (count * (count - 1) / 2)
        divisor = cosine * (count - 1) + 1
        return torch.where(divisor < _SMALLEST_DIVISOR, 0.0, cosine * count / divisor)
