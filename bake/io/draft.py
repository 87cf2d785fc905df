"""An output is written beside its place and moved there when it is whole: the old file, or the new one.

The draft of OUT is `.OUT.bake-draft`. Its name is fixed and it is locked while a run writes it, so a
second run on the same output is told, and what `kill -9` left behind is found and removed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from bake.errors import NoSpace, OutputBusy, OutputExists, OutputRefused, SameFile
from bake.io.neighbours import neighbour
from bake.sizes import format_bytes

try:
    import fcntl
except ImportError:  # Windows
    _CAN_LOCK = False
else:
    _CAN_LOCK = True

_DRAFT_SUFFIX = ".bake-draft"
_ASIDE_SUFFIX = ".bake-old"
_MODEL_FILES = ("model_index.json", "config.json")


def check_target(target: Path, inputs: Iterable[Path], is_folder: bool, overwrite: bool, needed: int) -> Path:
    """The place that is really written (links followed), after every refusal that can be known now.

    needed: bytes of the whole output. Raises OutputRefused and its kin; nothing is created.
    """
    place = Path(os.path.realpath(target))
    try:
        place.exists()
    except OSError as error:  # too long a name
        raise refusal_of(error, target) from None
    if not place.parent.is_dir():
        raise OutputRefused(f"{target}: the folder {place.parent} does not exist", path=str(target))
    if not os.access(place.parent, os.W_OK):
        raise OutputRefused(f"{target}: no permission to write in {place.parent}", path=str(target))
    for source in inputs:
        if _is_inside(source, place) or (place.exists() and source.exists() and os.path.samefile(place, source)):
            raise SameFile(f"{target} is, or contains, the input {source}; choose another output", path=str(target))
    if place.exists():
        _check_existing(target, place, is_folder, overwrite)
    free = shutil.disk_usage(place.parent).free
    if needed > free:
        raise NoSpace(
            f"{target}: the output takes {format_bytes(needed)}, {place.parent} has {format_bytes(free)} free",
            needed=needed,
            free=free,
        )
    return place


def _is_inside(path: Path, folder: Path) -> bool:
    real = Path(os.path.realpath(path))
    return folder == real or folder in real.parents


def _check_existing(target: Path, place: Path, is_folder: bool, overwrite: bool) -> None:
    if is_folder and not place.is_dir():
        raise OutputRefused(f"{target} is a file; the output of this base is a folder", path=str(target))
    if not is_folder and not place.is_file():
        raise OutputRefused(f"{target} is not a regular file; the output of this base is one", path=str(target))
    if not overwrite and not (place.is_dir() and not any(place.iterdir())):
        raise OutputExists(f"{target} exists; use --overwrite to replace it", path=str(target))
    if is_folder and any(place.iterdir()):
        is_model = any((place / name).is_file() for name in _MODEL_FILES) or any(place.glob("*.safetensors"))
        if not is_model:
            raise OutputExists(
                f"{target} is a folder that does not look like a model; bake replaces only models. "
                f"Remove it, or choose another output.",
                path=str(target),
            )


class Draft:
    """The output under construction: `publish` moves it into place, leaving the block otherwise removes it."""

    def __init__(self, place: Path, sizes: Mapping[str, int]) -> None:
        """Create the draft of `place` with its disk space reserved.

        place: as `check_target` gave it. sizes: bytes by relative path; {"": n} for a single file.
        Raises OutputBusy if another run is writing `place`, NoSpace or OutputRefused if the disk refuses.
        """
        self.place = place
        self.path = neighbour(place, _DRAFT_SUFFIX)
        self.is_folder = "" not in sizes
        _restore(place)
        self.leftover = False  # a draft of a killed run was found and is being replaced
        self._owned = False
        self._lock = -1
        self._lock = self._claim()
        try:
            for relative, size in sizes.items():
                _create(self.file(relative), size)
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise refusal_of(error, place) from None
            raise

    def file(self, relative: str) -> Path:
        """Where the output file `relative` is under construction."""
        return self.path / relative if relative else self.path

    def _claim(self) -> int:
        """Take the draft's name for this process; returns the locked descriptor."""
        while True:
            try:
                self.leftover |= self.path.exists()
                lock = _open_folder(self.path) if self.is_folder else _open_file(self.path)
            except OSError as error:
                raise refusal_of(error, self.place) from None
            if not _lock(lock):
                os.close(lock)
                raise OutputBusy(f"{self.place} is being written by another bake at this moment", path=str(self.place))
            if not _CAN_LOCK or _is_still(lock, self.path):
                break
            os.close(lock)  # its owner finished between our opening and locking it
            self.leftover = False
        self._owned = True
        if self.leftover and self.is_folder:
            for entry in self.path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        elif self.leftover:
            os.truncate(self.path, 0)
        return lock

    def publish(self) -> None:
        """Bring everything to the disk, then put the draft in the output's place in one step.

        Raises OutputRefused if the system refuses; the old output is then still in place.
        """
        try:
            for path in sorted(self.path.rglob("*")) if self.is_folder else ():
                _sync(path)
            _sync(self.path)
            if not _CAN_LOCK:
                self._release()  # Windows does not rename an open file
            if self.is_folder and self.place.exists():
                _exchange(self.path, self.place)
                shutil.rmtree(self.path)  # it is the old output now
            else:
                os.replace(self.path, self.place)
            self._owned = False
            _sync(self.place.parent)
        except OSError as error:
            raise refusal_of(error, self.place) from None
        self._release()

    def discard(self) -> None:
        """Remove the draft, unless it was published; the output's place stays as it was."""
        if self._owned:
            self._owned = False
            if not _CAN_LOCK:
                self._release()
            if self.is_folder:
                shutil.rmtree(self.path, ignore_errors=True)
            else:
                self.path.unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.discard()


def refusal_of(error: OSError, place: Path) -> OutputRefused:
    """What an operating system error means for the output at `place`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{place}: the disk is full; nothing was changed", path=str(place))
    return OutputRefused(f"{place}: cannot be written: {error.strerror or error}", path=str(place))


def _open_folder(path: Path) -> int:
    """A descriptor of the folder, created if need be; Windows has none, there it stands for nothing."""
    path.mkdir(exist_ok=True)
    return os.open(path if sys.platform != "win32" else os.devnull, os.O_RDONLY)


def _open_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)


def _create(path: Path, size: int) -> None:
    """A file of `size` bytes whose space is reserved where the file system can do that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open_file(path)
    try:
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the exclusive lock; False if another process has it."""
    if not _CAN_LOCK:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """True if `path` is the file that `descriptor` has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(place: Path) -> Path:
    """Where the old folder waits while the new one takes its place, where that takes two steps."""
    return neighbour(place, _ASIDE_SUFFIX)


def _restore(place: Path) -> None:
    """Put back what a run killed between the two steps of an exchange had set aside."""
    aside = _aside(place)
    if aside.exists() and not place.exists():
        os.replace(aside, place)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: in one step where the system can (Linux), else in two with the old one aside."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    aside = _aside(old)
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except OSError:
        os.replace(aside, old)
        raise
    os.replace(aside, new)
