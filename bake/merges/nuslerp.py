"""NuSlerp: slerp of two models or of their differences from a base, of whole tensors, rows or columns.

Source: mergekit merge_methods/nuslerp.py. `along=tensor` is its nuslerp_flatten, `row` nuslerp_flatten=false, `column`
nuslerp_row_wise=true. A row is what belongs to one index of the first axis; mergekit takes the last axis alone, which
is the same for matrices. A vector is one row and one column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bake.merges.combination import Combination, Matrix, combined
from bake.merges.linear import added_up
from bake.merges.merge import Chunk, Job, Survey, column_view
from bake.merges.slerp import arc
from bake.merges.sums import Sums, products


class NuSlerp(Combination):
    """Slerp by the share of the second weight in both. Models: [base], two. along: tensor, row or column."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        weights = job.numbers("weight")
        self._share = weights[1] / added_up(weights)
        self._along = job.values["along"]
        if self._along == "column":
            self.view = column_view(job.shape)

    def passes(self) -> Iterator[Survey]:
        if self._along == "tensor":
            yield from super().passes()
        elif self._along == "column":
            inner = Sums(self.view[0], self._by_column)
            yield inner
            self._columns = self._arcs(inner.total.reshape(3, -1))

    def shares(self, inner: Matrix) -> Sequence[float]:
        return self._arc(inner[0][0], inner[0][1], inner[1][1])

    def blend(self, chunk: Chunk) -> Tensor:
        if self._along == "tensor":
            return super().blend(chunk)
        vectors = self.vectors(chunk)
        if self._along == "row":
            shares = [share.unsqueeze(1) for share in self._arcs(products(vectors).T)]
        else:
            shares = list(self._columns)
        total = combined(vectors, [share.to(vectors[0].device) for share in shares])
        return chunk.models[0] + total if self.has_base else total

    def _arc(self, aa: float, ab: float, bb: float) -> tuple[float, float]:
        return arc(aa, ab, bb, self._share) or (1 - self._share, self._share)

    def _by_column(self, chunk: Chunk) -> Tensor:
        one, other = self.vectors(chunk)
        return torch.cat([one * one, one * other, other * other], dim=1)

    def _arcs(self, inner: Tensor) -> Sequence[Tensor]:
        """The coefficients of both vectors for each of n pairs. inner: (3, n), as `products` orders them."""
        found = [self._arc(aa, ab, bb) for aa, ab, bb in inner.T.tolist()]
        return torch.tensor(found, dtype=torch.float64).T.unbind()
