"""Threads that share one fate: the first failure stops all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Stopped(Exception):
    """Another thread failed, and its error is the one to report."""


class Team:
    """Runs tasks in threads; the first error ends the others at their next check, and `join` raises it."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self, name: str, task: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                task()
            except Stopped:
                pass
            except BaseException as error:
                self.stop(error)

        thread = threading.Thread(target=guarded, name=f"bake {name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self, error: BaseException) -> None:
        """Make `error` the team's, unless it has one; everybody stops at the next check."""
        with self._lock:
            self._error = self._error or error

    def check(self) -> None:
        """Raise Stopped if the team has failed; to be called between two pieces of work."""
        if self._error is not None:
            raise Stopped

    def join(self) -> None:
        """Wait for every thread; raise the first error that any of them, or Ctrl-C here, met."""
        try:
            for thread in self._threads:
                thread.join()
        except BaseException as error:
            self.stop(error)
            for thread in self._threads:
                thread.join()
        if self._error is not None:
            raise self._error
