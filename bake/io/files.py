"""Reading, writing and copying byte ranges of open files: whole ranges or an error, never less."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bake.errors import InputError

# Writes of 128 to 512 KiB were three times faster than larger ones where this was measured.
WRITE_PIECE = 256 * 1024
READ_PIECE = 1024 * 1024
COPY_PIECE = 64 * 1024 * 1024


_WRITE = 2  # SYNC_FILE_RANGE_WRITE of Linux
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def check_exists(path: Path) -> None:
    """Raise InputError if there is nothing at `path`, or nothing that the system lets be seen."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: there is no such file or folder", path=str(path)) from None
    except OSError as error:  # too long a name, a folder without permission
        raise InputError(f"{path}: cannot be opened: {error.strerror}", path=str(path)) from None


def open_for_reading(path: Path) -> int:
    """A file descriptor for the regular file `path`; raises InputError if it is none or cannot be opened."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait for its writer
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}", path=str(path)) from None
    try:
        if stat.S_ISREG(status_of(fd, path).st_mode):
            return fd
        raise InputError(f"{path}: a regular file was expected, this is a pipe, a device or a folder", path=str(path))
    except BaseException:
        close_input(fd)
        raise


def close_input(fd: int) -> None:
    """Close a file that was only read: nothing is lost if the system complains."""
    with contextlib.suppress(OSError):
        os.close(fd)


@contextmanager
def inputs_only() -> Iterator[None]:
    """For work that only reads: what the system refuses within the block is an InputError that names the file."""
    try:
        yield
    except OSError as error:
        path = str(error.filename)
        raise InputError(f"{path}: cannot be read: {error.strerror or error}", path=path) from None


def status_of(fd: int, path: Path) -> os.stat_result:
    """What the system knows of an open input; raises InputError."""
    try:
        return os.fstat(fd)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", path=str(path)) from None


def open_for_writing(path: Path) -> int:
    """A file descriptor for writing into the existing file `path`; raises OSError."""
    return os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """A file descriptor for `path`, closed at the end of the block."""
    fd = open_for_reading(path)
    try:
        yield fd
    finally:
        close_input(fd)


def _read_positioned(fd: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(fd, [buffer], offset)


def _write_positioned(fd: int, data: memoryview, offset: int) -> int:
    return os.pwrite(fd, data, offset)


_seeking = threading.Lock()  # where there is no positional access (Windows), seek and access are one step


def _read_after_seek(fd: int, buffer: memoryview, offset: int) -> int:
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def _write_after_seek(fd: int, data: memoryview, offset: int) -> int:
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


_POSITIONED = hasattr(os, "preadv")
_read_some = _read_positioned if _POSITIONED else _read_after_seek
_write_some = _write_positioned if _POSITIONED else _write_after_seek


def read_into(fd: int, buffer: memoryview, offset: int, path: object) -> None:
    """Fill `buffer` from byte `offset` on; raises InputError if the file ends before."""
    done = 0
    while done < len(buffer):
        try:
            count = _read_some(fd, buffer[done:], offset + done)
        except OSError as error:
            raise InputError(
                f"{path}: reading failed at byte {offset + done}: {error.strerror}", path=str(path)
            ) from None
        if count == 0:
            raise InputError(
                f"{path}: the file ends at byte {offset + done}, {len(buffer) - done} more were due", path=str(path)
            )
        done += count


def read_bytes(fd: int, begin: int, end: int, path: object) -> bytes:
    """Bytes [begin, end) of the file."""
    buffer = bytearray(end - begin)
    read_into(fd, memoryview(buffer), begin, path)
    return bytes(buffer)


def prefetch(fd: int, begin: int, end: int) -> None:
    """Ask the system to have bytes [begin, end) of the file in memory soon, unless they are there already."""
    if not hasattr(os, "RWF_NOWAIT"):  # Linux
        return
    with contextlib.suppress(OSError):  # not every file system can tell
        try:
            os.preadv(fd, [bytearray(1)], begin, os.RWF_NOWAIT)
        except BlockingIOError:  # a look at one byte costs little, advice about cached pages costs a walk over them
            os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_WILLNEED)


def start_writing(fd: int) -> None:
    """Have the system bring to the disk what is new in the file; where it can be asked to, without waiting for that.

    Raises OSError if the disk refuses; errors that come later are told by fsync.
    """
    if _sync_file_range is None or _sync_file_range(fd, 0, 0, _WRITE) != 0:
        getattr(os, "fdatasync", os.fsync)(fd)


def forget(fd: int, begin: int, end: int) -> None:
    """Tell the system that bytes [begin, end) of the file, if they are on the disk, need no memory any more."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # it is only advice
            os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_DONTNEED)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset`; raises OSError as the system gives it."""
    done = 0
    while done < len(data):
        count = _write_some(fd, data[done : done + WRITE_PIECE], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the system writes no more and does not say why")
        done += count


def copy_range(
    source: int, begin: int, end: int, target: int, offset: int, path: object, progress: Callable[[int], None]
) -> None:
    """Copy bytes [begin, end) of `source` to byte `offset` of `target`, inside the kernel where it can.

    `progress` is told the number of bytes after each piece and may raise to stop the copy.
    """
    in_kernel = hasattr(os, "copy_file_range")
    buffer = memoryview(bytearray(0))
    position = begin
    while position < end:
        count = min(COPY_PIECE if in_kernel else READ_PIECE, end - position)
        if in_kernel:
            try:
                count = os.copy_file_range(source, target, count, position, offset + position - begin)
            except OSError:
                count = 0
            if count == 0:  # not possible here, or one of the two files failed, or ended: plain copying tells which
                in_kernel = False
                continue
        else:
            if len(buffer) == 0:
                buffer = memoryview(bytearray(READ_PIECE))
            piece = buffer[:count]
            read_into(source, piece, position, path)
            write_at(target, piece, offset + position - begin)
        position += count
        progress(count)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a whole file to `target`, which is new; raises InputError, and OSError for the target."""
    with reading(source) as fd, _creating(target) as output:
        copy_range(fd, 0, status_of(fd, source).st_size, output, 0, source, lambda count: None)


def write_file(path: Path, content: bytes) -> None:
    """Make a file; raises OSError."""
    with _creating(path) as output:
        write_at(output, memoryview(content), 0)


@contextmanager
def _creating(path: Path) -> Iterator[int]:
    output = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        yield output
    finally:
        os.close(output)
