"""Ctrl-C and its kin: they stop a run where it stands, but wait while an output is put into its place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# Signals that ask a program to end, as far as this system has them.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# Outputs that this process has put into their places, and those of which it left a draft to go on with.
finished: list[Path] = []
kept: list[Path] = []
RESUMABLE = "what is finished is kept: the same command with --resume goes on from there"


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
