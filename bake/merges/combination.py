"""Methods whose result is a combination of the models, with coefficients that follow from the models' inner products.

Whatever is iterated on spheres or over distances never leaves the space that the models span, and is known by
its coordinates there: so one pass over the tensor, for the inner products, is enough for any number of steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge, Survey, differences
from bake.merges.sums import Sums, gram, products

Matrix = Sequence[Sequence[float]]


class Combination(Merge):
    """origin + sum(k v): of the models themselves, or where there is a base of their differences from it."""

    def passes(self) -> Iterator[Survey]:
        inner = Sums(self.view[0], lambda chunk: products(self.vectors(chunk)))
        yield inner
        count = len(self.job.roles) - self.has_base
        self._shares = self.shares(gram(inner.total.tolist(), count))

    @abstractmethod
    def shares(self, inner: Matrix) -> Sequence[float]:
        """The coefficient of each vector. inner: the inner products of every two."""

    def vectors(self, chunk: Chunk) -> Sequence[Tensor]:
        """What is combined: (rows, columns) each."""
        return differences(chunk.models) if self.has_base else chunk.models

    def blend(self, chunk: Chunk) -> Tensor:
        total = combined(self.vectors(chunk), self._shares)
        return chunk.models[0] + total if self.has_base else total


def combined(vectors: Sequence[Tensor], shares: Sequence[float | Tensor]) -> Tensor:
    """sum(share * vector), in their order."""
    total = torch.zeros_like(vectors[0])
    for vector, share in zip(vectors, shares, strict=True):
        total += vector * share
    return total


def times(matrix: Matrix, vector: Sequence[float]) -> list[float]:
    """The product of a matrix and a vector."""
    return [math.fsum(one * other for one, other in zip(row, vector, strict=True)) for row in matrix]


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    """The inner product of two vectors of coordinates."""
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def lengths(inner: Matrix) -> list[float]:
    """The length of each vector."""
    return [math.sqrt(inner[place][place]) for place in range(len(inner))]


def cosines(inner: Matrix) -> list[list[float]]:
    """The inner products of the vectors' directions; of a vector of zeros they are 0."""
    sizes = lengths(inner)
    return [
        [inner[i][j] / sizes[i] / sizes[j] if sizes[i] and sizes[j] else 0.0 for j in range(len(inner))]
        for i in range(len(inner))
    ]
