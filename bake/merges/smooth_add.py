"""Smooth add: add what B learned from C, smoothed over neighbouring places of the tensor.

Source: SuperMerger scripts/mergers/mergers.py, `smoothAdd`: SciPy's median_filter(size=3) and gaussian_filter(sigma=1),
over all axes, so that the order of the channels matters. Both mirror the tensor at its ends.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge

_RADIUS = 4  # SciPy ends a Gaussian after 4 sigma
_WINDOWS = 8 * 1024 * 1024  # numbers in the windows of which the medians are taken at a time


class SmoothAdd(Merge):
    """A + alpha * gaussian(median(B - C)). Models: a, b, c. alpha: any number."""

    whole = True

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        shape = [size for size in self.job.shape if size > 1] or [1]  # along other axes there are no neighbours
        smooth = _gaussian(_median((b - c).reshape(shape)))
        return a + smooth.reshape(a.shape) * self.job.number("alpha")


def _median(values: Tensor) -> Tensor:
    """The median of each element and all its neighbours, along every axis."""
    axes = values.dim()
    step = max(1, _WINDOWS * len(values) // (3**axes * values.numel()))
    rows = []
    for first in range(0, len(values), step):
        places = torch.arange(first, min(len(values), first + step))
        windows = []
        for shifts in itertools.product((-1, 0, 1), repeat=axes):
            window = _at(values, 0, places + shifts[0])
            for axis in range(1, axes):
                window = _at(window, axis, torch.arange(values.shape[axis]) + shifts[axis])
            windows.append(window)
        rows.append(torch.stack(windows).median(dim=0).values)
    return torch.cat(rows)


def _gaussian(values: Tensor) -> Tensor:
    """Weighted means over 9 places along one axis after the other."""
    bell = [math.exp(-(place**2) / 2) for place in range(_RADIUS + 1)]
    total = bell[0] + 2 * sum(bell[1:])
    for axis, size in enumerate(values.shape):
        places = torch.arange(size)
        smooth = values * (bell[0] / total)
        for distance in range(1, _RADIUS + 1):
            around = _at(values, axis, places - distance) + _at(values, axis, places + distance)
            smooth += around * (bell[distance] / total)
        values = smooth
    return values


def _at(values: Tensor, axis: int, places: Tensor) -> Tensor:
    """The slices at these places of an axis, which goes on mirrored at both ends: c b a | a b c | c b a."""
    size = values.shape[axis]
    places = places % (2 * size)
    places = torch.minimum(places, 2 * size - 1 - places)
    return values.index_select(axis, places.to(values.device))
