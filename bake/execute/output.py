"""The output files as a worker writes them: one is open at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType

from bake.execute.task import Target
from bake.io.files import open_for_writing


class Output:
    """The output file that is open; leaving the block closes it."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        """targets: all output files, by relative path. None of them is open yet."""
        self._targets = targets
        self._relative: str | None = None
        self.descriptor = self.data_start = -1  # of the open file, and where its data section begins

    def turn_to(self, relative: str) -> None:
        """Have the file `relative` open, and no other."""
        if relative != self._relative:
            self._close()
            self.descriptor = open_for_writing(self._targets[relative].path)
            self._relative, self.data_start = relative, self._targets[relative].data_start

    def _close(self) -> None:
        if self._relative is not None:
            os.close(self.descriptor)
            self._relative = None

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()
