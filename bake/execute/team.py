"""Threads that share one fate, and the bounded queues between them: nobody waits on a run that has failed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The channel is closed and, for a reader, empty."""


class Channel(Generic[T]):
    """First in, first out; `put` waits while it is full, `get` while it is empty."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[T] = deque()
        self._capacity = capacity
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T) -> None:
        """Raises Closed if the channel is, or is meanwhile, closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Raises Closed once the channel is closed and everything put before has been taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._items))
            if not self._items:
                raise Closed
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self, discard: bool = False) -> None:
        """No more puts; with `discard` what is still inside is dropped too."""
        with self._changed:
            self._closed = True
            if discard:
                self._items.clear()
            self._changed.notify_all()


class Team:
    """Runs tasks in threads; the first failure closes every channel and stops all of them."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._channels: list[Channel[Any]] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def add_channel(self, channel: Channel[T]) -> Channel[T]:
        """Have `channel` closed when the team fails; at once if it has failed already."""
        with self._lock:
            self._channels.append(channel)
        if self._error is not None:
            channel.close(discard=True)
        return channel

    def start(self, name: str, task: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                task()
            except Closed:
                pass  # another thread failed, and its error is the one to report
            except BaseException as error:
                self.stop(error)

        thread = threading.Thread(target=guarded, name=f"bake {name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self, error: BaseException) -> None:
        """Make `error` the team's, unless it has one, and let everybody stop at the next step."""
        with self._lock:
            self._error = self._error or error
            channels = list(self._channels)
        for channel in channels:
            channel.close(discard=True)

    def check(self) -> None:
        """Raise Closed if the team has failed; for tasks that wait on no channel."""
        if self._error is not None:
            raise Closed

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
