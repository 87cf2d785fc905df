"""The part of a run that computes: workers that read, compute and write, each with buffers of its own.

A worker takes the next tensor, or the next part of a very large one, loads its factors, and carries it chunk by
chunk from the base to the output. While one waits for the disk or a device the others go on; on a GPU each has
a stream of its own, so that copies run beside the arithmetic. Memory is the workers' buffers and factors.
"""

from __future__ import annotations

import functools
import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from bake.adapters import is_plain
from bake.errors import UsageError
from bake.execute.compute import NOTHING, Chained, Converted, Survival, Work
from bake.execute.device import Device, choose_devices
from bake.execute.engine import Measured, Task
from bake.execute.rounding import Nearest, Rounding
from bake.execute.scaled import Rescaled
from bake.execute.stochastic import Stochastic
from bake.execute.sums import Sum
from bake.execute.worker import Worker
from bake.io.fileset import FileSet
from bake.keys.factors import as_matrix
from bake.plan.model import Plan, TensorPlan

_MAX_WORKERS = 8
_WORKERS_PER_GPU = 4  # one reading, one computing, one writing, one to spare
_PART_ELEMENTS = 16 * 1024 * 1024  # tensors with more are worked on by several workers
_AHEAD = 8  # parts that the system is asked to read before a worker comes to them
_MANY_FILES = 32  # with more, inputs are only open while they are read


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one tensor that one worker takes care of."""

    tensor: TensorPlan
    relative: str  # output file it belongs to
    shared: _Shared
    rows: range
    scale: TensorPlan | None  # what the tensor's new scale is stored in, if this part is to see to that


class _Shared:
    """The work on one tensor, made by whoever is first, for all of its parts and dropped after the last."""

    def __init__(self, tensor: TensorPlan, rounding: Rounding, parts: int) -> None:
        self._tensor, self._rounding = tensor, rounding
        self._left = parts
        self._works: dict[torch.device, Work] = {}
        self._lock = threading.Lock()

    def work(self, files: FileSet, device: Device) -> Work:
        with self._lock:
            if device.torch not in self._works:
                self._works[device.torch] = work_on(self._tensor, files, device, self._rounding)
                device.wait()  # other workers' streams use the factors too
            return self._works[device.torch]

    def done(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._works.clear()


def work_on(tensor: TensorPlan, files: FileSet, device: Device, rounding: Rounding) -> Work:
    """What is to be done to `tensor`, with its factors loaded, ready for any chunk of it.

    Raises InputError if the factors of a term contradict each other.
    """
    is_plain_sum = all(is_plain(term.algorithm, term.factors) for term in tensor.terms)
    if not device.has_float64 and (tensor.scale is not None or tensor.is_rescaled or not is_plain_sum):
        device = Device("cpu")
    kind = (Sum if is_plain_sum else Chained) if tensor.terms else Converted
    work = kind(tensor, files, device, rounding)
    return work if tensor.rescaled is None else Rescaled(work, tensor.rescaled, files, rounding)


def rounding_of(plan: Plan, tensor: TensorPlan) -> Rounding:
    """How the elements of `tensor` are rounded."""
    if plan.rounding == "stochastic":
        return Stochastic(plan.seed, tensor.name, tensor.dtype)
    return Nearest(tensor.dtype, is_fast=plan.rounding == "fast")


class _Agenda:
    """The parts in the order of the files, each handed out once; those to come are read ahead by the system."""

    def __init__(self, task: Task) -> None:
        self._files = task.files
        scales = {(file.relative, other.scale_of): other for file, other in task.plan.tensors() if other.scale_of}
        self._parts = [
            part
            for file, tensor in task.plan.tensors()
            if not (tensor.is_copy or tensor.is_given)
            for part in _parts_of(
                tensor, file.relative, rounding_of(task.plan, tensor), scales.get((file.relative, tensor.name))
            )
        ]
        self._handed_out = 0
        self._lock = threading.Lock()

    def next(self) -> _Part | None:
        """The next part; None after the last."""
        with self._lock:
            place = self._handed_out
            self._handed_out += 1
        for coming in self._parts[place + _AHEAD : place + _AHEAD + 1] if place else self._parts[: _AHEAD + 1]:
            self._prefetch(coming)
        return self._parts[place] if place < len(self._parts) else None

    def _prefetch(self, part: _Part) -> None:
        tensor, source = part.tensor, part.tensor.source
        height = max(1, tensor.source_size[0])
        row = (source.span[1] - source.span[0]) // height  # bytes
        begin, end = (source.span[0] + min(place, height) * row for place in (part.rows.start, part.rows.stop))
        wanted = [(source.input, begin, end)]
        if part.rows.start == 0:
            factors = (stored for term in tensor.terms for stored in term.factors.values())
            wanted += [(stored.input, *stored.span) for stored in factors]
        for place, begin, end in wanted:
            with self._files.using(place) as file:
                file.prefetch(begin, end)


def _parts_of(tensor: TensorPlan, relative: str, rounding: Rounding, scale: TensorPlan | None) -> list[_Part]:
    """scale: what the tensor's new scale is stored in, if it gets one."""
    height, width = as_matrix(tensor.view)
    rows = max(1, _PART_ELEMENTS // max(1, width))
    ranges = [range(first, min(height, first + rows)) for first in range(0, height, rows)]
    shared = _Shared(tensor, rounding, len(ranges))
    return [_Part(tensor, relative, shared, each, None if each.start else scale) for each in ranges]


class Pipeline:
    """The workers of one run."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._devices = choose_devices(task.options.device)
        cores = min(_MAX_WORKERS, os.cpu_count() or 1)
        default = cores if self._devices[0].is_cpu else max(cores, _WORKERS_PER_GPU * len(self._devices))
        memory = task.options.memory
        self._workers = self._devices[0].workers(task.options.threads or default, memory)
        self._elements = self._devices[0].chunk_elements(memory // self._workers)
        self._agenda = _Agenda(task)
        self._sums: dict[str, Survival] = {}
        self._clamped: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()

    def run(self) -> Measured:
        """Make every tensor that is not a copy; return what was measured on the way."""
        torch.backends.cuda.matmul.allow_tf32 = False
        threads_before = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers are the parallelism; nested threads would fight for the cores
        try:
            with ExitStack() as opened:
                if len(self._task.plan.inputs) <= _MANY_FILES:
                    for place in range(len(self._task.plan.inputs)):
                        if self._task.plan.inputs[place].role != "config":
                            opened.enter_context(self._task.files.using(place))
                for number in range(self._workers):
                    device = self._devices[number % len(self._devices)]
                    self._task.team.start(f"worker {number}", functools.partial(self._work, device))
                self._task.team.join()
        finally:
            torch.set_num_threads(threads_before)
        by_chance = self._task.plan.rounding == "stochastic"
        sums = sorted(self._sums.items())
        shares = {component: each.mean_share if by_chance else each.share for component, each in sums}
        survival = {component: share for component, share in shares.items() if share is not None}
        clamped = {component: dict(sorted(found.items())) for component, found in sorted(self._clamped.items())}
        return Measured(survival, clamped)

    def _work(self, device: Device) -> None:
        with Worker(self._task, device, self._elements) as worker, device.open_lane():
            while (part := self._agenda.next()) is not None:
                work = self._ready(part, device)
                survival = worker.carry(work, part.relative, part.rows)
                if part.scale is not None and isinstance(work, Rescaled):
                    worker.store(work.scale_bytes, part.relative, part.scale)
                part.shared.done()
                self._count(part.tensor, survival)

    def _ready(self, part: _Part, device: Device) -> Work:
        try:
            return part.shared.work(self._task.files, device)
        except torch.OutOfMemoryError:
            raise UsageError(
                f"{device.torch}: too little memory for the factors of {part.tensor.name}; use --device cpu"
            ) from None

    def _count(self, tensor: TensorPlan, survival: Survival) -> None:
        component = tensor.component
        with self._lock:
            self._sums[component] = self._sums.get(component, NOTHING) + survival
            if survival.clamped:
                found = self._clamped.setdefault(component, {})
                found[tensor.name] = found.get(tensor.name, 0) + survival.clamped
