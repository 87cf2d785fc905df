"""Merges on the processor by methods that are arithmetic by operators alone: NumPy, in processes of their own.

What is computed is `Merge.blend`, as everywhere, so the bytes are those of the run that uses torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from bake.dtypes import DTYPES
from bake.execute.merging.arrays import ArrayReader
from bake.execute.merging.maths import merge_of, pieces, refusal_of_result
from bake.execute.output import Output
from bake.execute.plain.crew import Shift, start_crew
from bake.execute.plain.desk import Desk
from bake.execute.plain.pipeline import means_processor
from bake.execute.plain.rounding import TooLarge, narrow_all
from bake.execute.survival import Survival
from bake.execute.task import MANY_FILES, MAX_WORKERS, Task
from bake.io.arrays import as_bytes, stored_dtype
from bake.io.files import write_at
from bake.merges.merge import Chunk, Merge
from bake.plan.model import Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

_RUN_ELEMENTS = 32 * 1024  # of each model, at a time: all that is made of them stays in a core's cache
_SMALLEST_RUN = 4 * 1024
_PART_ELEMENTS = 4 * 1024 * 1024  # tensors with more are worked on by several workers
_AHEAD = 8  # jobs that the system is asked to read before a worker comes to them
# Of a worker for each element of a run: the values of a model, as stored and in float64, and what is made of them all.
_BYTES_PER_MODEL = 16
_BYTES_PER_ELEMENT = 48
_STORED = ("F64", "F32", "F16", "BF16")


def suits(plan: Plan, device: str) -> bool:
    """True if everything that `plan` merges can be made here, on the device that was asked for."""
    merged = (tensor for _, tensor in plan.tensors() if tensor.merge is not None)
    return means_processor(device) and plan.rounding == "nearest" and all(_is_plain(plan, each) for each in merged)


def _is_plain(plan: Plan, tensor: TensorPlan) -> bool:
    if tensor.merge is None or tensor.terms or tensor.dtype not in _STORED:
        return False
    stored = (each for share in tensor.merge.shares for each in share.stored)
    return all(each.dtype in _STORED for each in stored) and merge_of(plan, tensor).is_plain


@dataclass(frozen=True, slots=True)
class _Job:
    """Elements of a tensor that one worker takes care of."""

    tensor: TensorPlan
    relative: str  # output file it belongs to
    elements: range


def _jobs(plan: Plan) -> Iterator[_Job]:
    for file, tensor in plan.tensors():
        if tensor.merge is not None:
            count = math.prod(tensor.source.shape)
            for begin in range(0, count, _PART_ELEMENTS):
                yield _Job(tensor, file.relative, range(begin, min(count, begin + _PART_ELEMENTS)))


class PlainMergeRun:
    """The workers of one run. They start at once, before this process has threads: then it can be copied."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._jobs = list(_jobs(task.plan))
        options, models = task.options, max(len(job.tensor.merge.shares) for job in self._jobs if job.tensor.merge)
        memory = options.memory // (models * _BYTES_PER_MODEL + _BYTES_PER_ELEMENT)  # elements
        wanted = options.threads or min(MAX_WORKERS, os.cpu_count() or 1)
        workers = max(1, min(wanted, len(self._jobs), memory // _SMALLEST_RUN))
        self._elements = max(_SMALLEST_RUN, min(_RUN_ELEMENTS, memory // workers))
        self._inputs = [place for place, each in enumerate(task.plan.inputs) if each.has_tensors]
        if len(self._inputs) <= MANY_FILES:
            for place in self._inputs:
                with task.files.using(place):
                    pass  # its header is read here, once, and not by every worker
        for job in self._jobs[:_AHEAD]:
            self._prefetch(job)
        self._crew = start_crew(workers, len(self._jobs), self._work, task.team, task.progress)

    def join(self) -> tuple[list[tuple[str, Survival]], dict[str, dict[str, int]]]:
        """Wait for the workers; raise what they, or the team, met. Nothing is ever added or clamped here."""
        self._crew.join()
        return [], {}

    def stop(self) -> None:
        """End the work, if it has not ended."""
        self._crew.stop()

    def _prefetch(self, job: _Job) -> None:
        """Ask the system to have what is needed for it in memory soon."""
        assert job.tensor.merge is not None
        for share in job.tensor.merge.shares:
            for stored, first, place in pieces(share, job.elements.start, job.elements.stop):
                size = DTYPES[stored.dtype].bits // 8
                begin = stored.span[0] + first * size
                with self._task.files.using(stored.input) as file:
                    file.prefetch(begin, begin + (place.stop - place.start) * size)

    def _work(self, shift: Shift) -> None:
        """The life of a worker."""
        with ExitStack() as opened, np.errstate(all="ignore"):
            if len(self._inputs) <= MANY_FILES:
                for place in self._inputs:
                    opened.enter_context(self._task.files.using(place))
            worker = _Worker(self._task, self._elements, opened.enter_context(Output(self._task.targets)))
            while (numbers := shift.next()) is not None:
                for coming in self._jobs[numbers.start + _AHEAD : numbers.stop + _AHEAD]:
                    self._prefetch(coming)
                for job in self._jobs[numbers.start : numbers.stop]:
                    worker.carry(job, shift)


class _Worker:
    """The buffers of one worker, and the output that it writes."""

    def __init__(self, task: Task, elements: int, output: Output) -> None:
        """elements: of each model, at a time, at most."""
        self._task, self._elements, self._output = task, elements, output
        self._desk = Desk()

    def carry(self, job: _Job, shift: Shift) -> None:
        """Make and write the elements of a job. Raises NonFinite."""
        tensor, task = job.tensor, self._task
        self._output.turn_to(job.relative)
        merge = merge_of(task.plan, tensor)
        reader = ArrayReader(task.plan, tensor, task.files, task.forgets)
        start = self._output.data_start + tensor.span[0]
        for begin in range(job.elements.start, job.elements.stop, self._elements):
            shift.check()
            finished = self._made(merge, tensor, reader, begin, min(job.elements.stop, begin + self._elements))
            write_at(self._output.descriptor, as_bytes(finished), start + begin * finished.itemsize)
            shift.advance(finished.nbytes)

    def _made(self, merge: Merge, tensor: TensorPlan, reader: ArrayReader, begin: int, end: int) -> NDArray[Any]:
        """The elements [begin, end) of the output, as they are to be stored."""
        finished = self._desk.array("finished", stored_dtype(tensor.dtype), (1, end - begin))
        models = reader.elements(begin, end, self._desk)
        values = np.asarray(merge.blend(Chunk(0, cast("list[Tensor]", models))))
        try:
            narrow_all(values, tensor.dtype, finished, self._desk)
        except TooLarge:  # NaN and infinity never get lost on the way, so nobody has looked for them before
            reader.check(models, begin, end)
            raise refusal_of_result(tensor, float(np.abs(values).max())) from None
        return finished
