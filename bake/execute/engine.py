"""Runs a plan: the kernel copies what is untouched while torch is imported and the rest is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bake.execute.team import Team
from bake.garbage import without_collecting
from bake.io.files import copy_range, open_for_writing, write_at
from bake.io.fileset import Expected, FileSet
from bake.io.tensorfile import TensorFile
from bake.plan.model import FilePlan, Plan
from bake.progress import Progress

DEFAULT_MEMORY = 512 * 1024 * 1024
_COPY_BUFFER = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Options:
    """How to run; none of it changes what is written."""

    device: str = "auto"
    memory: int = DEFAULT_MEMORY  # bytes for the workers' buffers
    threads: int | None = None  # that compute; None: one per core, at most 8


@dataclass(frozen=True, slots=True)
class Target:
    """One output file being written."""

    path: Path  # of the draft
    data_start: int  # byte at which its data section begins


@dataclass(frozen=True, slots=True)
class Measured:
    """What was seen of the numbers while they were written."""

    survival: dict[str, float] = field(default_factory=dict)  # component -> share of the update left after rounding
    # component -> tensor -> elements beyond the largest 8-bit number, which is written in their place
    clamped: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass
class Task:
    """What the threads of one run share."""

    plan: Plan
    targets: Mapping[str, Target]  # by the output file's relative path
    files: FileSet
    options: Options
    progress: Progress
    forgets: bool  # what was read shall not stay in memory
    team: Team = field(default_factory=Team)


def outgrows_memory(plan: Plan) -> bool:
    """True if the machine's memory cannot hold all that is read and written; bake then clears it away behind itself."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows has none of this, nor the means to do it
        return False
    return sum(source.size for source in plan.inputs) + plan.data_bytes > memory


def execute(plan: Plan, targets: Mapping[str, Target], options: Options, progress: Progress) -> Measured:
    """Write the data section of every file of `plan`; return what survived of the updates, and what was clamped.

    Raises NonFinite, InputError, UsageError for a device that is not there, and the disk's OSError.
    Whatever is raised, all threads have ended.
    """
    files = FileSet([Expected(source.path, source.size, source.modified) for source in plan.inputs])
    task = Task(plan, targets, files, options, progress, outgrows_memory(plan))
    progress.start("fusing", plan.data_bytes)
    task.team.start("copier", lambda: _copy_untouched(task))
    measured = Measured()
    try:
        if any(not (tensor.is_copy or tensor.is_given) for _, tensor in plan.tensors()):
            with without_collecting():
                from bake.execute.pipeline import Pipeline  # brings torch

            measured = Pipeline(task).run()
    except BaseException as error:
        task.team.stop(error)
    task.team.join()
    files.check_unchanged()
    progress.finish()
    return measured


def _copy_untouched(task: Task) -> None:
    def copied(count: int) -> None:
        task.progress.advance(count)
        task.team.check()

    for file in task.plan.files:
        target = task.targets[file.relative]
        output = open_for_writing(target.path)
        try:
            for place, begin, end, offset in _copied_spans(file):
                with task.files.using(place) as source:
                    _copy_span(source, begin, end, output, target.data_start + offset, copied)
                    if task.forgets:
                        source.forget(begin, end)
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


def _copied_spans(file: FilePlan) -> Iterator[tuple[int, int, int, int]]:
    """(input, begin, end, offset in the output) of the byte ranges to copy; neighbours are joined."""
    current: tuple[int, int, int, int] | None = None
    for tensor in file.tensors:
        if not tensor.is_copy:
            continue
        place, (begin, end), offset = tensor.source.input, tensor.source.span, tensor.span[0]
        if current is not None:
            _, first, last, start = current
            if current[0] == place and last == begin and start + last - first == offset:
                current = (place, first, end, start)
                continue
            yield current
        current = (place, begin, end, offset)
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
