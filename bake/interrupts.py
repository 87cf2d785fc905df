"""Ctrl-C and its kin: they stop a run where it stands, but wait while an output is put into its place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

# Signals that ask a program to end, as far as this system has them.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# Outputs that this process has put into their places, and those of which it left a draft to go on with.
finished: list[Path] = []
kept: list[Path] = []
due: list[Path] = []  # all that this process is to put into place, where that is known to be more than one
RESUMABLE = "what is finished is kept: the same command with --resume goes on from there"

_arrived: list[int] = []  # signals that on_signal has answered


class Stopped(BaseException):
    """A signal of STOPPING arrived. No KeyboardInterrupt: click would answer that one by itself."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def listen(handler: Callable[[int, FrameType | None], NoReturn] | signal.Handlers) -> None:
    """Have the signals of STOPPING answered by `handler`, but for those that the parent had ignored (nohup)."""
    for number in STOPPING:
        if signal.getsignal(number) not in (None, signal.SIG_IGN):
            signal.signal(number, handler)


def on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Raise Stopped, once: what that sets off, cleaning up, shall not be interrupted."""
    listen(signal.SIG_IGN)
    _arrived.append(number)
    raise Stopped(number)


def check() -> None:
    """Raise Stopped if it was raised before and got lost: torch swallows whatever its import of NumPy raises."""
    if _arrived:
        raise Stopped(_arrived[0])


def forget() -> None:
    """Begin anew: no signal has come, nothing is finished or kept."""
    _arrived.clear()
    finished.clear()
    kept.clear()
    due.clear()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back the signals of STOPPING until the block is left; then the first that came does what it always does."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is ever interrupted
        yield
        return
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    handlers = {number: signal.getsignal(number) for number in STOPPING}
    held = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in held:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number in arrived[:1]:
            signal.raise_signal(number)
