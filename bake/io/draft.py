"""An output is written beside its place and moved there when it is whole: the old file, or the new one.

The draft of OUT is `.OUT.bake-draft`. Its name is fixed and it is locked while a run writes it, so a
second run on the same output is told, and what `kill -9` left behind is found and removed; or gone on with, if
both runs keep a journal and are the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bake.errors import BakeError, InputChanged, NonFinite, OutputBusy, OutputExists, OutputRefused, VerificationFailed
from bake.interrupts import RESUMABLE, kept, uninterrupted
from bake.io.journal import Journal
from bake.io.moves import exchange, remove, rename_new, sync_file, sync_folder
from bake.io.target import aside_of, draft_of, is_taken, journal_of, refusal_of

try:
    import fcntl
except ImportError:  # Windows
    _CAN_LOCK = False
else:
    _CAN_LOCK = True

# What a rename answers if there is something where nothing should be.
_IN_THE_WAY = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
# Refusals after which there is nothing to go on with: they would come again, or the draft is not what it should be.
_FINAL = (NonFinite, InputChanged, VerificationFailed)


class Draft:
    """The output under construction: `publish` moves it into place, leaving the block otherwise removes it.

    With a journal it is left for another run to go on with, unless that would be in vain.
    """

    def __init__(
        self, place: Path, sizes: Mapping[str, int], overwrite: bool = False, run: Mapping[str, Any] | None = None
    ) -> None:
        """Nothing is created before the block is entered.

        place: as `check_target` gave it. sizes: bytes by relative path; {"": n} for a single file.
        overwrite: what is in the place when the draft is published may be replaced. run: see `Journal`; None: there
        is to be none.
        """
        self.place = place
        self.path = draft_of(place)
        self.is_folder = "" not in sizes
        self.journal = None if run is None else Journal(journal_of(place), run)
        self.started_over: str | None = None  # why the draft of an earlier run is not gone on with
        self.leftover = False  # something that a killed run had left was removed
        self.is_published = False
        self.has_replaced = False  # published where something was
        self._sizes, self._overwrite = dict(sizes), overwrite
        self._is_sealed = self._is_resumed = False
        self._lock = -1

    def __enter__(self) -> Draft:
        """Create the draft with its disk space reserved.

        Raises OutputBusy if another run is writing the same output, OutputExists if something appeared there since
        the place was checked, NoSpace or OutputRefused if the disk refuses.
        """
        try:
            with uninterrupted():
                self._lock = self._claim()
                self._tidy()
            if not self._overwrite and is_taken(self.place):
                raise self._taken()
            if self._is_resumed:
                self._strip()
            for relative, size in self._sizes.items():
                self._create(relative, size)
            if self.journal is not None and not self._is_resumed:
                self.journal.start(os.fstat(self._lock).st_ino)
        except BaseException as error:
            refusal = refusal_of(error, self.place) if isinstance(error, OSError) else error
            self.__exit__(type(refusal), refusal, None)
            raise refusal from None
        return self

    def file(self, relative: str) -> Path:
        """Where the output file `relative` is under construction."""
        return self.path / relative if relative else self.path

    def _claim(self) -> int:
        """Take the draft's name for this process; returns the locked descriptor."""
        while True:
            made = _make_folder(self.path) if self.is_folder else _make_file(self.path)
            if made is None and not _CAN_LOCK:
                remove(self.path)  # Windows removes nothing that a run has open
                self.leftover = True
                if self.journal is not None:
                    self.started_over = "this system cannot tell whether a run is at work on it"
                continue
            descriptor = _open_found(self.path) if made is None else made
            if descriptor is None:
                continue  # its owner finished meanwhile
            owned = False
            try:
                owned = self._owns(descriptor, made is not None)
            except OSError:
                if made is not None:
                    remove(self.path)
                raise
            finally:
                if not owned:
                    os.close(descriptor)
            if owned:
                return descriptor

    def _owns(self, descriptor: int, is_new: bool) -> bool:
        """True if the draft that is open is ours, and locked; False if its name is free now.

        A draft that is found and that nobody has locked is what a killed run left. Unless it is one to go on with, it
        is removed rather than written into: it may have another name.
        """
        is_locked = _lock(descriptor)
        if is_locked is False:
            raise OutputBusy(f"{self.place} is being written by another bake at this moment", path=str(self.place))
        if _CAN_LOCK and not _is_still(descriptor, self.path):
            return False  # its owner finished between our opening and locking it
        if is_new:
            return True
        if is_locked is None:
            raise OutputBusy(
                f"{self.place} may be being written by another bake: there is {self.path}, and this file system "
                f"has no locks to tell. Remove that if no bake is running.",
                path=str(self.place),
            )
        if self.journal is not None:
            self.started_over = self._why_not(os.fstat(descriptor), self.journal)
            if self.started_over is None:
                self._is_resumed = True
                return True
        remove(self.path)
        self.leftover = True
        return False

    def _why_not(self, found: os.stat_result, journal: Journal) -> str | None:
        """Why the draft that was found cannot be gone on with; None if it can."""
        is_ours = stat.S_ISDIR(found.st_mode) if self.is_folder else _is_sole(found)
        return journal.load(found.st_ino) if is_ours else "it is no file of its own"

    def _strip(self) -> None:
        """Leave of a folder that is gone on with only the weight files."""
        for path in self.path.rglob("*") if self.is_folder else ():
            status = path.lstat()
            is_kept = path.relative_to(self.path).as_posix() in self._sizes and _is_sole(status)
            if not (is_kept or stat.S_ISDIR(status.st_mode)):
                path.unlink()

    def _tidy(self) -> None:
        """Put back, or remove, the old folder that a run set aside and was killed; remove a journal without draft."""
        journal = journal_of(self.place)
        if not self._is_resumed and os.path.lexists(journal):
            remove(journal)
            if self.journal is not None:
                self.started_over = self.started_over or "its draft is gone"
        aside = aside_of(self.place)
        if not self.is_folder or not os.path.lexists(aside):
            return
        if os.path.lexists(self.place):
            remove(aside)
            self.leftover = True
        else:
            os.replace(aside, self.place)

    def _create(self, relative: str, size: int) -> None:
        if not self.is_folder:
            self._fit(self._lock, size)
            return
        path = self.file(relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_found(path) if self._is_resumed else None
        if descriptor is None:
            descriptor = _open_new(path)
        try:
            self._fit(descriptor, size)
        finally:
            os.close(descriptor)

    def _fit(self, descriptor: int, size: int) -> None:
        if self._is_resumed:
            os.ftruncate(descriptor, size)  # it may be longer
        _reserve(descriptor, size)

    def seal(self) -> None:
        """Bring all of the draft to the disk. Raises OutputRefused if the disk refuses."""
        if self._is_sealed:
            return
        try:
            paths = sorted(self.path.rglob("*"), reverse=True) if self.is_folder else []
            for path in (*paths, self.path):
                sync_folder(path) if path.is_dir() else sync_file(path)
        except OSError as error:
            raise refusal_of(error, self.place) from None
        self._is_sealed = True

    def publish(self) -> None:
        """Seal the draft and put it in the output's place in one step, which no signal interrupts.

        Raises OutputExists if something appeared there, OutputRefused if the system refuses. If `is_published` is
        false then, the old output is still in place.
        """
        self.seal()
        with uninterrupted():
            try:
                old = self._move()
            except OSError as error:
                if not self._overwrite and error.errno in _IN_THE_WAY:
                    raise self._taken() from None
                raise refusal_of(error, self.place) from None
            self.is_published = True
            try:
                sync_folder(self.place.parent)
                if self.journal is not None:
                    self.journal.remove()
                if old is not None:
                    remove(old)
            except OSError as error:
                reason = f"{error.strerror or error} ({error.filename or self.place.parent})"
                raise OutputRefused(
                    f"{self.place} is complete and in place, but the system failed after that: {reason}",
                    path=str(self.place),
                    reason=reason,
                ) from None
            finally:
                self._release()

    def _move(self) -> Path | None:
        """Rename the draft; returns where the old folder is now, if there was one. Raises OSError."""
        if _CAN_LOCK and not _is_still(self._lock, self.path):
            raise FileNotFoundError(
                errno.ENOENT, "its draft was removed or replaced by another program", str(self.path)
            )
        if not _CAN_LOCK:
            self._release()  # Windows does not rename an open file
        if not self._overwrite or not is_taken(self.place):
            rename_new(self.path, self.place)
            return None
        self.has_replaced = True
        if self.is_folder:
            return exchange(self.path, self.place)
        os.replace(self.path, self.place)
        return None

    def discard(self) -> None:
        """Remove the draft, unless it was published; the output's place stays as it was. Raises OSError."""
        with uninterrupted():
            try:
                if self._lock >= 0 and not self.is_published and (not _CAN_LOCK or _is_still(self._lock, self.path)):
                    if not _CAN_LOCK:
                        self._release()
                    remove(self.path)
                    if self.journal is not None:
                        self.journal.remove()
            finally:
                self._release()

    def _is_kept(self, error: BaseException | None) -> bool:
        """True if what is finished can be gone on with after that error."""
        is_ours = self._lock >= 0 and not self.is_published
        is_in_vain = error is None or isinstance(error, _FINAL)
        return self.journal is not None and is_ours and not is_in_vain and self.journal.has_spans

    def _release(self) -> None:
        if self._lock >= 0:
            with contextlib.suppress(OSError):  # nothing was written through it
                os.close(self._lock)
            self._lock = -1

    def _taken(self) -> OutputExists:
        return OutputExists(
            f"{self.place} appeared while bake was at work; use --overwrite to replace it", path=str(self.place)
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_kept(error):
            self._release()
            kept.append(self.place)
            if isinstance(error, BakeError):
                error.message += f"; {RESUMABLE}"
            return
        try:
            self.discard()
        except OSError as failure:
            said = f"its draft {self.path} could not be removed: {failure.strerror or failure}"
            if isinstance(error, BakeError):
                error.message += f"; {said}"
            elif error is None:
                raise OutputRefused(f"{self.place}: {said}", path=str(self.place)) from None


def _make_folder(path: Path) -> int | None:
    """A descriptor of the new folder `path` (Windows has none: of nothing); None if the name is taken."""
    try:
        path.mkdir()
    except FileExistsError:
        return None
    try:
        return os.open(path if _CAN_LOCK else os.devnull, os.O_RDONLY)
    except FileNotFoundError:  # another run took it for a leftover
        return None
    except OSError:
        path.rmdir()
        raise


def _make_file(path: Path) -> int | None:
    """A descriptor of the new file `path`; None if the name is taken."""
    try:
        return _open_new(path)
    except FileExistsError:
        return None


def _open_new(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)


def _open_found(path: Path) -> int | None:
    """A descriptor of the file or folder `path`, to lock it by; None if it is gone. Raises OSError for links."""
    try:
        # Some network file systems lock only what is open for writing.
        access = os.O_RDONLY if stat.S_ISDIR(path.lstat().st_mode) else os.O_RDWR
        return os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None


def _is_sole(status: os.stat_result) -> bool:
    """True for a regular file that has no other name."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _reserve(descriptor: int, size: int) -> None:
    """Make an empty file `size` bytes long, with its space reserved where the file system can do that."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


def _lock(descriptor: int) -> bool | None:
    """Take the exclusive lock; False if another process has it, None where there are no locks."""
    if not _CAN_LOCK:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """True if `path` is the file that `descriptor` has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
