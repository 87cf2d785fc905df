"""One tensor that is merged: its passes, then its chunks, each rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bake.dtypes import DTYPES
from bake.errors import Mismatch
from bake.execute.chunk import chunk_height
from bake.execute.device import Desk, Device
from bake.execute.merging.maths import refusal_of_result
from bake.execute.merging.reader import Reader
from bake.execute.rounding import Rounding, has_nonfinite, settle_wide
from bake.io.fileset import FileSet
from bake.io.payload import as_bytes
from bake.merges.merge import Merge
from bake.plan.model import Plan, TensorPlan


class Finished(NamedTuple):
    """Rows of the output."""

    begin: int  # flat index of their first element
    data: memoryview  # until the next ones are made
    clamped: int  # elements beyond the largest 8-bit number, which stands in


class MergedTensor:
    """One tensor, ready for its passes and its rows."""

    def __init__(
        self,
        plan: Plan,
        tensor: TensorPlan,
        merge: Merge,
        files: FileSet,
        device: Device,
        rounding: Rounding,
        forgets: bool,
    ) -> None:
        self.tensor, self.merge = tensor, merge
        self._rounding, self._device = rounding, device
        self._reader = Reader(plan, tensor, files, merge.view[1], device, forgets)

    def heights(self, elements: int, rows: range | None = None) -> Iterator[tuple[int, int]]:
        """[first, past the last) row of each chunk of some rows, all by default; elements: of a chunk, at most."""
        rows = rows if rows is not None else range(self.merge.view[0])
        height = len(rows) if self.merge.whole else chunk_height(self.merge.view[1], elements)
        for first in range(rows.start, rows.stop, max(1, height)):
            yield first, min(rows.stop, first + height)

    def survey(self, elements: int, desk: Desk, check: Callable[[], None]) -> None:
        """Make all passes. check: called between two chunks. Raises Mismatch for values that leave it undefined."""
        with _named(self.tensor):
            for survey in self.merge.passes():
                for first, last in self.heights(elements):
                    check()
                    survey.add(self._reader.chunk(first, last, desk))

    def finished(self, elements: int, rows: range | None, desk: Desk) -> Iterator[Finished]:
        """The new rows, chunk by chunk, as they are to be stored. Raises NonFinite for results that overflow."""
        for first, last in self.heights(elements, rows):
            with _named(self.tensor):
                values = self.merge.blend(self._reader.chunk(first, last, desk))
            begin = first * self.merge.view[1]
            out = self._rounded(values, begin, desk)
            if has_nonfinite(out):
                raise refusal_of_result(self.tensor, float(values.abs().max()))
            target = DTYPES[self.tensor.dtype]
            clamped = int((values.abs() >= target.overflow).sum()) if target.bits == 8 else 0
            yield Finished(begin, as_bytes(self._on_host(out, desk)), clamped)

    def _rounded(self, values: Tensor, begin: int, desk: Desk) -> Tensor:
        shape = tuple(values.shape)
        if self._device.is_cpu:
            out = desk.on_host("finished", self.tensor.dtype, shape)
        else:
            out = desk.computed("out", desk.on_host("finished", self.tensor.dtype, shape).dtype, shape)
        if out.element_size() < 4:
            near = desk.computed("near", torch.float32, shape)
            other = desk.computed("other", out.dtype, shape)
            settle_wide(values, near, self._rounding, out, other, begin)
        else:
            out.copy_(values)
        return out

    def _on_host(self, out: Tensor, desk: Desk) -> Tensor:
        if self._device.is_cpu:
            return out
        finished = desk.on_host("finished", self.tensor.dtype, tuple(out.shape))
        finished.copy_(out)
        self._device.wait()
        return finished


@contextmanager
def _named(tensor: TensorPlan) -> Iterator[None]:
    """Says of what tensor it is that a method cannot merge it."""
    try:
        yield
    except ValueError as error:
        raise Mismatch(f"{tensor.name}: {error}", tensor=tensor.name) from None
