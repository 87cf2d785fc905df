"""Files brought to the disk while they are still being written, so that little is left to wait for at the end."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from bake.io.files import forget, open_for_writing, start_writing

_PAUSE = 0.3  # seconds between two rounds
_SMALLEST = 16 * 1024 * 1024  # bytes; of smaller files there is nothing to gain


class Writeback:
    """A thread that has the system write what is new in some files, again and again, until the block is left.

    What the disk refuses on the way is raised at the end: a later fsync need not tell it again.
    """

    def __init__(self, paths: Sequence[Path], forget: bool) -> None:
        """forget: what is on the disk shall not stay in memory."""
        self._forget = forget
        self._paths = tuple(paths)
        self._error: OSError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bake writeback", daemon=True)

    def _run(self) -> None:
        try:
            while not self._ended.wait(_PAUSE):
                for path in self._paths:
                    if not self._ended.is_set() and path.stat().st_size >= _SMALLEST:
                        self._sync(path)
        except OSError as error:
            self._error = error

    def _sync(self, path: Path) -> None:
        descriptor = open_for_writing(path)
        try:
            if self._forget:
                getattr(os, "fdatasync", os.fsync)(descriptor)
                forget(descriptor, 0, path.stat().st_size)
            else:
                start_writing(descriptor)
        finally:
            os.close(descriptor)

    def __enter__(self) -> Writeback:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop; raises the OSError that writing met, unless something else is being raised already."""
        self._ended.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error
