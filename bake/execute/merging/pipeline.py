"""The workers of a merge: who makes which tensor, in how much memory."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from bake.errors import UsageError
from bake.execute.device import Desk, Device, choose_devices
from bake.execute.merging.maths import merge_of
from bake.execute.merging.work import MergedTensor
from bake.execute.output import Output
from bake.execute.pipeline import rounding_of
from bake.execute.plain.crew import Crew, Shift, Threads, start_crew
from bake.execute.task import MANY_FILES, MAX_WORKERS, Task
from bake.io.files import write_at
from bake.merges import METHODS
from bake.merges.merge import Merge
from bake.plan.model import TensorPlan
from bake.sizes import format_bytes

_CHUNK_ELEMENTS = 32 * 1024  # of each model, at most: all that is made of them stays in a core's cache
_SMALLEST_CHUNK = 4 * 1024
_GPU_CHUNK_ELEMENTS = 4 * 1024 * 1024
_PART_ELEMENTS = 16 * 1024 * 1024  # tensors with more are worked on by several workers, where no pass is needed
# Of a worker for each element of a chunk: float64 values of every model, and a few times that for what is made of them.
_BYTES_PER_MODEL = 32
_BYTES_PER_ELEMENT = 64


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows of a tensor that one worker takes care of; None: all, after the tensor's passes."""

    tensor: TensorPlan
    relative: str  # output file it belongs to
    merge: Merge
    rows: range | None


def whole_bytes(tensor: TensorPlan) -> int:
    """Memory that a method takes which has to see this tensor at once."""
    assert tensor.merge is not None
    return math.prod(tensor.shape) * _element_bytes(len(tensor.merge.shares))


def _element_bytes(models: int) -> int:
    return models * _BYTES_PER_MODEL + _BYTES_PER_ELEMENT


class MergeRun:
    """The workers of one merge. They start at once, before this process has threads: then it can be copied.

    On a GPU, and where all tensors have to be surveyed before the first is made, they are threads.
    """

    def __init__(self, task: Task) -> None:
        """Raises UsageError for a device that is not there, and if a whole tensor does not fit into the memory."""
        assert task.plan.merge is not None
        self._task = task
        torch.set_num_threads(1)  # the workers are the parallelism; a pool of threads could not be copied
        self._devices = choose_devices(task.options.device)
        self._method = METHODS[task.plan.merge.method]
        self._merges = [
            (file.relative, tensor, merge_of(task.plan, tensor))
            for file, tensor in task.plan.tensors()
            if tensor.merge is not None
        ]
        self._jobs = list(itertools.chain.from_iterable(self._split(*each) for each in self._merges))
        workers, self._elements = self._shares_of_memory()
        self._workers = workers
        self._inputs = range(len(task.plan.inputs))
        if len(self._inputs) <= MANY_FILES:
            for place in self._inputs:
                with task.files.using(place):
                    pass  # its header is read here, once, and not by every worker
        self._is_global = self._method.reach == "global"
        is_apart = self._devices[0].is_cpu and not self._is_global
        self._crew: Crew | None = self._start(self._work) if is_apart else None

    def _start(self, work: Callable[[Shift], Counter[tuple[str, str]]]) -> Crew:
        task = self._task
        if self._devices[0].is_cpu and not self._is_global:
            return start_crew(self._workers, len(self._jobs), work, task.team, task.progress)
        shares = [range(place, place + 1) for place in range(len(self._jobs))]
        return Threads(self._workers, shares, work, task.team, task.progress)

    def _split(self, relative: str, tensor: TensorPlan, merge: Merge) -> Sequence[_Job]:
        """The jobs that make one tensor."""
        height, width = merge.view
        has_passes = self._method.reach != "global" and next(iter(merge.passes()), None) is not None
        rows = max(1, _PART_ELEMENTS // max(1, width))
        if merge.whole or has_passes:
            return [_Job(tensor, relative, merge, None)]
        return [
            _Job(tensor, relative, merge, range(first, min(height, first + rows))) for first in range(0, height, rows)
        ]

    def _shares_of_memory(self) -> tuple[int, int]:
        """(workers, elements of a chunk). Raises UsageError if a whole tensor needs more memory than there is."""
        options = self._task.options
        wanted = min(options.threads or min(MAX_WORKERS, os.cpu_count() or 1), max(1, len(self._jobs)))
        whole = max((tensor for _, tensor, merge in self._merges if merge.whole), key=whole_bytes, default=None)
        if whole is not None:
            needed = whole_bytes(whole)
            if needed > options.memory:
                raise UsageError(
                    f"{self._method.name} sees a tensor at once, and {whole.name} {list(whole.shape)} of "
                    f"{self._task.plan.base.name} takes {format_bytes(needed)} then: allow it with "
                    f"--memory {-(-needed // 2**20)}MiB, or leave its component out (--only).",
                    tensor=whole.name,
                    needed=needed,
                )
            wanted = min(wanted, options.memory // needed)
        each = _element_bytes(
            max((len(tensor.merge.shares) for _, tensor, _ in self._merges if tensor.merge), default=1)
        )
        workers = max(1, min(wanted, options.memory // (each * _SMALLEST_CHUNK)))
        largest = _CHUNK_ELEMENTS if self._devices[0].is_cpu else _GPU_CHUNK_ELEMENTS
        return workers, max(_SMALLEST_CHUNK, min(largest, options.memory // workers // each))

    def join(self) -> dict[str, dict[str, int]]:
        """Wait for the workers; raise what they, or the team, met. Returns what was clamped, as in `Measured`."""
        if self._is_global:
            self._start(self._survey).join()
            merges = [
                merge for _, tensor, merge in self._merges if tensor.merge and tensor.merge.method == self._method.name
            ]
            self._method.load().agree(merges)
        if self._crew is None:
            self._crew = self._start(self._work)
        clamped: dict[str, dict[str, int]] = {}
        for found in self._crew.join():
            for (component, name), count in found.items():
                mine = clamped.setdefault(component, {})
                mine[name] = mine.get(name, 0) + count
        return {component: dict(sorted(each.items())) for component, each in sorted(clamped.items())}

    def stop(self) -> None:
        """End the work, if it has not ended."""
        if self._crew is not None:
            self._crew.stop()

    def _survey(self, shift: Shift) -> Counter[tuple[str, str]]:
        """The life of a worker that makes the passes of all tensors."""
        with Output(self._task.targets) as output:
            worker = _Worker(self._task, self._devices[0], output)
            while (numbers := shift.next()) is not None:
                for job in (self._jobs[number] for number in numbers):
                    if job.rows is None or job.rows.start == 0:
                        worker.tensor(job).survey(self._elements, worker.desk, shift.check)
        return Counter()

    def _work(self, shift: Shift) -> Counter[tuple[str, str]]:
        """The life of a worker; (component, tensor) -> elements that were clamped."""
        clamped: Counter[tuple[str, str]] = Counter()
        with ExitStack() as opened:
            if len(self._inputs) <= MANY_FILES:
                for place in self._inputs:
                    opened.enter_context(self._task.files.using(place))
            worker = _Worker(self._task, self._devices[0], opened.enter_context(Output(self._task.targets)))
            while (numbers := shift.next()) is not None:
                for job in (self._jobs[number] for number in numbers):
                    count = worker.carry(job, self._elements, shift)
                    if count:
                        clamped[job.tensor.component, job.tensor.name] += count
        return clamped


class _Worker:
    """The buffers of one worker, and the output that it writes."""

    def __init__(self, task: Task, device: Device, output: Output) -> None:
        self._task, self._device = task, device
        self.desk = Desk(device)
        self._output = output

    def tensor(self, job: _Job) -> MergedTensor:
        """The tensor of a job, ready to be worked on."""
        task = self._task
        rounding = rounding_of(task.plan, job.tensor)
        return MergedTensor(task.plan, job.tensor, job.merge, task.files, self._device, rounding, task.forgets)

    def carry(self, job: _Job, elements: int, shift: Shift) -> int:
        """Make and write the rows of a job; how many elements were clamped."""
        self._output.turn_to(job.relative)
        work = self.tensor(job)
        if job.rows is None:
            work.survey(elements, self.desk, shift.check)
        start = self._output.data_start + job.tensor.span[0]
        size = (job.tensor.span[1] - job.tensor.span[0]) // math.prod(job.tensor.shape)
        clamped = 0
        for finished in work.finished(elements, job.rows, self.desk):
            shift.check()
            write_at(self._output.descriptor, finished.data, start + finished.begin * size)
            shift.advance(len(finished.data))
            clamped += finished.clamped
        return clamped
