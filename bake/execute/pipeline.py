"""The part of a run that computes: workers that read, compute and write, each with buffers of its own.

A worker takes the next tensor, or the next part of a very large one, loads its factors, and carries it chunk by
chunk from the base to the output. While one waits for the disk or a device the others go on; on a GPU each has
a stream of its own, so that copies run beside the arithmetic. Memory is the workers' buffers and factors.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from bake.errors import UsageError
from bake.execute.compute import Chained, Converted, Rows, Work
from bake.execute.device import Device, choose_devices
from bake.execute.output import Output
from bake.execute.parts import Part, parts_of
from bake.execute.rounding import Nearest, Rounding
from bake.execute.scaled import Rescaled
from bake.execute.stochastic import Stochastic
from bake.execute.sums import Sum
from bake.execute.survival import Survival
from bake.execute.task import MANY_FILES, MAX_WORKERS, Task
from bake.execute.worker import Worker
from bake.io.fileset import FileSet
from bake.keys.factors import is_plain
from bake.plan.model import Plan, TensorPlan

_WORKERS_PER_GPU = 4  # one reading, one computing, one writing, one to spare
_AHEAD = 8  # parts that the system is asked to read before a worker comes to them


@dataclass(frozen=True, slots=True)
class _Job:
    """A part that one worker takes care of."""

    part: Part
    shared: _Shared
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


def work_on(tensor: TensorPlan, files: FileSet, device: Device, rounding: Rounding, merged: Rows | None = None) -> Work:
    """What is to be done to `tensor`, with its factors loaded, ready for any chunk of it.

    merged: the base's values, where they are merged first.
    Raises InputError if the factors of a term contradict each other.
    """
    is_plain_sum = all(is_plain(term.algorithm, term.factors) for term in tensor.terms)
    if not device.has_float64 and (tensor.scale is not None or tensor.is_rescaled or not is_plain_sum):
        device = Device("cpu")
    kind = (Sum if is_plain_sum else Chained) if tensor.terms else Converted
    work = kind(tensor, files, device, rounding, merged)
    return work if tensor.rescaled is None else Rescaled(work, tensor.rescaled, files, rounding)


def rounding_of(plan: Plan, tensor: TensorPlan) -> Rounding:
    """How the elements of `tensor` are rounded."""
    if plan.rounding == "stochastic":
        return Stochastic(plan.seed, tensor.name, tensor.dtype)
    return Nearest(tensor.dtype, is_fast=plan.rounding == "fast")


class _Agenda:
    """The parts in the order of the files, each handed out once; those to come are read ahead by the system."""

    def __init__(self, task: Task, only: Collection[tuple[str, str]] | None) -> None:
        """only: the tensors (output file, name) to work on; None: all."""
        self._files = task.files
        scales = {(file.relative, other.scale_of): other for file, other in task.plan.tensors() if other.scale_of}
        chosen = [part for part in parts_of(task.plan) if only is None or (part.relative, part.tensor.name) in only]
        self._jobs: list[_Job] = []
        for _, group in itertools.groupby(chosen, key=lambda part: (part.relative, part.tensor.name)):
            parts = list(group)
            tensor = parts[0].tensor
            shared = _Shared(tensor, rounding_of(task.plan, tensor), len(parts))
            scale = scales.get((parts[0].relative, tensor.name))
            self._jobs += [_Job(part, shared, None if part.rows.start else scale) for part in parts]
        self._handed_out = 0
        self._lock = threading.Lock()

    def next(self) -> _Job | None:
        """The next part; None after the last."""
        with self._lock:
            place = self._handed_out
            self._handed_out += 1
        for coming in self._jobs[place + _AHEAD : place + _AHEAD + 1] if place else self._jobs[: _AHEAD + 1]:
            coming.part.prefetch(self._files)
        return self._jobs[place] if place < len(self._jobs) else None


class Pipeline:
    """The workers of one run."""

    def __init__(self, task: Task, only: Collection[tuple[str, str]] | None) -> None:
        """only: the tensors (output file, name) to work on; None: all."""
        self._task = task
        self._devices = choose_devices(task.options.device)
        cores = min(MAX_WORKERS, os.cpu_count() or 1)
        default = cores if self._devices[0].is_cpu else max(cores, _WORKERS_PER_GPU * len(self._devices))
        memory = task.options.memory
        self._workers = self._devices[0].workers(task.options.threads or default, memory)
        self._elements = self._devices[0].chunk_elements(memory // self._workers)
        self._agenda = _Agenda(task, only)
        self._found: list[tuple[str, Survival]] = []
        self._clamped: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()

    def run(self) -> tuple[list[tuple[str, Survival]], dict[str, dict[str, int]]]:
        """Make every tensor that is to be made.

        Returns what survived of the updates, by component, and what was clamped, as in `Measured`.
        """
        torch.backends.cuda.matmul.allow_tf32 = False
        threads_before = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers are the parallelism; nested threads would fight for the cores
        try:
            with ExitStack() as opened:
                if len(self._task.plan.inputs) <= MANY_FILES:
                    for place in range(len(self._task.plan.inputs)):
                        if self._task.plan.inputs[place].has_tensors:
                            opened.enter_context(self._task.files.using(place))
                for number in range(self._workers):
                    device = self._devices[number % len(self._devices)]
                    self._task.team.start(f"worker {number}", functools.partial(self._work, device))
                self._task.team.join()
        finally:
            torch.set_num_threads(threads_before)
        return self._found, {component: dict(sorted(each.items())) for component, each in sorted(self._clamped.items())}

    def _work(self, device: Device) -> None:
        with Output(self._task.targets) as output, device.open_lane():
            worker = Worker(self._task, device, self._elements, output)
            while (job := self._agenda.next()) is not None:
                survival = worker.recall(job.part, job.scale)
                if survival is None:
                    work = self._ready(job, device)
                    if job.scale is not None and isinstance(work, Rescaled):
                        worker.store(work.scale_bytes, job.part.relative, job.scale)
                    survival = worker.carry(work, job.part)
                job.shared.done()
                self._count(job.part.tensor, survival)

    def _ready(self, job: _Job, device: Device) -> Work:
        try:
            return job.shared.work(self._task.files, device)
        except torch.OutOfMemoryError:
            raise UsageError(
                f"{device.torch}: too little memory for the factors of {job.part.tensor.name}; use --device cpu"
            ) from None

    def _count(self, tensor: TensorPlan, survival: Survival) -> None:
        with self._lock:
            self._found.append((tensor.component, survival))
            if survival.clamped:
                found = self._clamped.setdefault(tensor.component, {})
                found[tensor.name] = found.get(tensor.name, 0) + survival.clamped
