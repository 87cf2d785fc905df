"""One worker: carries chunks from the base through the arithmetic to the output, in buffers it uses again."""

from __future__ import annotations

import torch
from torch import Tensor

from bake.errors import UsageError
from bake.execute.chunk import Chunk, chunk_height
from bake.execute.compute import Work
from bake.execute.device import Desk, Device
from bake.execute.output import Output
from bake.execute.parts import Part
from bake.execute.survival import NOTHING, Survival
from bake.execute.task import Task
from bake.io.files import write_at
from bake.io.journal import Digest, Span
from bake.io.payload import as_bytes, read_padded
from bake.keys.factors import as_matrix
from bake.plan.model import TensorPlan


class Worker:
    """The buffers of one thread, and the output that it writes."""

    def __init__(self, task: Task, device: Device, elements: int | None, output: Output) -> None:
        """elements: of a chunk, at most, where that changes no bit; None: as everywhere."""
        self._task = task
        self._elements = elements
        self._desks = {device.torch: Desk(device)}
        self._output = output

    def recall(self, part: Part, scale: TensorPlan | None) -> Survival | None:
        """What survived of a part that an earlier run finished, with the `scale` it is to see to; None: it is to do."""
        self._output.turn_to(part.relative)
        spans = [part.span(self._output.data_start), *([] if scale is None else [self._span(part.relative, scale)])]
        found = [self._task.journal.recall(span, self._output.descriptor) for span in spans]
        if found[0] is None or None in found:
            return None
        self._task.progress.advance(sum(span.end - span.begin for span in spans))
        return Survival.from_numbers(found[0])

    def carry(self, work: Work, part: Part) -> Survival:
        """Finish rows of the tensor that `work` is for; what survived of them."""
        self._output.turn_to(part.relative)
        digest = self._task.journal.digest()
        columns, survival, rows = as_matrix(work.plan.view)[1], NOTHING, part.rows
        height = chunk_height(columns, self._elements if work.has_free_grid else None)
        first = rows.start
        while first < rows.stop:
            self._task.team.check()
            chunk = Chunk(first, min(rows.stop, first + height), columns)
            try:
                survival += self._pass(work, chunk, digest)
            except torch.OutOfMemoryError:
                height = self._with_less(work, chunk)
            else:
                first = chunk.last
        self._task.journal.note(part.span(self._output.data_start), digest, survival.numbers)
        return survival

    def _with_less(self, work: Work, chunk: Chunk) -> int:
        """Half as many rows as there is no memory for; raises UsageError if that is none."""
        height = (chunk.last - chunk.first) // 2
        if height == 0:
            raise UsageError(
                f"{work.device.torch}: too little memory for one row of {work.plan.name}; use --device cpu"
            )
        for desk in self._desks.values():
            desk.clear()
        work.device.free_unused()
        self._elements = height * chunk.columns  # of the next ones too
        return height

    def store(self, data: memoryview, relative: str, tensor: TensorPlan) -> None:
        """Write the whole of a tensor of the output file `relative`."""
        self._output.turn_to(relative)
        span, digest = self._span(relative, tensor), self._task.journal.digest()
        write_at(self._output.descriptor, data, span.begin)
        digest.update(data)
        self._task.journal.note(span, digest)
        self._task.progress.advance(len(data))

    def _span(self, relative: str, tensor: TensorPlan) -> Span:
        return Span(relative, self._output.data_start + tensor.span[0], self._output.data_start + tensor.span[1])

    def _pass(self, work: Work, chunk: Chunk, digest: Digest) -> Survival:
        plan, device = work.plan, work.device
        desk = self._desks.setdefault(device.torch, Desk(device))
        shape = (chunk.last - chunk.first, chunk.columns)
        stored = desk.on_host("read", plan.source.dtype, shape)
        finished = desk.on_host("written", plan.dtype, shape)
        self._read(plan, chunk, stored)
        if device.is_cpu:
            survival = work.fuse(stored, finished, chunk, desk)
        else:
            raw = desk.computed("raw", stored.dtype, shape)
            out = desk.computed("out", finished.dtype, shape)
            raw.copy_(stored, non_blocking=True)
            survival = work.fuse(raw, out, chunk, desk)
            finished.copy_(out, non_blocking=True)
            device.wait()
        data = as_bytes(finished)
        size = finished.element_size()
        write_at(
            self._output.descriptor, data, self._output.data_start + plan.span[0] + chunk.first * chunk.columns * size
        )
        digest.update(data)
        self._task.progress.advance(len(data))
        return survival

    def _read(self, plan: TensorPlan, chunk: Chunk, stored: Tensor) -> None:
        source = plan.source
        with self._task.files.using(source.input) as file:
            if plan.is_padded:
                rows = range(chunk.first, chunk.last)
                tag, size = source.dtype, plan.source_size
                stored.copy_(read_padded(file, source.span[0], tag, size, chunk.columns, rows, stored.dtype))
            else:
                begin = source.span[0] + chunk.first * chunk.columns * stored.element_size()
                data = as_bytes(stored)
                file.read_into(begin, data)
                if self._task.forgets:
                    file.forget(begin, begin + len(data))
