"""Cosine methods: A where the models' columns point the same way, B where they do not.

cosine_a, cosine_b          SuperMerger's cosineA and cosineB (scripts/mergers/mergers.py): similarities are stretched
                            to the range that those of the whole models have, without the outermost hundredths
add_cosine_a, add_cosine_b  sd-mecha's (merge_methods/cosine.py): similarities as they are

A column is what belongs to one place behind the first axis; a vector is one column. SuperMerger leaves the VAE out.
In all four a larger alpha takes more of B, and 0 is not A.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Job, Merge, Survey, between, column_view
from bake.merges.sums import Sums, row_sums

_TRIMMED = 0.01  # of all similarities, at either end


class _ByColumn(Merge):
    """Two models, blended by the similarity of their columns. Fixed by the method: directions."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.view = column_view(job.shape)

    def passes(self) -> Iterator[Survey]:
        inner = Sums(self.view[0], _inner)
        yield inner
        aa, ab, bb = inner.total.reshape(3, -1)
        self.cosines = _cosine(aa, ab, bb)  # of each column
        if self.job.values["directions"]:  # the columns' lengths do not count
            aa, ab, bb = (aa > 0).double(), self.cosines, (bb > 0).double()
        self.overall = _cosine(*(row_sums(sums.clone().unsqueeze(0)) for sums in (aa, ab, bb)))  # of all, (1,)

    @abstractmethod
    def share_of_a(self) -> Tensor:
        """How much of A is in each column."""

    def blend(self, chunk: Chunk) -> Tensor:
        a, b = chunk.models
        return between(b, a, self.share_of_a().to(a.device))


class Cosine(_ByColumn):
    """k A + (1 - k) B, k = (similarity - lo) / (hi - lo) - alpha, within 0 and 1. Models: a, b. alpha: any number.

    similarity: the mean of the column's cosine and the tensor's; with `directions` of tensors whose columns have
    length 1. lo, hi: the ends of the statistic in all tensors of the models, which is the similarity or, with
    `directions`, the column's cosine. Where they are equal, k = 1 - alpha.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._limits = (0.0, 0.0)

    def statistic(self) -> Tensor:
        """What the limits of the whole models are taken from."""
        return self.cosines if self.job.values["directions"] else (self.cosines + self.overall) / 2

    @classmethod
    def agree(cls, merges: Sequence[Merge]) -> None:
        ours = [merge for merge in merges if isinstance(merge, cls)]
        limits = _limits(torch.cat([merge.statistic() for merge in ours]))
        for merge in ours:
            merge._limits = limits

    def share_of_a(self) -> Tensor:
        similarity = (self.cosines + self.overall) / 2
        low, high = self._limits
        place = (similarity - low) / (high - low) if high > low else torch.ones_like(similarity)
        return (place - self.job.number("alpha")).clamp(0, 1)


class AddCosine(_ByColumn):
    """k A + (1 - k) B, k = similarity - alpha, within 0 and 1. Models: a, b. alpha: any number.

    similarity: the column's cosine, or its mean with the tensor's. Fixed by the method: overall, which of the two.
    """

    def share_of_a(self) -> Tensor:
        similarity = (self.cosines + self.overall) / 2 if self.job.values["overall"] else self.cosines
        return (similarity - self.job.number("alpha")).clamp(0, 1)


def _inner(chunk: Chunk) -> Tensor:
    a, b = chunk.models
    return torch.cat([a * a, a * b, b * b], dim=1)


def _cosine(aa: Tensor, ab: Tensor, bb: Tensor) -> Tensor:
    size = aa.sqrt() * bb.sqrt()
    return torch.where(size == 0, 0.0, ab / size)


def _limits(values: Tensor) -> tuple[float, float]:
    """The smallest and largest of those that are left without the lowest hundredth and then without the highest."""
    values = values.sort().values
    values = values[values >= _percentile(values, _TRIMMED)]
    values = values[values <= _percentile(values, 1 - _TRIMMED)]
    return float(values[0]), float(values[-1])


def _percentile(ordered: Tensor, share: float) -> float:
    """The number at this share of the way through, or the mean of the two next to it (NumPy's `midpoint`)."""
    place = share * (len(ordered) - 1)
    low = int(place)
    return float(ordered[low] + ordered[min(low + (place > low), len(ordered) - 1)]) / 2
