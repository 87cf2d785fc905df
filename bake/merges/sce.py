"""SCE: select the elements on which the models differ most, calculate a weight for each, erase minority signs.

Source: arXiv:2408.07990; mergekit merge_methods/sce.py, whose weights are all equal as soon as the mean squares of the
differences add up to less than 1e-6, as they do for most fine-tunes; here only if there are no differences.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge, Survey, differences
from bake.merges.ranks import Ranks
from bake.merges.sums import Sums, row_sums
from bake.merges.task_vectors import agreed


class Sce(Merge):
    """W0 + sum(w d) / sum(w) over the models with the majority's sign, w = the share of the model's squares.

    Models: base, one or more. select_topk: the share of the elements of which the models' variance is not 0 that
    count, those of largest variance; equal ones count together.
    """

    def passes(self) -> Iterator[Survey]:
        self._least: float | None = 0.0
        share = self.job.number("select_topk")
        if share < 1:
            varied = Sums(self.view[0], lambda chunk: row_sums((_variance(chunk) > 0).double()).unsqueeze(1))
            yield varied
            count = int(int(varied.total) * share)
            self._least = None
            if count:
                search = Ranks([(_variance, self.view[0] * self.view[1] - count)])
                yield from search.passes()
                (self._least,) = search.found
        squares = Sums(self.view[0], self._squares)
        yield squares
        sizes = squares.total.tolist()
        total = sum(sizes)
        self._weights = tuple(size / total if total else 1 / len(sizes) for size in sizes)

    def blend(self, chunk: Chunk) -> Tensor:
        changes = self._selected(chunk)
        weighted = [change * weight for change, weight in zip(changes, self._weights, strict=True)]
        return chunk.models[0] + agreed(weighted, self._weights, changes, normalize=True)

    def _selected(self, chunk: Chunk) -> list[Tensor]:
        changes = differences(chunk.models)
        if self._least == 0:
            return changes
        if self._least is None:
            return [torch.zeros_like(change) for change in changes]
        is_selected = _variance(chunk) >= self._least
        return [torch.where(is_selected, change, 0.0) for change in changes]

    def _squares(self, chunk: Chunk) -> Tensor:
        return torch.stack([row_sums(change * change) for change in self._selected(chunk)], dim=1)


def _variance(chunk: Chunk) -> Tensor:
    """How far the models lie apart at each element."""
    changes = differences(chunk.models)
    mean = torch.zeros_like(changes[0])
    for change in changes:
        mean += change
    mean /= len(changes)
    squares = torch.zeros_like(mean)
    for change in changes:
        squares += (change - mean) * (change - mean)
    return squares / len(changes)
