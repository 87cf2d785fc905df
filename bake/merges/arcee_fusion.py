"""Arcee fusion: B where it differs from the base in ways that matter, the base elsewhere.

Source: mergekit merge_methods/arcee_fusion.py, which takes the quantiles of large tensors from a random million of
their elements; here they are exact. A row is what belongs to one index of the first axis; mergekit's is the last axis,
which is the same for matrices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge, Survey
from bake.merges.powers import exponential, logarithm
from bake.merges.ranks import Ranks
from bake.merges.sums import row_sums

_EPSILON = 1e-8


class ArceeFusion(Merge):
    """B where its importance is at least the median + 1.5 times the interquartile range, else W0. Models: base, b.

    importance = |B - W0| KL(softmax(B) || softmax(W0)), the divergence of the element's row.
    """

    def passes(self) -> Iterator[Survey]:
        last = self.view[0] * self.view[1] - 1
        quartiles = Ranks([(_importance, int(share * last)) for share in (0.25, 0.5, 0.75)])
        yield from quartiles.passes()
        low, middle, high = quartiles.found
        self._least = middle + 1.5 * (high - low)

    def blend(self, chunk: Chunk) -> Tensor:
        return torch.where(_importance(chunk) >= self._least, chunk.models[1], chunk.models[0])


def _importance(chunk: Chunk) -> Tensor:
    base, other = chunk.models
    p, q = _softmax(other) + _EPSILON, _softmax(base) + _EPSILON
    divergence = row_sums(p * logarithm(p / q)).clamp(min=0)
    return (other - base).abs() * divergence.unsqueeze(1)


def _softmax(values: Tensor) -> Tensor:
    powers = exponential(values - values.amax(dim=1, keepdim=True))
    return powers / row_sums(powers.clone()).unsqueeze(1)
