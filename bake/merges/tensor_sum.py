"""Tensor sum: some rows are B's, the others A's.

Source: sd-mecha merge_methods/slicing.py; meh and SuperMerger ("tensor") truncate where this rounds, by a row.
"""

from __future__ import annotations

import math

from torch import Tensor

from bake.merges.merge import Chunk, Job, Merge


class TensorSum(Merge):
    """A with B's indices [offset, offset + width) of the first axis, as shares of it; they may go around its end.

    Models: a, b. width: -1 to 1, a negative one goes to the left. offset: any number.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        count = job.shape[0] if job.shape else 1
        start, end, self.is_outside = region(job.number("width"), job.number("offset"), count)
        size = math.prod(job.shape) // max(1, count)
        self.start, self.end = start * size, end * size

    def blend(self, chunk: Chunk) -> Tensor:
        inner, outer = reversed(chunk.models) if not self.is_outside else chunk.models
        result = outer.clone()
        begin, end = max(0, self.start - chunk.flat), max(0, self.end - chunk.flat)
        result.view(-1)[begin:end] = inner.reshape(-1)[begin:end]
        return result


def region(width: float, offset: float, count: int) -> tuple[int, int, bool]:
    """(first, end, whether what is meant lies outside of them) of a region of `count` places, given in shares."""
    if width < 0:
        offset, width = offset + width, -width
    width = min(width, 1.0)
    offset %= 1.0
    if width + offset <= 1:
        return round(offset * count), round((width + offset) * count), False
    return round((width + offset - 1) * count), round(offset * count), True
