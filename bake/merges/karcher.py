"""Karcher mean: the direction whose arcs to the models' directions have the smallest squares, at the mean length.

Source: mergekit merge_methods/karcher.py. Its steps are made on coordinates here, after one pass over the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bake.merges.combination import Combination, Matrix, cosines, dot, lengths, times

_SMALLEST_SINE = 1e-12


class KarcherMean(Combination):
    """The Karcher mean on the sphere, times the mean of the lengths. Models: two or more.

    max_iter: steps at most. tol: arcs and steps below it are none, and models shorter than it have no direction;
    if none has one, the result is 0.
    """

    def shares(self, inner: Matrix) -> Sequence[float]:
        tolerance = self.job.number("tol")
        sizes = lengths(inner)
        long_ones = [place for place, size in enumerate(sizes) if size > tolerance]
        if not long_ones:
            return [0.0] * len(sizes)
        between = cosines(inner)
        mean = _mean([[between[i][j] for j in long_ones] for i in long_ones], tolerance, self.job.number("max_iter"))
        scale = math.fsum(sizes) / len(sizes)
        found = dict(zip(long_ones, mean, strict=True))
        return [scale * found[place] / size if place in found else 0.0 for place, size in enumerate(sizes)]


def _mean(cosines: Matrix, tolerance: float, steps: float) -> list[float]:
    """The mean of some directions as coefficients of them. cosines: of every two of them."""
    count = len(cosines)
    mean = [1 / count] * count
    length = _length(mean, cosines)
    mean = [1.0] + [0.0] * (count - 1) if length < tolerance else [share / length for share in mean]
    for _ in range(int(steps)):
        step = [0.0] * count
        for place, cosine in enumerate(times(cosines, mean)):
            cosine = max(-1.0, min(1.0, cosine))
            angle, sine = math.acos(cosine), math.sqrt((1 - cosine) * (1 + cosine))
            if angle < tolerance or sine < _SMALLEST_SINE:  # it is there, or opposite, where no arc is the shortest
                continue
            step = [share - angle / sine / count * cosine * old for share, old in zip(step, mean, strict=True)]
            step[place] += angle / sine / count
        length = _length(step, cosines)
        if length < tolerance:
            break
        turn = math.sin(length) / length
        mean = [math.cos(length) * old + turn * share for old, share in zip(mean, step, strict=True)]
        length = _length(mean, cosines)
        mean = [share / length for share in mean]
    return mean


def _length(shares: Sequence[float], cosines: Matrix) -> float:
    return math.sqrt(max(0.0, dot(shares, times(cosines, shares))))
