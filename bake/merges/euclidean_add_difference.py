"""Euclidean add difference: each element as far from C as a circle through what A and B made of it would have it.

Source: meh sd_meh/merge_methods.py. |q| needs no pass of its own: the squares of q add up to those of u and v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from bake.merges.merge import Chunk, Merge, Survey, between
from bake.merges.sums import Sums, gram, products


class EuclideanAddDifference(Merge):
    """C + q / |q| |s|: s = the weighted sum of A and B by alpha, less C; q = sqrt((1 - alpha) u^2 + alpha v^2) with
    the sign of s; u, v = the directions of A - C and B - C. Models: a, b, c. alpha: 0 to 1.
    """

    def passes(self) -> Iterator[Survey]:
        inner = Sums(self.view[0], lambda chunk: products(_changes(chunk)))
        yield inner
        (aa, ab), (_, bb) = gram(inner.total.tolist(), 2)
        alpha = self.job.number("alpha")
        self._a, self._b = ((1 - alpha) / aa if aa else 0.0), (alpha / bb if bb else 0.0)
        size = math.sqrt((1 - alpha if aa else 0.0) + (alpha if bb else 0.0))
        square = (1 - alpha) ** 2 * aa + 2 * alpha * (1 - alpha) * ab + alpha**2 * bb
        self._scale = math.sqrt(max(0.0, square)) / size if size else 0.0

    def blend(self, chunk: Chunk) -> Tensor:
        of_a, of_b = _changes(chunk)
        size = (of_a * of_a * self._a + of_b * of_b * self._b).sqrt()
        toward = between(of_a, of_b, self.job.number("alpha"))
        return chunk.models[2] + toward.sign() * size * self._scale


def _changes(chunk: Chunk) -> list[Tensor]:
    a, b, c = chunk.models
    return [a - c, b - c]
