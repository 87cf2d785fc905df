"""One tensor that is merged: its passes, then its chunks, to which adapters may add before each is rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bake.errors import Mismatch
from bake.execute.chunk import CHUNK_ELEMENTS, Chunk, chunk_height
from bake.execute.compute import Work
from bake.execute.device import Desk
from bake.execute.merging.reader import Reader
from bake.execute.pipeline import rounding_of, work_on
from bake.execute.survival import Survival
from bake.io.fileset import FileSet
from bake.io.payload import as_bytes
from bake.keys.factors import as_matrix
from bake.merges.merge import Merge
from bake.plan.model import Plan, TensorPlan

_FUSED_ELEMENTS = 128 * 1024  # products with fewer rows than they have columns take twice as long


class Finished(NamedTuple):
    """Rows of the output."""

    begin: int  # flat index of their first element
    data: memoryview  # until the next ones are made
    survival: Survival  # of what was added to the merged values


class MergedTensor:
    """One tensor, ready for its passes and its rows."""

    def __init__(
        self, plan: Plan, tensor: TensorPlan, merge: Merge, files: FileSet, desk: Desk, elements: int, forgets: bool
    ) -> None:
        """desk: of the calling worker. elements: of a chunk, at most. forgets: what was read shall not stay there."""
        self.tensor, self.merge = tensor, merge
        self._plan, self._files, self._desk, self._elements = plan, files, desk, elements
        self._reader = Reader(plan, tensor, files, merge.view[1], desk.device, forgets)
        self._whole: Tensor | None = None  # the merged values, of methods that make them all at once

    def survey(self, check: Callable[[], None]) -> None:
        """Make all passes. check: called between two chunks. Raises Mismatch for values that leave it undefined."""
        with _named(self.tensor):
            for survey in self.merge.passes():
                for first, last in self._chunks(range(self.merge.view[0]), self._elements):
                    check()
                    survey.add(self._reader.chunk(first, last, self._desk))

    def finished(self, work: Work, rows: range | None) -> Iterator[Finished]:
        """The new rows, all by default, chunk by chunk, as they are to be stored.

        work: what is done to the merged values. Raises NonFinite for results that overflow.
        """
        columns = as_matrix(self.tensor.view)[1]
        elements = CHUNK_ELEMENTS
        if work.has_free_grid:
            elements = max(self._elements, _FUSED_ELEMENTS) if self.tensor.terms else self._elements
        for first, last in self._chunks(range(self.merge.view[0]) if rows is None else rows, elements):
            begin = first * self.merge.view[1]
            values = self._merged(first, last).reshape(-1, columns)
            chunk = Chunk(begin // columns, begin // columns + len(values), columns)
            out = self._buffer(tuple(values.shape))
            survival = work.fuse(values, out, chunk, self._desk)
            yield Finished(begin, as_bytes(self._on_host(out)), survival)

    def work(self) -> Work:
        """What is done to the merged values: terms, a cast, one rounding."""
        rounding = rounding_of(self._plan, self.tensor)
        return work_on(self.tensor, self._files, self._desk.device, rounding, self._rows)

    def _rows(self, rows: range) -> Tensor:
        """The merged values of rows of the tensor, seen as its plan does: that may be other rows than the merge's."""
        columns, width = as_matrix(self.tensor.view)[1], self.merge.view[1]
        begin, end = rows.start * columns, rows.stop * columns
        first = begin // width
        values = self._merged(first, -(-end // width)).reshape(-1)
        return values[begin - first * width : end - first * width].reshape(len(rows), columns).clone()

    def _merged(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the merge, in pieces that stay in the cache."""
        if self.merge.whole:
            if self._whole is None:
                self._whole = self._blended(0, self.merge.view[0])
            return self._whole[first:last]
        pieces = list(self._chunks(range(first, last), self._elements))
        if len(pieces) == 1:
            return self._blended(first, last)
        found = torch.empty((last - first, self.merge.view[1]), dtype=torch.float64, device=self._desk.device.torch)
        for begin, end in pieces:
            found[begin - first : end - first] = self._blended(begin, end)
        return found

    def _blended(self, first: int, last: int) -> Tensor:
        with _named(self.tensor):
            return self.merge.blend(self._reader.chunk(first, last, self._desk))

    def _chunks(self, rows: range, elements: int) -> Iterator[tuple[int, int]]:
        """[first, past the last) row of each chunk of some rows."""
        height = len(rows) if self.merge.whole else chunk_height(self.merge.view[1], elements)
        for first in range(rows.start, rows.stop, max(1, height)):
            yield first, min(rows.stop, first + height)

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        """Where the finished values go."""
        host = self._desk.on_host("finished", self.tensor.dtype, shape)
        return host if self._desk.device.is_cpu else self._desk.computed("out", host.dtype, shape)

    def _on_host(self, out: Tensor) -> Tensor:
        device = self._desk.device
        if device.is_cpu:
            return out
        finished = self._desk.on_host("finished", self.tensor.dtype, tuple(out.shape))
        finished.copy_(out)
        device.wait()
        return finished


@contextmanager
def _named(tensor: TensorPlan) -> Iterator[None]:
    """Says of what tensor it is that a method cannot merge it."""
    try:
        yield
    except ValueError as error:
        raise Mismatch(f"{tensor.name}: {error}", tensor=tensor.name) from None
