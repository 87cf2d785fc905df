"""What is done to whole files and folders: brought to the disk, renamed in one step, removed."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

from bake.io.target import aside_of

_AT_FDCWD, _NO_REPLACE, _EXCHANGE = -100, 1, 2

# What is answered where these flags are not known, also by sandboxes.
_NOT_KNOWN = {errno.EINVAL, errno.ENOSYS, errno.EPERM}
# What is answered where a folder cannot be synced, or this user may not.
_CANNOT_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, where the system can do that; raises OSError."""
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def rename_new(path: Path, place: Path) -> None:
    """Rename a file or a folder to where nothing is, or an empty folder; raises OSError, FileExistsError too."""
    if path.is_dir():
        if sys.platform == "win32" and place.is_dir():
            place.rmdir()
        path.rename(place)  # refuses to replace what is not empty
    elif not _rename_with(path, place, _NO_REPLACE):
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
        os.replace(path, place)


def exchange(path: Path, place: Path) -> Path:
    """Put the folder `path` into the place of another: in one step where the system can (Linux), else in two.

    Returns where the other is now. Raises OSError.
    """
    if _rename_with(path, place, _EXCHANGE):
        return path
    aside = aside_of(place)
    os.replace(place, aside)
    try:
        os.replace(path, place)
    except BaseException:
        os.replace(aside, place)
        raise
    return aside


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; raises OSError for the first thing that stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            shutil.rmtree(path)  # says what is left and why
    else:
        path.unlink(missing_ok=True)


def _rename_with(old: Path, new: Path, flag: int) -> bool:
    """Rename in Linux's way with a flag; False where that is not known. Raises OSError."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_KNOWN:
        return False
    raise OSError(number, os.strerror(number), str(new))
