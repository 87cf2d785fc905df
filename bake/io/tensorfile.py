"""One file of named tensors: what it holds is known at once, bytes are read where they are needed."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Protocol

from bake.dtypes import decode_scalar
from bake.errors import InputError, Unsupported
from bake.io.files import (
    close_input,
    forget,
    inputs_only,
    open_for_reading,
    prefetch,
    read_bytes,
    read_into,
    reading,
    status_of,
)
from bake.io.header import Header, TensorInfo, header_length, parse_header

_FEW = 64  # numbers that are read while planning


class TensorFile(Protocol):
    """What the rest of bake needs of a file, whatever its format."""

    path: Path
    size: int  # bytes of the whole file
    modified: int  # nanoseconds; with the next two, to notice a change between plan and run
    changed: int  # nanoseconds, when the system last changed what it knows of the file
    inode: int
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]  # in the order of their bytes
    is_list: bool  # its tensors have no names, only places
    left_out: tuple[str, ...]  # entries of the file beside the tensors of the model, which are not among these

    def read_into(self, begin: int, buffer: memoryview) -> None:
        """Fill `buffer` with the data section's bytes from `begin` on; safe from several threads."""

    def prefetch(self, begin: int, end: int) -> None:
        """Say that these bytes of the data section will be read soon."""

    def forget(self, begin: int, end: int) -> None:
        """Say that these bytes will not be read again."""

    def kernel_span(self) -> tuple[int, int] | None:
        """(file descriptor, byte where the data section starts) for copies inside the kernel, or None."""

    def close(self) -> None:
        """Give the file back; reading opens it again."""


class SafetensorsFile:
    """A .safetensors file: the header is checked on opening, data is read by position, nothing is mapped."""

    is_list = False
    left_out: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._opening = threading.Lock()
        try:
            header = self._read_header()
        finally:
            self.close()
        self.metadata = header.metadata
        self.tensors = header.tensors
        self._data_start = header.data_start

    def _read_header(self) -> Header:
        status = status_of(self._descriptor(), self.path)
        self.size, self.modified = status.st_size, status.st_mtime_ns
        self.changed, self.inode = status.st_ctime_ns, status.st_ino
        prefix = read_bytes(self._descriptor(), 0, min(8, self.size), self.path)
        length = header_length(prefix, self.size, str(self.path))
        text = read_bytes(self._descriptor(), 8, 8 + length, self.path)
        return parse_header(text, self.size, str(self.path))

    def _descriptor(self) -> int:
        with self._opening:
            if self._fd is None:
                self._fd = open_for_reading(self.path)
            return self._fd

    def read_into(self, begin: int, buffer: memoryview) -> None:
        read_into(self._descriptor(), buffer, self._data_start + begin, self.path)

    def prefetch(self, begin: int, end: int) -> None:
        prefetch(self._descriptor(), self._data_start + begin, self._data_start + end)

    def forget(self, begin: int, end: int) -> None:
        forget(self._descriptor(), self._data_start + begin, self._data_start + end)

    def kernel_span(self) -> tuple[int, int]:
        return self._descriptor(), self._data_start

    def close(self) -> None:
        with self._opening:
            if self._fd is not None:
                close_input(self._fd)
                self._fd = None


def open_tensors(path: Path) -> TensorFile:
    """Open `path` by what its first bytes say, not by its name.

    Raises InputError for what cannot be read, HeaderError for a malformed safetensors file,
    PickleRefused for a pickle that wants code, Unsupported for formats that bake knows only by name.
    """
    with inputs_only():
        is_folder, is_file = path.is_dir(), path.is_file()
    if is_folder:
        raise InputError(f"{path} is a folder, a file was expected", path=str(path))
    if not is_file and path.exists():  # a pipe: reading one would wait for ever
        raise InputError(f"{path} is not a regular file; save it to one first", path=str(path))
    with reading(path) as fd:
        start = read_bytes(fd, 0, min(9, status_of(fd, path).st_size), path)
    if start[:4] == b"GGUF":
        raise Unsupported(
            f"{path} is a GGUF file. bake works on 16- and 32-bit weights: fuse into the original "
            f"checkpoint and convert the result to GGUF.",
            path=str(path),
        )
    # A header may be as long as a number that reads like the mark of a pickle: the brace after it decides.
    if start[8:] != b"{" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        from bake.io.pickled import PickledFile  # needs torch, which nothing else does before the work starts

        return PickledFile(path)
    return SafetensorsFile(path)


def read_tensor_bytes(file: TensorFile, name: str) -> bytes:
    """All bytes of one tensor."""
    info = file.tensors[name]
    buffer = bytearray(info.nbytes)
    file.read_into(info.begin, memoryview(buffer))
    return bytes(buffer)


def read_number(file: TensorFile, name: str) -> float:
    """The value of a one-element tensor of any numeric dtype.

    Raises InputError if the tensor holds more than one value or no number.
    """
    info = file.tensors[name]
    if any(size != 1 for size in info.shape):
        raise InputError(f"{file.path}: {name!r} should be one number, it has shape {list(info.shape)}")
    return read_numbers(file, name)[0]


def read_numbers(file: TensorFile, name: str) -> list[float]:
    """The values of a small tensor of any numeric dtype, in order.

    Raises InputError if it holds no numbers, or far more than a shape has.
    """
    info = file.tensors[name]
    count = max(1, math.prod(info.shape))
    if count > _FEW:
        raise InputError(f"{file.path}: {name!r} should be a few numbers, it has shape {list(info.shape)}")
    size = info.nbytes // count
    stored = read_tensor_bytes(file, name)
    try:
        return [decode_scalar(info.dtype, stored[place * size : (place + 1) * size]) for place in range(count)]
    except ValueError as error:
        raise InputError(f"{file.path}: {name!r}: {error}") from None
