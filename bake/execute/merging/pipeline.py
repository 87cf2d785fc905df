"""The workers of a merge: who makes which tensor, in how much memory."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import torch

from bake.dtypes import DTYPES
from bake.errors import UsageError
from bake.execute.device import Desk, Device, choose_devices
from bake.execute.merging.maths import merge_of
from bake.execute.merging.work import MergedTensor
from bake.execute.output import Output
from bake.execute.plain.crew import Crew, Shift, Threads, start_crew
from bake.execute.scaled import Rescaled
from bake.execute.survival import NOTHING, Survival
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

# (component, tensor) -> what survived of what was added to the rows that a worker made of it.
_Found: TypeAlias = "dict[tuple[str, str], Survival]"


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows of a tensor that one worker takes care of; None: all, after the tensor's passes."""

    tensor: TensorPlan
    relative: str  # output file it belongs to
    merge: Merge
    rows: range | None
    scale: TensorPlan | None  # what the tensor's new scale is stored in


def whole_bytes(tensor: TensorPlan) -> int:
    """Memory that a method takes which has to see this tensor at once."""
    assert tensor.merge is not None
    return math.prod(tensor.source.shape) * _element_bytes(len(tensor.merge.shares))


def _is_global(tensor: TensorPlan) -> bool:
    """True if it is merged by a method that has to look at all tensors first."""
    return tensor.merge is not None and METHODS[tensor.merge.method].reach == "global"


def _element_bytes(models: int) -> int:
    return models * _BYTES_PER_MODEL + _BYTES_PER_ELEMENT


class MergeRun:
    """The workers of one merge. They start at once, before this process has threads: then it can be copied.

    On a GPU, and where all tensors have to be surveyed before the first is made, they are threads.
    """

    def __init__(self, task: Task) -> None:
        """Raises UsageError for a device that is not there, and if a whole tensor does not fit into the memory."""
        self._task = task
        torch.set_num_threads(1)  # the workers are the parallelism; a pool of threads could not be copied
        devices = [device for device in choose_devices(task.options.device) if device.has_float64]
        self._device = devices[0] if devices else Device("cpu")
        self._merges = [
            (file.relative, tensor, merge_of(task.plan, tensor))
            for file, tensor in task.plan.tensors()
            if tensor.merge is not None
        ]
        self._scales = {(file.relative, other.scale_of): other for file, other in task.plan.tensors() if other.scale_of}
        self._agreeing = [merge for _, tensor, merge in self._merges if _is_global(tensor)]
        self._jobs = list(itertools.chain.from_iterable(self._split(*each) for each in self._merges))
        workers, self._elements = self._shares_of_memory()
        self._workers = workers
        self._inputs = [place for place, each in enumerate(task.plan.inputs) if each.has_tensors]
        if len(self._inputs) <= MANY_FILES:
            for place in self._inputs:
                with task.files.using(place):
                    pass  # its header is read here, once, and not by every worker
        is_apart = self._device.is_cpu and not self._agreeing
        self._crew: Crew | None = self._start(self._work) if is_apart else None

    def _start(self, work: Callable[[Shift], _Found]) -> Crew:
        task = self._task
        if self._device.is_cpu and not self._agreeing:
            return start_crew(self._workers, len(self._jobs), work, task.team, task.progress)
        shares = [range(place, place + 1) for place in range(len(self._jobs))]
        return Threads(self._workers, shares, work, task.team, task.progress)

    def _split(self, relative: str, tensor: TensorPlan, merge: Merge) -> Sequence[_Job]:
        """The jobs that make one tensor."""
        height, width = merge.view
        has_passes = not _is_global(tensor) and next(iter(merge.passes()), None) is not None
        rows = max(1, _PART_ELEMENTS // max(1, width))
        if merge.whole or has_passes or tensor.is_rescaled:
            return [_Job(tensor, relative, merge, None, self._scales.get((relative, tensor.name)))]
        return [
            _Job(tensor, relative, merge, range(first, min(height, first + rows)), None)
            for first in range(0, height, rows)
        ]

    def _shares_of_memory(self) -> tuple[int, int]:
        """(workers, elements of a chunk). Raises UsageError if a whole tensor needs more memory than there is."""
        options = self._task.options
        wanted = min(options.threads or min(MAX_WORKERS, os.cpu_count() or 1), max(1, len(self._jobs)))
        whole = max((tensor for _, tensor, merge in self._merges if merge.whole), key=whole_bytes, default=None)
        if whole is not None and whole.merge is not None:
            needed = whole_bytes(whole)
            if needed > options.memory:
                raise UsageError(
                    f"{whole.merge.method} sees a tensor at once, and {whole.name} {list(whole.shape)} of "
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
        largest = _CHUNK_ELEMENTS if self._device.is_cpu else _GPU_CHUNK_ELEMENTS
        return workers, max(_SMALLEST_CHUNK, min(largest, options.memory // workers // each))

    def join(self) -> tuple[list[tuple[str, Survival]], dict[str, dict[str, int]]]:
        """Wait for the workers; raise what they, or the team, met.

        Returns what survived of the updates, by component, and what was clamped, as in `Measured`.
        """
        if self._agreeing:
            self._start(self._survey).join()
            self._agreeing[0].agree(self._agreeing)
        if self._crew is None:
            self._crew = self._start(self._work)
        survivals: list[tuple[str, Survival]] = []
        clamped: dict[str, Counter[str]] = {}
        for found in self._crew.join():
            for (component, name), survival in found.items():
                survivals.append((component, survival))
                if survival.clamped:
                    clamped.setdefault(component, Counter())[name] += survival.clamped
        return survivals, {component: dict(sorted(each.items())) for component, each in sorted(clamped.items())}

    def stop(self) -> None:
        """End the work, if it has not ended."""
        if self._crew is not None:
            self._crew.stop()

    def _survey(self, shift: Shift) -> _Found:
        """The life of a worker that makes the passes of all tensors."""
        with Output(self._task.targets) as output:
            worker = _Worker(self._task, self._device, self._elements, output)
            while (numbers := shift.next()) is not None:
                for job in (self._jobs[number] for number in numbers):
                    if job.rows is None or job.rows.start == 0:
                        worker.tensor(job).survey(shift.check)
        return {}

    def _work(self, shift: Shift) -> _Found:
        """The life of a worker."""
        survivals: _Found = {}
        with ExitStack() as opened:
            if len(self._inputs) <= MANY_FILES:
                for place in self._inputs:
                    opened.enter_context(self._task.files.using(place))
            output = opened.enter_context(Output(self._task.targets))
            worker = _Worker(self._task, self._device, self._elements, output)
            while (numbers := shift.next()) is not None:
                for job in (self._jobs[number] for number in numbers):
                    key = job.tensor.component, job.tensor.name
                    survivals[key] = survivals.get(key, NOTHING) + worker.carry(job, shift)
        return survivals


class _Worker:
    """The buffers of one worker, and the output that it writes."""

    def __init__(self, task: Task, device: Device, elements: int, output: Output) -> None:
        """elements: of a chunk of each model, at most."""
        self._task, self._elements, self._output = task, elements, output
        self._desk = Desk(device)

    def tensor(self, job: _Job) -> MergedTensor:
        """The tensor of a job, ready to be worked on."""
        task = self._task
        return MergedTensor(task.plan, job.tensor, job.merge, task.files, self._desk, self._elements, task.forgets)

    def carry(self, job: _Job, shift: Shift) -> Survival:
        """Make and write the rows of a job; what survived of what was added to them."""
        self._output.turn_to(job.relative)
        merged, survival = self.tensor(job), NOTHING
        if job.rows is None:
            merged.survey(shift.check)
        work = merged.work()
        size = DTYPES[job.tensor.dtype].bits // 8
        for finished in merged.finished(work, job.rows):
            shift.check()
            self._write(job.tensor, finished.begin * size, finished.data, shift)
            survival += finished.survival
        if job.scale is not None and isinstance(work, Rescaled):
            self._write(job.scale, 0, work.scale_bytes, shift)
        return survival

    def _write(self, tensor: TensorPlan, begin: int, data: memoryview, shift: Shift) -> None:
        """Write bytes of a tensor of the open output, from its byte `begin` on."""
        write_at(self._output.descriptor, data, self._output.data_start + tensor.span[0] + begin)
        shift.advance(len(data))
