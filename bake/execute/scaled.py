"""Scaled fp8: weights that count times a scale, and new scales that fit the largest of the new values.

The new scale is `largest |value| / largest of the dtype`, as float32; an element is the value divided by that, in
float64, rounded once. The largest value has to be known first, so the rows are gone over twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bake.dtypes import DTYPES, SMALLEST_SCALE
from bake.execute.chunk import Chunk, chunk_height
from bake.execute.compute import Work, survival_of
from bake.execute.device import Desk
from bake.execute.rounding import SPREAD, UNIT, Nearest, Rounding, differing, put, settle, settle_wide
from bake.execute.survival import Survival, sampled
from bake.io.fileset import FileSet
from bake.io.payload import as_bytes
from bake.keys.factors import as_matrix
from bake.plan.model import Rescaling

_MARGIN = 1 + 2.0**-10  # for the rounding of a bound that is divided by a scale in float32


class Rescaled(Work):
    """What another work makes of a tensor, divided by a new scale before it is rounded."""

    def __init__(self, inner: Work, rescaling: Rescaling, files: FileSet, rounding: Rounding) -> None:
        """Go over the whole tensor once for its scales. Raises NonFinite as `fuse`."""
        super().__init__(inner.plan, files, inner.device, rounding)
        self.has_free_grid = inner.has_free_grid
        self._inner = inner
        self._by_row = rescaling.by_row
        peaks = self._survey()
        self._scales = (peaks / DTYPES[self.plan.dtype].largest).to(torch.float32).clamp_min_(SMALLEST_SCALE)

    @property
    def scale_bytes(self) -> memoryview:
        """What is stored as the scale."""
        return as_bytes(self._scales.cpu())

    def _survey(self) -> Tensor:
        """The largest magnitude of each row, or of all: (rows, 1) or (1, 1), float64, on the device."""
        plan, found = self.plan, []
        height, width = as_matrix(plan.view)
        step = chunk_height(width)
        for first in range(0, height, step):
            chunk = Chunk(first, min(height, first + step), width)
            raw = self._inner.base(range(chunk.first, chunk.last))
            values, slack = self._inner.interval(raw, chunk)
            if not bool(torch.isfinite(values).all()):
                self._inner.refuse(raw, chunk)
            found.append(self._peaks(values, slack, raw, chunk))
        if self._by_row:
            return torch.cat(found)
        return torch.stack(found).amax(0) if found else torch.zeros(1, 1, dtype=torch.float64)

    def _peaks(self, values: Tensor, slack: Tensor | None, raw: Tensor, chunk: Chunk) -> Tensor:
        """The same for one chunk. Where values are known with a bound, those that may be the largest are computed."""
        size = values.abs()
        axes = (1,) if self._by_row else (0, 1)
        peaks = size.amax(axes, keepdim=True)
        if slack is None or not size.numel():
            return peaks.to(torch.float64)
        reach = slack.amax(axes, keepdim=True) * (2 * SPREAD * _MARGIN)
        places = (size >= peaks * (1 - UNIT) - reach).view(-1).nonzero().view(-1)
        exact = self._inner.exactly(places, raw, chunk).abs()
        rows = torch.div(places, chunk.columns, rounding_mode="floor") if self._by_row else torch.zeros_like(places)
        largest = torch.zeros(peaks.numel(), dtype=torch.float64, device=exact.device)
        return largest.scatter_reduce_(0, rows, exact, "amax").view(peaks.shape)

    def _fuse(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk) -> Survival:
        values, slack = self._inner.interval(raw, chunk)
        scales = self._divisors(chunk)
        near, other = desk.computed("near", torch.float32, raw.shape), desk.computed("other", out.dtype, raw.shape)
        first = chunk.first * chunk.columns
        if slack is None:
            settle_wide(values / scales, near, self._rounding, out, other, first)
        else:
            short = scales.to(torch.float32)
            torch.div(values, short, out=near)
            slack.div_(short).mul_(_MARGIN).add_(near.abs())
            settle(near, slack, self._rounding, out, other, first)
            places = differing(out, other)
            exact = self._inner.exactly(places, raw, chunk) / scales.expand(raw.shape).reshape(-1)[places]
            put(out, places, self._rounding.narrow_each(exact, places + first))
        return self._survival(values, raw, out, scales, sampled(chunk.first))

    def _survival(self, values: Tensor, raw: Tensor, out: Tensor, scales: Tensor, some: slice) -> Survival:
        """What survived in `some` rows of the chunk.

        The base counts as it is stored: with its own scale, else as it would be with the new one.
        """
        scales = scales[some] if self._by_row else scales
        before = raw[some].to(torch.float64)
        if self.plan.scale is None:
            stored = torch.empty(before.shape, dtype=out.dtype, device=out.device)
            Nearest(self.plan.dtype).narrow((before / scales).to(torch.float32), stored, 0)
            before = stored.to(torch.float64) * scales
        return survival_of(values[some] - raw[some], out[some].to(torch.float64) * scales - before)

    def _values(self, raw: Tensor, chunk: Chunk) -> Tensor:
        values, _ = self._inner.interval(raw, chunk)
        return values / self._divisors(chunk)

    def _clamped(self, raw: Tensor, out: Tensor, chunk: Chunk) -> int:
        return 0  # the scale is made so that there are none

    def _divisors(self, chunk: Chunk) -> Tensor:
        """The scales of the chunk's rows in float64, to be broadcast over them."""
        return (self._scales[chunk.first : chunk.last] if self._by_row else self._scales).to(torch.float64)
