"""The part of a run that needs no torch: which tensors it can make, and the workers that make them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np

from bake.execute.output import Output
from bake.execute.parts import Part, parts_of
from bake.execute.plain.chains import Chained, is_chain
from bake.execute.plain.crew import Shift, start_crew
from bake.execute.plain.desk import Desk
from bake.execute.plain.rounding import TooLarge
from bake.execute.plain.sums import Sum
from bake.execute.survival import NOTHING, Survival
from bake.execute.task import MANY_FILES, MAX_WORKERS, Task
from bake.io.arrays import as_bytes, stored_dtype
from bake.io.files import write_at
from bake.io.journal import Digest
from bake.keys.factors import as_matrix
from bake.plan.model import Plan, TensorPlan

_BLOCK_ELEMENTS = 2 * 1024 * 1024  # that are read, multiplied and written at a time, where memory allows
_SMALLEST_BLOCK = 64 * 1024
_FIRST_BLOCK = 16 * 1024  # of a tensor, from which the work learns which way is cheaper
_BYTES_PER_ELEMENT = 20  # of a block: stored values in and out, the update in float32 and float64, what rounding needs
_AHEAD = 8  # shares that the system is asked to read before a worker comes to them
_STORED = ("F16", "BF16", "F32")
_GPUS = ("nvidia0", "nvidiactl", "kfd", "dxg")  # what Linux calls them, in /dev
_DISPLAYS = "dri"  # which nearly every machine has, there: torch computes on Intel's, if it is built for that


def suits(plan: Plan, device: str) -> bool:
    """True if everything that `plan` computes can be made here, on the device that was asked for."""
    return means_processor(device) and plan.rounding != "stochastic" and all(map(_is_plain, _computed(plan)))


def means_processor(device: str) -> bool:
    """True if it is known, without asking torch, that what was asked for is the processor."""
    return device == "cpu" or (device == "auto" and not _may_have_gpu())


def _may_have_gpu() -> bool:
    """True unless it is known, without asking torch, that there is none."""
    if not os.path.isdir("/proc/self") or any(os.path.exists(f"/dev/{name}") for name in _GPUS):
        return True
    return os.path.exists(f"/dev/{_DISPLAYS}") and _is_built_for_intel()


def _is_built_for_intel() -> bool:
    """True unless it is known that the torch that is installed cannot compute on Intel's GPUs."""
    from importlib import metadata  # which few need, and is slow to load

    try:
        return "xpu" in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return True


def _computed(plan: Plan) -> Iterator[TensorPlan]:
    return (tensor for _, tensor in plan.tensors() if tensor.is_computed)


def _is_plain(tensor: TensorPlan) -> bool:
    """True for sums of LoRAs, for chains of what is no such sum, and for other dtypes, in 16 bits."""
    is_special = tensor.scale is not None or tensor.is_rescaled or tensor.is_padded or tensor.replaced
    return (
        not is_special
        and tensor.dtype in ("F16", "BF16")
        and tensor.source.dtype in _STORED
        and (_is_sum(tensor) or is_chain(tensor.terms))
        and all(stored.dtype in _STORED for term in tensor.terms for stored in term.factors.values())
    )


def _is_sum(tensor: TensorPlan) -> bool:
    """True for sums of LoRAs, also of none."""
    return all(term.algorithm == "lora" and term.factors.keys() == {"up", "down"} for term in tensor.terms)


class PlainRun:
    """The workers of one run. They start at once, before this process has threads: then it can be copied."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._parts = list(parts_of(task.plan))
        wanted = task.options.threads or min(MAX_WORKERS, os.cpu_count() or 1)
        memory = task.options.memory // _BYTES_PER_ELEMENT  # elements
        workers = max(1, min(wanted, len(self._parts), memory // _SMALLEST_BLOCK))
        self._elements = max(_SMALLEST_BLOCK, min(_BLOCK_ELEMENTS, memory // workers))
        self._inputs = [place for place, source in enumerate(task.plan.inputs) if source.has_tensors]
        if len(self._inputs) <= MANY_FILES:
            for place in self._inputs:
                with task.files.using(place):
                    pass  # its header is read here, once, and not by every worker
        for part in self._parts[:_AHEAD]:
            part.prefetch(task.files)
        self._crew = start_crew(workers, len(self._parts), self._work, task.team, task.progress)

    def join(self) -> tuple[list[tuple[str, Survival]], set[tuple[str, str]]]:
        """Wait for the workers; raise what they, or the team, met.

        Returns what survived of each tensor's update, by component, and the tensors (output file, name) that are
        left to be done, or to be refused, with torch.
        """
        found = sorted(itertools.chain.from_iterable(self._crew.join()))
        left = {self._key(number) for number, survival in found if survival is None}
        done = [
            (number, survival) for number, survival in found if survival is not None and self._key(number) not in left
        ]
        return [(self._parts[number].tensor.component, survival) for number, survival in done], left

    def _key(self, number: int) -> tuple[str, str]:
        return self._parts[number].relative, self._parts[number].tensor.name

    def stop(self) -> None:
        """End the work, if it has not ended."""
        self._crew.stop()

    def _work(self, shift: Shift) -> list[tuple[int, Survival | None]]:
        """The life of a worker; what survived in each part that it took, None where it is nothing for it."""
        found: list[tuple[int, Survival | None]] = []
        with ExitStack() as opened, np.errstate(all="ignore"):
            if len(self._inputs) <= MANY_FILES:
                for place in self._inputs:
                    opened.enter_context(self._task.files.using(place))
            output = opened.enter_context(Output(self._task.targets))
            worker = _Worker(self._task, shift, self._elements, output)
            while (numbers := shift.next()) is not None:
                for coming in self._parts[numbers.start + _AHEAD : numbers.stop + _AHEAD]:
                    coming.prefetch(self._task.files)
                for number in numbers:
                    try:
                        found.append((number, worker.carry(self._parts[number])))
                    except TooLarge:
                        found.append((number, None))
        return found


class _Worker:
    """The buffers of one worker, and the output that it writes."""

    def __init__(self, task: Task, shift: Shift, elements: int, output: Output) -> None:
        """elements: of a block, at most."""
        self._task, self._shift, self._elements = task, shift, elements
        self._desk = Desk()
        self._output = output
        self._work: Sum | Chained | None = None

    def carry(self, part: Part) -> Survival:
        """Finish these rows of their tensor; what survived of their update. Raises TooLarge."""
        self._output.turn_to(part.relative)
        journal, span = self._task.journal, part.span(self._output.data_start)
        measured = journal.recall(span, self._output.descriptor)
        if measured is not None:
            self._shift.advance(span.end - span.begin)
            return Survival.from_numbers(measured)
        digest = journal.digest()
        work = self._work_on(part.tensor)
        columns, survival = as_matrix(part.tensor.view)[1], NOTHING
        first, elements = part.rows.start, _FIRST_BLOCK
        while first < part.rows.stop:
            self._shift.check()
            height = elements // max(1, columns) // work.grain * work.grain
            height = min(part.rows.stop - first, max(work.grain, height))
            survival += self._pass(part.tensor, work, first, (height, columns), digest)
            first, elements = first + height, self._elements
        journal.note(span, digest, survival.numbers)
        return survival

    def _work_on(self, tensor: TensorPlan) -> Sum | Chained:
        """What is to be done to it: that of the part before, if it is of the same tensor."""
        if self._work is None or self._work.plan is not tensor:
            self._work = None  # its factors make room for the next one's
            if _is_sum(tensor):
                self._work = Sum(tensor, self._task.files, self._task.plan.rounding == "fast")
            else:
                self._work = Chained(tensor, self._task.files, self._desk, self._shift.check)
        return self._work

    def _pass(
        self, tensor: TensorPlan, work: Sum | Chained, first: int, shape: tuple[int, int], digest: Digest
    ) -> Survival:
        """Read, compute and write the rows from `first` on."""
        source = tensor.source
        stored = self._desk.array("stored", stored_dtype(source.dtype), shape)
        finished = self._desk.array("finished", np.uint16, shape)
        data = as_bytes(stored)
        begin = source.span[0] + first * shape[1] * stored.itemsize
        with self._task.files.using(source.input) as file:
            file.read_into(begin, data)
            if self._task.forgets:
                file.forget(begin, begin + len(data))
        survival = work.fuse(stored, finished, first, self._desk)
        written = as_bytes(finished)
        write_at(
            self._output.descriptor,
            written,
            self._output.data_start + tensor.span[0] + first * shape[1] * finished.itemsize,
        )
        digest.update(written)
        self._shift.advance(finished.nbytes)
        return survival
