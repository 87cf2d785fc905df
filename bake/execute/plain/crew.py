"""Workers that share out numbered jobs: processes, copies of this one, or threads where it cannot be copied.

Python lets one thread of a process run at a time. Calls of NumPy on pieces that fit into a core's cache are so
short that threads would mostly wait for each other; processes do not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import select
import signal
import struct
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from bake.errors import UsageError
from bake.execute.team import Team
from bake.progress import Progress

_MOST_JOBS = 1024  # that are handed out one by one: their numbers have to fit into the smallest pipe
_PAUSE = 100  # milliseconds between two looks at the progress
_PR_SET_PDEATHSIG = 1
_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # that bake answers


class Shift(Protocol):
    """What a worker knows of the others."""

    def next(self) -> range | None:
        """The next jobs; None after the last."""

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""

    def check(self) -> None:
        """Raise Stopped if the run has failed; to be called between two pieces of work."""


Work = Callable[[Shift], Any]


class Crew(ABC):
    """Workers at work. What each returns can be pickled."""

    @abstractmethod
    def join(self) -> list[Any]:
        """Wait for all workers; return what they returned, or raise what the first of them, or the team, met."""

    @abstractmethod
    def stop(self) -> None:
        """End the work, if it has not ended."""


def start_crew(workers: int, jobs: int, work: Work, team: Team, progress: Progress) -> Crew:
    """`workers` workers that call `work`, to do the jobs 0, 1, ... `jobs` - 1: processes where that is safe.

    They stop when the `team` has failed, and tell `progress`.
    """
    each = -(-jobs // _MOST_JOBS) or 1
    shares = [range(first, min(jobs, first + each)) for first in range(0, jobs, each)]
    kind = Processes if can_fork() else Threads
    return kind(workers, shares, work, team, progress)


def can_fork() -> bool:
    """True if this process can be copied: on Linux, and while no other thread of it could hold a lock."""
    return sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1


class Processes(Crew):
    """One process for each worker. They end when this one does, however it ends."""

    def __init__(self, workers: int, shares: list[range], work: Work, team: Team, progress: Progress) -> None:
        self._team, self._progress = team, progress
        self._pids: dict[int, int] = {}  # of the workers that were not waited for, by the pipe they report through
        self._shared = mmap.mmap(-1, 8 * workers)
        self._done = memoryview(self._shared).cast("Q")  # bytes, by worker
        self._told = 0
        queue, entrance = os.pipe()
        os.write(entrance, b"".join(struct.pack("<I", place) for place in range(len(shares))))
        os.close(entrance)
        try:
            for number in range(workers):
                self._start(_Process(queue, shares, self._done, number), work)
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(queue)

    def _start(self, shift: _Process, work: Work) -> None:
        parent = os.getpid()
        reading, writing = os.pipe()
        # What the parent does about a signal must not happen in the copy as well.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                _live(parent, shift, writing, work)
            self._pids[reading] = pid
        except OSError as error:
            os.close(reading)
            raise UsageError(f"cannot start a worker ({error.strerror}): give bake fewer (--threads)") from None
        finally:
            os.close(writing)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def join(self) -> list[Any]:
        reports: dict[int, bytearray] = {pipe: bytearray() for pipe in self._pids}
        results = []
        poll = select.poll()
        for pipe in reports:
            poll.register(pipe, select.POLLIN)
        while self._pids:
            for pipe, _ in poll.poll(_PAUSE):
                piece = os.read(pipe, 65536)
                reports[pipe] += piece
                if not piece:
                    poll.unregister(pipe)
                    results.append(self._result(pipe, bytes(reports[pipe])))
            self._tell()
            self._team.check()
        return results

    def _tell(self) -> None:
        done = sum(self._done)
        if done > self._told:
            self._progress.advance(done - self._told)
            self._told = done

    def _result(self, pipe: int, report: bytes) -> Any:
        """What the worker that reported through `pipe`, and has ended, returned; raises what it raised."""
        status = self._wait(pipe)
        if not report:
            number = os.waitstatus_to_exitcode(status)
            raise UsageError(
                f"a worker was killed (signal {-number}): if the machine ran out of memory, give bake less of it "
                f"(--memory) or fewer workers (--threads)"
            )
        is_error, value = pickle.loads(report)  # from our own copy
        if is_error:
            raise value
        return value

    def _wait(self, pipe: int) -> int:
        os.close(pipe)
        return os.waitpid(self._pids.pop(pipe), 0)[1]

    def stop(self) -> None:
        for pid in self._pids.values():
            os.kill(pid, signal.SIGKILL)  # what it wrote is a draft
        for pipe in list(self._pids):
            self._wait(pipe)


class _Process:
    """A worker's shift in a process of its own."""

    def __init__(self, queue: int, shares: list[range], done: memoryview, number: int) -> None:
        self.queue = queue
        self._shares, self._done, self._number = shares, done, number

    def next(self) -> range | None:
        token = os.read(self.queue, 4)
        return self._shares[struct.unpack("<I", token)[0]] if token else None

    def advance(self, count: int) -> None:
        self._done[self._number] += count

    def check(self) -> None:
        pass  # it is killed


def _live(parent: int, shift: _Process, report: int, work: Work) -> NoReturn:
    """The life of a worker's process."""
    code = 1
    try:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # Ctrl-C goes to all; the parent decides
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            _close_all_but(shift.queue, report)  # the lock on the draft among them
            try:
                outcome = (False, work(shift))
            except BaseException as error:
                if os.environ.get("BAKE_TRACEBACK"):
                    traceback.print_exc()  # it does not travel with the error
                outcome = (True, error)
            with open(report, "wb") as pipe:
                pipe.write(_packed(*outcome))
            code = 0
    finally:
        os._exit(code)  # nothing of the parent's is ours to clean up


def _packed(is_error: bool, value: Any) -> bytes:
    """The report of a worker: what it returned or raised; an error that cannot travel is told in words."""
    if is_error:
        try:
            pickle.loads(pickle.dumps(value))
        except Exception:  # pickle raises whatever the class of the error does
            value = RuntimeError(f"{type(value).__name__}: {value}")
    return pickle.dumps((is_error, value))


def _close_all_but(*kept: int) -> None:
    """Close all open files but these and the standard streams."""
    first = 3
    for descriptor in sorted(kept):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


class Threads(Crew):
    """One thread of the team for each worker."""

    def __init__(self, workers: int, shares: list[range], work: Work, team: Team, progress: Progress) -> None:
        self._team = team
        self._results: list[Any] = []
        shift = _Thread(shares, team, progress)
        for number in range(workers):
            team.start(f"worker {number}", lambda: self._results.append(work(shift)))

    def join(self) -> list[Any]:
        self._team.join()
        return self._results

    def stop(self) -> None:
        pass  # they stop when the team has failed


class _Thread:
    """The shift of all workers that are threads."""

    def __init__(self, shares: list[range], team: Team, progress: Progress) -> None:
        self._shares = iter(shares)
        self._lock = threading.Lock()
        self.advance, self.check = progress.advance, team.check

    def next(self) -> range | None:
        with self._lock:
            return next(self._shares, None)
