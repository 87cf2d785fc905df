"""Runs a plan: the kernel copies what is untouched while the rest is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from bake.execute.survival import NOTHING, Survival
from bake.execute.task import Measured, Options, Target, Task
from bake.garbage import without_collecting
from bake.io.files import COPY_PIECE, copy_range, open_for_writing, write_at
from bake.io.fileset import Expected, FileSet
from bake.io.journal import NoJournal, Span
from bake.io.tensorfile import TensorFile
from bake.plan.model import FilePlan, Plan, TensorPlan
from bake.progress import Progress

if TYPE_CHECKING:
    from bake.execute.merging.pipeline import MergeRun
    from bake.execute.merging.plain import PlainMergeRun
    from bake.execute.plain.pipeline import PlainRun

_COPY_BUFFER = 4 * 1024 * 1024


def outgrows_memory(plan: Plan) -> bool:
    """True if the machine's memory cannot hold all that is read and written; bake then clears it away behind itself."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows has none of this, nor the means to do it
        return False
    return sum(source.size for source in plan.inputs) + plan.data_bytes > memory


class Execution:
    """The run of a plan. Its workers may be copies of this process, which must not have threads when it begins.

    Leaving the block ends them.
    """

    def __init__(
        self, plan: Plan, targets: Mapping[str, Target], options: Options, progress: Progress, journal: NoJournal
    ) -> None:
        """Begin, if that does not need torch. Raises InputError for a file that is no longer what was planned.

        journal: what is finished already, and where it is noted what else is.
        """
        files = FileSet([Expected(source.path, source.size, source.modified) for source in plan.inputs])
        self._task = Task(plan, targets, files, options, progress, outgrows_memory(plan), journal)
        self._computes = any(tensor.is_computed for _, tensor in plan.tensors())
        self._plain: PlainRun | None = None
        self._merge: MergeRun | PlainMergeRun | None = None
        if any(tensor.merge is not None for _, tensor in plan.tensors()):
            self._merge = _merge_run(self._task)
        elif self._computes:
            from bake.execute.plain.pipeline import PlainRun, suits  # brings NumPy

            if suits(plan, options.device):
                self._plain = PlainRun(self._task)

    def run(self) -> Measured:
        """Write the data section of every file; return what survived of the updates, and what was clamped.

        Raises NonFinite, InputError, UsageError for a device that is not there, and the disk's OSError.
        Whatever is raised, nobody is at work any more.
        """
        task = self._task
        task.progress.start("fusing" if task.plan.merge is None else "merging", task.plan.data_bytes)
        task.team.start("copier", lambda: _copy_untouched(task))
        found: list[tuple[str, Survival]] = []
        left: set[tuple[str, str]] | None = None  # tensors (file, name) that need torch; None: all
        clamped: dict[str, dict[str, int]] = {}
        try:
            if self._merge is not None:
                found, clamped = self._merge.join()
                left = {(file.relative, each.name) for file, each in task.plan.tensors() if _is_fused(each)}
            elif self._plain is not None:
                found, left = self._plain.join()
            if self._computes and (left is None or left):
                with without_collecting():
                    from bake.execute.pipeline import Pipeline  # brings torch

                more, also = Pipeline(task, left).run()
                found += more
                clamped = {name: {**clamped.get(name, {}), **also.get(name, {})} for name in clamped | also}
        except BaseException as error:
            task.team.stop(error)
            self.stop()
        task.team.join()
        task.files.check_unchanged()
        task.progress.finish()
        return Measured(_shares(found, task.plan.rounding == "stochastic"), clamped)

    def stop(self) -> None:
        """End the workers that are processes, if they have not ended."""
        for run in (self._plain, self._merge):
            if run is not None:
                run.stop()

    def __enter__(self) -> Execution:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _is_fused(tensor: TensorPlan) -> bool:
    """True if a tensor is computed from one that is stored."""
    return tensor.is_computed and tensor.merge is None


def _merge_run(task: Task) -> MergeRun | PlainMergeRun:
    """The workers of a merge."""
    with without_collecting():
        from bake.execute.merging import plain  # brings NumPy, and torch with the maths of most methods

        is_plain = plain.suits(task.plan, task.options.device)
        if not is_plain:
            from bake.execute.merging.pipeline import MergeRun  # brings torch
    return plain.PlainMergeRun(task) if is_plain else MergeRun(task)


def _shares(found: list[tuple[str, Survival]], by_chance: bool) -> dict[str, float]:
    """What survived of the updates of each component. by_chance: they were rounded so."""
    sums: dict[str, Survival] = {}
    for component, survival in sorted(found, key=lambda each: each[1].numbers):  # whoever came first
        sums[component] = sums.get(component, NOTHING) + survival
    shares = {component: each.mean_share if by_chance else each.share for component, each in sorted(sums.items())}
    return {component: share for component, share in shares.items() if share is not None}


def _copy_untouched(task: Task) -> None:
    def copied(count: int) -> None:
        task.progress.advance(count)
        task.team.check()

    for file in task.plan.files:
        target = task.targets[file.relative]
        output = open_for_writing(target.path)
        try:
            for place, begin, end, offset in _pieces(_copied_spans(file)):
                start = target.data_start + offset
                span = Span(file.relative, start, start + end - begin)
                if task.journal.recall(span, output) is not None:
                    copied(end - begin)
                    continue
                with task.files.using(place) as source:
                    _copy_span(source, begin, end, output, start, copied)
                    if task.forgets:
                        source.forget(begin, end)
                task.journal.note_copied(span, output)
            for tensor in file.tensors:
                if tensor.content is not None:
                    content = memoryview(tensor.content.encode())
                    write_at(output, content, target.data_start + tensor.span[0])
                    copied(len(content))
                if tensor.appended:
                    from bake.execute.appended import write_appended  # brings torch

                    copied(write_appended(tensor, task.files, output, target.data_start))
        finally:
            os.close(output)


def _pieces(spans: Iterable[tuple[int, int, int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """The same byte ranges in pieces that are not too much to copy again."""
    for place, begin, end, offset in spans:
        for first in range(begin, end, COPY_PIECE):
            yield place, first, min(end, first + COPY_PIECE), offset + first - begin


def _copied_spans(file: FilePlan) -> Iterator[tuple[int, int, int, int]]:
    """(input, begin, end, offset in the output) of the byte ranges to copy; neighbours are joined."""
    current: tuple[int, int, int, int] | None = None
    for tensor in file.tensors:
        if not tensor.is_copy:
            continue
        offset = tensor.span[0]
        for stored in tensor.copied:
            place, (begin, end) = stored.input, stored.span
            if current is not None:
                _, first, last, start = current
                if current[0] == place and last == begin and start + last - first == offset:
                    current = (place, first, end, start)
                    offset += end - begin
                    continue
                yield current
            current = (place, begin, end, offset)
            offset += end - begin
    if current is not None:
        yield current


def _copy_span(
    source: TensorFile, begin: int, end: int, output: int, offset: int, copied: Callable[[int], None]
) -> None:
    kernel = source.kernel_span()
    if kernel is not None:
        descriptor, start = kernel
        copy_range(descriptor, start + begin, start + end, output, offset, source.path, copied)
        return
    buffer = memoryview(bytearray(min(end - begin, _COPY_BUFFER)))
    position = begin
    while position < end:
        piece = buffer[: end - position]
        source.read_into(position, piece)
        write_at(output, piece, offset + position - begin)
        copied(len(piece))
        position += len(piece)
