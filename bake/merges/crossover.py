"""Crossovers: the low frequencies of A with the high ones of B.

`crossover` sees a tensor as a picture of as many dimensions as it has axes (sd-mecha merge_methods/crossover.py);
`distribution_crossover` as a signal, its elements in the order of C's values (meh sd_meh/merge_methods.py). Filters are
linear, so it is B - A that is filtered and added to A: equal elements of equal models stay as they are. Transforms are
NumPy's, on the processor, so that they do not depend on the device. At a tilt of exactly 2 sd-mecha cuts at 1 - alpha,
where the tilts around it, and this, cut at alpha.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bake.merges.merge import Chunk, Merge

_Array = NDArray[np.float64]


class Crossover(Merge):
    """A + the high frequencies of B - A, the share `alpha` of all. Models: a, b. alpha: 0 to 1.

    tilt: 0 to 4, how the filter leans: 0 cuts, 1 is a weighted sum, 2 the cut the other way round.
    """

    whole = True

    def blend(self, chunk: Chunk) -> Tensor:
        a, b = chunk.models
        shape = self.job.shape or (1,)
        change = (b - a).cpu().numpy().reshape(shape)
        axes = range(len(shape))
        spectrum = np.fft.rfftn(change, axes=axes) * _filter(shape, self.job.number("alpha"), self.job.number("tilt"))
        return _added(a, np.fft.irfftn(spectrum, s=shape, axes=axes))


class DistributionCrossover(Merge):
    """A + the frequencies of B - A from `cut` on, in the order of C's values. Models: a, b, c. cut: 0 to 1.

    slope: from 0, the width of the passage; 0 cuts.
    """

    whole = True

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        order = c.reshape(-1).sort(stable=True).indices.cpu().numpy()
        change = (b - a).cpu().numpy().reshape(-1)[order]
        spectrum = np.fft.rfft(change)
        place = np.arange(len(spectrum)) / len(spectrum)
        cut, slope = self.job.number("cut"), self.job.number("slope")
        share = np.clip((place - cut) / slope + 0.5, 0, 1) if slope > 0 else place >= cut
        filtered = np.empty_like(change)
        filtered[order] = np.fft.irfft(spectrum * share, n=len(change))
        return _added(a, filtered)


def _added(a: Tensor, change: _Array) -> Tensor:
    return a + torch.from_numpy(np.ascontiguousarray(change)).reshape(a.shape).to(a.device)


def _filter(shape: tuple[int, ...], alpha: float, tilt: float) -> _Array:
    """B's share of each frequency of a real transform.

    By the frequency's height, 0 to 1, and B's share of it the filter is a line through the unit square, which is
    tilted about the origin and then moved until it passes (1 - alpha, alpha).
    """
    height = _heights(shape)
    tilt %= 4
    if tilt > 2:  # the other way round, of the complement
        return 1 - _line(height, 1 - alpha, tilt)
    return _line(height, alpha, tilt)


def _line(height: _Array, alpha: float, tilt: float) -> _Array:
    if tilt == 0:
        return (height > 1 - alpha).astype(float)
    if tilt == 2:
        return (height < alpha).astype(float)
    steep = 1 / math.tan(math.pi * tilt / 2) if tilt % 2 != 1 else 0.0
    if tilt % 2 <= 1:
        return np.clip(height * steep + alpha * steep + alpha - steep, 0, 1)
    return np.clip(height * steep - alpha * steep + alpha, 0, 1)


def _heights(shape: tuple[int, ...]) -> _Array:
    """Of each frequency, as a share of the highest one: the root of the mean square over the axes."""
    squares = np.zeros((*shape[:-1], shape[-1] // 2 + 1))
    for axis, size in enumerate(shape):
        found = np.fft.fftfreq(size) if axis < len(shape) - 1 else np.fft.rfftfreq(size)
        highest = size // 2
        share = np.abs(found * size) / highest if highest else np.abs(found)
        squares += (share**2).reshape([-1 if place == axis else 1 for place in range(len(shape))])
    return np.sqrt(squares / len(shape))
