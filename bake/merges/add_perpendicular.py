"""Add perpendicular: add to A the part of what B learned that A did not.

Source: sd-mecha merge_methods/wrappers.py and linear.py. Where A learned nothing, all of B - C is new, and is added;
sd-mecha adds nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bake.merges.clipping import clipped
from bake.merges.merge import Chunk, Merge, Survey
from bake.merges.sums import Sums, row_sums


class AddPerpendicular(Merge):
    """A + alpha (dB - dA <dA, dB> / |dA|^2), dA = A - C, dB = B - C. Models: a, b, c. alpha: any number."""

    def passes(self) -> Iterator[Survey]:
        inner = Sums(self.view[0], _inner)
        yield inner
        square, product = inner.total.tolist()
        self._known = product / square if square else 0.0

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        result = a + ((b - c) - (a - c) * self._known) * self.job.number("alpha")
        return clipped(result, a, b) if self.job.values["clip"] else result


def _inner(chunk: Chunk) -> Tensor:
    a, b, c = chunk.models
    of_a = a - c
    return torch.stack([row_sums(of_a * of_a), row_sums(of_a * (b - c))], dim=1)
