"""How a run tells what it is doing. It draws nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives events from several threads."""

    def start(self, task: str, total: int) -> None:
        """A task of `total` bytes begins."""

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""

    def finish(self) -> None:
        """The task is over."""


class Silent:
    """Progress that nobody watches."""

    def start(self, task: str, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def finish(self) -> None:
        pass
