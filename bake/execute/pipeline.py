"""The part of a run that computes: one thread reads, several add and round, one writes.

Chunks travel in a fixed ring of buffers, so memory is the ring and not the model.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.dtypes import DTYPES
from bake.execute.chunk import Chunk, chunks, largest_chunk
from bake.execute.compute import Survival, Work, work_on
from bake.execute.device import choose_device
from bake.execute.engine import Task
from bake.execute.team import Channel, Closed
from bake.io.files import open_for_writing, write_at
from bake.io.payload import read_padded, view_as
from bake.io.tensorfile import TensorFile
from bake.plan.model import TensorPlan

_MAX_WORKERS = 8
_SLOTS_PER_WORKER = 4  # one being read, one computed, one written, one waiting
_OPEN_OUTPUTS = 16


@dataclass(frozen=True, slots=True)
class _Slot:
    """Two host buffers of the ring."""

    raw: Tensor  # bytes of the base
    out: Tensor  # bytes of the result


@dataclass(frozen=True, slots=True)
class _Job:
    """One chunk on its way through the ring."""

    slot: _Slot
    work: Work
    chunk: Chunk
    relative: str  # output file it belongs to


class Pipeline:
    """Reader, workers and writer around a ring of buffers."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._device = choose_device(task.options.device)
        tensors = [tensor for _, tensor in task.plan.tensors() if not tensor.is_copy]
        self._elements = max(largest_chunk(tensor.view) for tensor in tensors)
        self._widest = max(_item_bytes(tag) for tensor in tensors for tag in (tensor.dtype, tensor.source.dtype))
        self._workers = task.options.threads or min(_MAX_WORKERS, os.cpu_count() or 1)
        self._working = self._workers
        slots = self._affordable_slots()
        self._free: Channel[_Slot] = task.team.add_channel(Channel(slots))
        self._loaded: Channel[_Job] = task.team.add_channel(Channel(slots))
        self._finished: Channel[_Job] = task.team.add_channel(Channel(slots))
        for _ in range(slots):
            size = self._elements * self._widest
            self._free.put(_Slot(self._device.staging(size), self._device.staging(size)))
        self._sums: dict[str, Survival] = {}
        self._lock = threading.Lock()

    def _affordable_slots(self) -> int:
        scratch = self._workers * self._elements * 2 * max(4, self._widest)
        slot = max(1, 2 * self._elements * self._widest)
        budget = max(0, self._task.options.memory - scratch)
        return max(2, min(self._workers * _SLOTS_PER_WORKER, budget // slot))

    def run(self) -> dict[str, float]:
        """Fuse every tensor that is not a copy; return the survival of the updates by component."""
        torch.backends.cuda.matmul.allow_tf32 = False
        threads_before = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers are the parallelism; nested threads would fight for the cores
        try:
            self._task.team.start("reader", self._read)
            for number in range(self._workers):
                self._task.team.start(f"worker {number}", self._work)
            self._task.team.start("writer", self._write)
            self._task.team.join()
        finally:
            torch.set_num_threads(threads_before)
        shares = {component: sums.share for component, sums in sorted(self._sums.items())}
        return {component: share for component, share in shares.items() if share is not None}

    def _read(self) -> None:
        for file, tensor in self._task.plan.tensors():
            if tensor.is_copy:
                continue
            work = work_on(tensor, self._task.files, self._device)
            with self._task.files.using(tensor.source.input) as source:
                for chunk in chunks(tensor.view):
                    slot = self._free.get()
                    _fill(slot.raw, tensor, source, chunk)
                    self._loaded.put(_Job(slot, work, chunk, file.relative))
        self._loaded.close()

    def _work(self) -> None:
        # Some tensors may need float64: the same memory then holds half as many elements.
        scratch = self._device.scratch(self._elements * max(4, self._widest), torch.uint8)
        try:
            while True:
                job = self._loaded.get()
                shape = (job.chunk.last - job.chunk.first, job.chunk.columns)
                raw = view_as(job.slot.raw, job.work.plan.source.dtype, shape)
                out = view_as(job.slot.out, job.work.plan.dtype, shape)
                survival = job.work.fuse(raw, out, job.chunk, scratch)
                self._count(job.work.plan.component, survival)
                self._finished.put(job)
        except Closed:
            self._task.team.check()
        with self._lock:
            self._working -= 1
            if self._working == 0:
                self._finished.close()

    def _count(self, component: str, survival: Survival) -> None:
        with self._lock:
            self._sums[component] = self._sums.get(component, Survival(0.0, 0.0)) + survival

    def _write(self) -> None:
        outputs: dict[str, int] = {}
        try:
            while True:
                job = self._finished.get()
                if job.relative not in outputs:
                    if len(outputs) == _OPEN_OUTPUTS:  # a folder may have thousands of shards
                        os.close(outputs.pop(next(iter(outputs))))
                    outputs[job.relative] = open_for_writing(self._task.targets[job.relative].path)
                size = _item_bytes(job.work.plan.dtype)
                offset = self._task.targets[job.relative].data_start + job.work.plan.span[0]
                data = job.slot.out.numpy().data[: job.chunk.elements * size]
                write_at(outputs[job.relative], data, offset + job.chunk.first * job.chunk.columns * size)
                self._task.progress.advance(len(data))
                self._free.put(job.slot)
        except Closed:
            self._task.team.check()
        finally:
            for descriptor in outputs.values():
                os.close(descriptor)


def _fill(raw: Tensor, tensor: TensorPlan, source: TensorFile, chunk: Chunk) -> None:
    stored = tensor.source
    if tensor.is_padded:
        out = view_as(raw, stored.dtype, (chunk.last - chunk.first, chunk.columns))
        rows = range(chunk.first, chunk.last)
        out.copy_(read_padded(source, stored.span[0], stored.dtype, tensor.source_size, chunk.columns, rows, out.dtype))
        return
    size = _item_bytes(stored.dtype)
    begin = stored.span[0] + chunk.first * chunk.columns * size
    source.read_into(begin, raw.numpy().data[: chunk.elements * size])


def _item_bytes(tag: str) -> int:
    return DTYPES[tag].bits // 8
