"""A bake undone: what `bake undo` does."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from bake.api import PathLike, publish
from bake.errors import UsageError, VerificationFailed
from bake.execute.undo import open_undo, workers
from bake.io.digest import digest_file
from bake.io.draft import Draft
from bake.io.files import check_exists, inputs_only, open_for_writing, write_at
from bake.io.target import check_target, lies_in, refusal_of
from bake.io.undo import BaseFile, UndoReader
from bake.progress import Progress, Silent


@dataclass(frozen=True)
class Restored:
    """A base that was restored and proved."""

    output: Path
    undone: Path  # the output of the bake
    undo: Path  # the undo file
    files: tuple[BaseFile, ...]  # of the base, each with the SHA-256 that it had and has
    bytes_written: int
    seconds: float
    leftover: bool  # a draft that a killed run had left was replaced


def undo(
    output: PathLike,
    restored: PathLike,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Write to `restored` the base that `output` was made of, bit for bit, and return what was written.

    output: a checkpoint that bake wrote with `keep_undo`, as it was written, with its undo file beside it. restored: a
    .safetensors file, or a folder if the base was more than one file. threads: that unpack; None for one per core.
    Raises Mismatch if `output` or its undo file is another one, InputError if they cannot be read or are damaged,
    VerificationFailed if a restored file has not the SHA-256 that the base had, OutputRefused and its kin. Whatever
    is raised, `restored` is as it was before, unless the message says that it is complete and in place.
    """
    started = time.monotonic()
    progress = progress or Silent()
    source, target = Path(output), Path(restored)
    check_exists(source)
    with inputs_only():
        reader = open_undo(source)
    try:
        sizes = {file.name: file.size for file in reader.record.base}
        place = _checked_place(reader, source, target, sizes, overwrite)
        with Draft(place, sizes, overwrite) as draft:
            try:
                _write(reader, source, draft, workers(threads), progress)
            except OSError as error:
                raise refusal_of(error, place) from None
            _check(reader, draft, target)
            publish(draft, [], target)
    finally:
        reader.close()
    return Restored(
        target,
        source,
        reader.path,
        reader.record.base,
        sum(sizes.values()),
        time.monotonic() - started,
        draft.leftover,
    )


def _checked_place(reader: UndoReader, source: Path, target: Path, sizes: dict[str, int], overwrite: bool) -> Path:
    """Where `target` really lies, or the OutputRefused that writing it would meet."""
    is_folder = reader.record.is_folder
    if not is_folder and target.suffix != ".safetensors":
        raise UsageError(f"{target}: the base is a safetensors file; let its name end in .safetensors")
    if source.is_dir() and lies_in(target.absolute().parent, source):
        raise UsageError(f"{target} lies inside {source}; choose a place outside it")
    inputs = [source, reader.path, *(_located(source, file.name) for file in reader.record.output)]
    return check_target(target, inputs, is_folder, overwrite, sum(sizes.values()))


def _located(root: Path, relative: str) -> Path:
    return root / relative if relative else root


def _write(reader: UndoReader, source: Path, draft: Draft, threads: int, progress: Progress) -> None:
    """Write every file of the base. Raises InputError, and the disk's OSError."""
    progress.start("restoring", sum(file.size for file in reader.record.base))
    for number, file in enumerate(reader.record.base):
        descriptor = open_for_writing(draft.file(file.name))
        try:
            position = 0
            for piece in reader.pieces(number, lambda name: _located(source, name), threads):
                write_at(descriptor, memoryview(piece), position)
                position += len(piece)
                progress.advance(len(piece))
        finally:
            os.close(descriptor)
    progress.finish()


def _check(reader: UndoReader, draft: Draft, target: Path) -> None:
    """Raise VerificationFailed unless every file has the SHA-256 that the base's had."""
    for file in reader.record.base:
        found = digest_file(draft.file(file.name)).sha256
        if found != file.sha256:
            raise VerificationFailed(
                f"{target} was not written: {file.name or 'the base'} came back with the SHA-256 {found[:12]}..., and "
                f"{reader.path} says {file.sha256[:12]}...: it is damaged",
                path=str(target),
            )
