"""The inputs of one run: opened when first needed, closed when nobody needs them, known to be unchanged."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bake.errors import InputChanged, InputError
from bake.io.tensorfile import TensorFile, open_tensors


class Expected(NamedTuple):
    """A file as it was when the run was planned."""

    path: Path
    size: int
    modified: int  # nanoseconds
    changed: int = 0  # nanoseconds, of what the system knows of the file; 0: not known
    inode: int = 0


class FileSet:
    """Input files by their place in the plan."""

    def __init__(self, expected: Sequence[Expected]) -> None:
        self._expected = tuple(expected)
        self._files: dict[int, TensorFile] = {}
        self._users: dict[int, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def using(self, place: int) -> Iterator[TensorFile]:
        """The file at `place`, kept open while any thread uses it.

        Raises InputChanged if it is not the file that was planned with.
        """
        with self._lock:
            if place not in self._files:
                self._check(place)
                self._files[place] = open_tensors(self._expected[place].path)
            self._users[place] = self._users.get(place, 0) + 1
            file = self._files[place]
        try:
            yield file
        finally:
            with self._lock:
                self._users[place] -= 1
                if self._users[place] == 0:
                    file.close()

    def _check(self, place: int) -> None:
        path, size, modified, changed, inode = self._expected[place]
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read any more: {error.strerror}", path=str(path)) from None
        # A file put in its place may have its size and time. Of these two, one alone says little: a new link to a file
        # changes the one, some network file systems the other.
        is_another = inode != 0 and status.st_ino != inode and status.st_ctime_ns != changed
        if is_another or (status.st_size, status.st_mtime_ns) != (size, modified):
            raise InputChanged(f"{path} changed after it was planned with; start again", path=str(path))

    def check_unchanged(self) -> None:
        """Raise InputChanged if any of the files was modified or replaced since the plan was made."""
        for place in range(len(self._expected)):
            self._check(place)
