"""The undo file of an output: drafted beside it, proved, and put into its place just before the output is."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from bake.errors import InputError, Mismatch, OutputExists, OutputRefused, Unsupported, VerificationFailed
from bake.execute.task import MAX_WORKERS
from bake.interrupts import uninterrupted
from bake.io.draft import Draft
from bake.io.files import open_for_writing
from bake.io.moves import remove
from bake.io.packing import best_packing
from bake.io.target import aside_of, check_target, refusal_of
from bake.io.tensorfile import SafetensorsFile, open_tensors
from bake.io.undo import Files, Source, UndoReader, UndoWriter, is_storable, undo_place
from bake.plan.model import Input, Plan
from bake.progress import Progress


def check_undo_place(plan: Plan, output: Path, sizes: Mapping[str, int], overwrite: bool) -> None:
    """Raise Unsupported if nothing can be kept of this base, or the OutputRefused that writing it would meet.

    sizes: bytes of the output's weight files, by relative path.
    """
    if not _has_the_bases_files(plan):
        raise Unsupported(
            f"--keep-undo compares the output with the base file by file, and here it gets other files than "
            f"{plan.base.name} has: keep the base itself, or bake without --keep-undo."
        )
    for source in _sources(plan):
        if source.is_weights and not isinstance(open_tensors(source.path), SafetensorsFile):
            raise Unsupported(
                f"{source.path} is a PyTorch file, of which an undo file would have to hold everything: keep the file "
                f"itself, or bake without --keep-undo.",
                path=str(source.path),
            )
        if source.name and not is_storable(source.name):
            raise Unsupported(
                f"{source.path}: an undo file cannot hold this name: it has to be text without ':' and '\\'. Rename "
                f"it, or bake without --keep-undo.",
                path=str(source.path),
            )
    place = undo_place(output)
    is_left = _is_left(place, output, sizes)
    check_target(place, [source.path for source in plan.inputs], False, overwrite or is_left, 0)


def _bases(plan: Plan) -> list[Input]:
    """The weight files of the base."""
    return [source for source in plan.inputs if source.role == "base"]


def _has_the_bases_files(plan: Plan) -> bool:
    """True if each weight file of the output takes the place of one of the base's, and none is missing."""
    bases = _bases(plan)
    if plan.packaging != plan.base_packaging or len(bases) != len(plan.files):
        return False
    names = [each.path.relative_to(plan.base).as_posix() for each in bases] if plan.base.is_dir() else None
    return names is None or names == [file.relative for file in plan.files]


def _sources(plan: Plan) -> list[Source]:
    """The files of the base that those of the output take the place of."""
    is_stack = plan.packaging == "stack"
    weights = [
        Source(base.path.name if is_stack else file.relative, base.path, file.relative, True)
        for file, base in zip(plan.files, _bases(plan), strict=True)
    ]
    beside = [(side.relative, plan.base / side.relative) for side in plan.side_files]
    return weights + [Source(name, path, name, False) for name, path in beside if path.is_file()]


def _is_left(place: Path, output: Path, sizes: Mapping[str, int]) -> bool:
    """True if there is an undo file without its output: a run killed just before its output was there may have left it.

    Whether it is what this run would write is known when that has been written.
    """
    if os.path.lexists(output) or not place.is_file():
        return False
    try:
        found = UndoReader(place)
    except (InputError, Unsupported):
        return False
    return sizes.items() <= {file.name: file.size for file in found.record.output}.items()


class UndoFile:
    """The undo file under construction; leaving the block removes what was not published."""

    def __init__(self, plan: Plan, output: Path, sizes: Mapping[str, int], overwrite: bool) -> None:
        """sizes: as for `check_undo_place`."""
        self.place = undo_place(output)
        self.bytes = 0
        self._plan, self._output, self._overwrite = plan, output, overwrite
        self._is_left = _is_left(self.place, output, sizes)
        self._draft = Draft(self.place, {"": 0}, overwrite or self._is_left)
        self._aside: Path | None = None  # where the undo file of the old output is
        self._had_aside = False

    @property
    def leftover(self) -> bool:
        """True if something that a killed run had left was removed."""
        return self._draft.leftover or self._had_aside

    def __enter__(self) -> UndoFile:
        """Create the draft. Raises OutputRefused and its kin."""
        try:
            self._had_aside = _put_back(self._output)
        except OSError as error:
            raise refusal_of(error, self.place) from None
        self._draft.__enter__()
        return self

    def write(self, output: Files, threads: int | None, version: str, progress: Progress) -> None:
        """Keep what the finished files of the output do not hold of the base.

        Raises InputError, VerificationFailed for files of the output that cannot be read, and the disk's OSError.
        """
        sources = _sources(self._plan)
        progress.start("keeping undo data", sum(source.path.stat().st_size for source in sources))
        descriptor = open_for_writing(self._draft.path)
        try:
            writer = UndoWriter(descriptor, best_packing(), workers(threads), progress.advance)
            writer.write(sources, output, version)
        except InputError as error:
            if error.details.get("path") not in {str(output(source.like)) for source in sources}:
                raise
            raise VerificationFailed(
                f"{self._output} was not written: its finished draft cannot be read back: {error.message}",
                path=str(self._output),
            ) from None
        finally:
            os.close(descriptor)
        self.bytes = self._draft.path.stat().st_size
        progress.finish()

    def check(self, output: Files, threads: int | None, progress: Progress) -> None:
        """Raise VerificationFailed unless the base comes back from the drafts, by its SHA-256."""
        try:
            wrong = self._wrong(output, workers(threads), progress)
        except InputError as error:
            wrong = error.message
        if wrong is not None:
            raise VerificationFailed(
                f"{self._output} was not written: its undo data does not give back the base: {wrong}",
                path=str(self._output),
            )

    def _wrong(self, output: Files, threads: int, progress: Progress) -> str | None:
        """Which file of the base does not come back. Raises InputError if the draft cannot be read back."""
        reader = UndoReader(self._draft.path)
        try:
            progress.start("proving undo data", sum(file.size for file in reader.record.base))
            for place, file in enumerate(reader.record.base):
                digest = hashlib.sha256()
                for piece in reader.pieces(place, output, threads):
                    digest.update(piece)
                    progress.advance(len(piece))
                if digest.hexdigest() != file.sha256:
                    return f"{file.name or 'it'} has another SHA-256"
        finally:
            reader.close()
        progress.finish()
        return None

    def seal(self) -> None:
        """Bring the file to the disk. Raises OutputRefused if the disk refuses."""
        self._draft.seal()

    def publish(self) -> None:
        """Put the file into its place; that of the old output waits beside. Raises OutputRefused and its kin."""
        if os.path.lexists(self.place):
            try:
                if not self._overwrite and not filecmp.cmp(self._draft.path, self.place, shallow=False):
                    raise OutputExists(
                        f"{self.place} exists and is of another output; use --overwrite to replace it",
                        path=str(self.place),
                    )
                os.replace(self.place, aside_of(self.place))
            except OSError as error:
                raise refusal_of(error, self.place) from None
            self._aside = aside_of(self.place)
        try:
            self._draft.publish()
        except OutputRefused as error:
            if not self._draft.is_published:
                raise
            raise OutputRefused(
                f"{self.place}: the system failed: {error.details['reason']}; the output was not written",
                path=str(self.place),
            ) from None

    def withdraw(self) -> None:
        """Have everything as it was: the output that the file belongs to did not get into its place."""
        with suppress(OSError):  # what is raised already matters more
            if self._draft.is_published:
                self.place.unlink()
            if self._aside is not None:
                os.replace(self._aside, self.place)
        self._aside = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._draft.__exit__(kind, error, traceback)
        try:
            if self._aside is not None:
                remove(self._aside)
        except OSError as failure:
            if error is None:
                raise OutputRefused(
                    f"{self._output} is complete and in place, but the undo file of the old one could not be removed: "
                    f"{self._aside}: {failure.strerror or failure}",
                    path=str(self._output),
                ) from None


def workers(threads: int | None) -> int:
    """How many threads pack or unpack, where `threads` were asked for."""
    return threads or min(MAX_WORKERS, os.cpu_count() or 1)


def _put_back(output: Path) -> bool:
    """Put back the old undo file that a killed run had set aside, if the old output is still there.

    Returns whether there was one. Raises OSError.
    """
    place = undo_place(output)
    aside = aside_of(place)
    if not os.path.lexists(aside):
        return False
    with uninterrupted():
        if _belongs(aside, output):
            os.replace(aside, place)
        else:
            remove(aside)
    return True


def _belongs(undo: Path, output: Path) -> bool:
    try:
        return UndoReader(undo).difference_to(output) is None
    except (InputError, Unsupported):
        return False


def open_undo(output: Path) -> UndoReader:
    """The undo file of `output`, or the one that a killed run has set aside while the output is still the old one.

    Raises InputError if there is none or it is malformed, Mismatch if it belongs to another output.
    """
    place = undo_place(output)
    found = [path for path in (place, aside_of(place)) if os.path.lexists(path)]
    if not found:
        raise InputError(
            f"{place}: there is no such file. 'bake fuse --keep-undo' writes one beside its output, and it has to lie "
            f"there and be called like it.",
            path=str(place),
        )
    readers = [UndoReader(path) for path in found]
    differences = [reader.difference_to(output) for reader in readers]
    for reader, difference in zip(readers, differences, strict=True):
        if difference is None:
            return reader
    raise Mismatch(f"{found[0]} does not belong to {output}: {differences[0]}", path=str(output))
