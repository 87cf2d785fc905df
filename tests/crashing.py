"""A process that has torch ready and forks children that run bake: killed, interrupted or failing at a chosen event.

An event is a system call that bake makes on a file of the run's folder. Used by tests through `Server`; as a program
it answers orders, one JSON object a line.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Calls that a run makes over and over, and those that it makes once for a file or a folder.
MANY = ("open", "close", "preadv", "pwrite", "copy_file_range", "stat", "fstat", "lstat")
FEW = (
    "posix_fallocate",
    "ftruncate",
    "mkdir",
    "rmdir",
    "unlink",
    "fsync",
    "fdatasync",
    "replace",
    "rename",
    "renameat2",
)
# Of these a part can have been done.
PARTIAL = ("preadv", "pwrite", "copy_file_range")


@dataclass(frozen=True)
class Fault:
    """What happens at the `number`-th event of a kind, counted from 0, on a path that contains `where`."""

    kind: str
    number: int
    action: str  # kill, signal, fail, short
    moment: str = "before"  # or after; half: after half of the bytes
    code: int = 0  # of the signal or the error
    again: bool = False  # at every later event, of any kind, too
    where: str = ""


@dataclass(frozen=True)
class Order:
    """One run of bake."""

    words: list[str]
    folder: str  # events elsewhere do not count
    fault: Fault | None = None
    hooked: bool = True
    two_steps: bool = False  # the system has no renameat2


@dataclass(frozen=True)
class Ran:
    """What became of it."""

    code: int  # negative: the signal that killed it
    out: str
    err: str
    # (kind, path) of every call, in order; with a fault only what it struck
    calls: list[tuple[str, str]] = field(default_factory=list)


class Events:
    """Counts the calls, and does what the fault says."""

    def __init__(self, order: Order, log: Path) -> None:
        self._order, self._main = order, os.getpid()
        self._counts = {kind: multiprocessing.RawValue("q", 0) for kind in (*MANY, *FEW)}
        self._log, self._guard = log, log.with_name("guard")
        self._guard.touch()
        self._threads = threading.Lock()
        self._is_after = multiprocessing.RawValue("b", 0)

    def install(self) -> None:
        from bake.io import moves

        for kind in (*MANY, *FEW):
            if kind != "renameat2":
                setattr(os, kind, self._counted(kind, getattr(os, kind)))
        without = (lambda old, new, flag: False) if self._order.two_steps else moves._rename_with
        moves._rename_with = self._counted("renameat2", without)

    def _counted(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            path = self._path(arguments, named)
            fault = self._order.fault
            if not path.startswith(self._order.folder):
                return call(*arguments, **named)
            if fault is not None and (fault.where not in path or (fault.kind != kind and not self._is_after.value)):
                return call(*arguments, **named)
            number = self._number(kind)
            if fault is None:
                _note(self._log, f"{kind} {path}\n")
                return call(*arguments, **named)
            if self._is_after.value or (kind == fault.kind and number == fault.number):
                _note(self._log, f"{kind} {path}\n")
                return self._strike(kind, path, call, arguments, named)
            return call(*arguments, **named)

        return counted

    def _number(self, kind: str) -> int:
        """How many calls of a kind there were before this one, in all processes of the run.

        A file's lock ends with the process that holds it: a run kills its workers at any moment.
        """
        import fcntl  # which Windows has not; nothing is killed there

        with self._threads:
            descriptor = _open(self._guard, os.O_RDWR)
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            number: int = self._counts[kind].value
            self._counts[kind].value += 1
            _close(descriptor)
        return number

    def _strike(
        self, kind: str, path: str, call: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        fault = self._order.fault
        assert fault is not None
        if fault.again:
            self._is_after.value = 1
        if fault.action == "fail":
            raise OSError(fault.code, os.strerror(fault.code), path)
        if kind in PARTIAL and (fault.action == "short" or fault.moment == "half"):
            arguments = _halved(kind, arguments)
        result = call(*arguments, **named) if fault.moment != "before" else None
        if fault.action == "kill":
            os.kill(self._main, signal.SIGKILL)
            time.sleep(60)  # a child of the run ends with it
        if fault.action == "signal":
            os.kill(self._main, fault.code)
        return call(*arguments, **named) if fault.moment == "before" else result

    def _path(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
        """Of what is written where there are two, else of the first; of what a descriptor has open."""
        first = arguments[0]
        if isinstance(first, int):
            return _opened(first)
        folder = named.get("dir_fd")
        path = os.fsdecode(first)
        return os.path.join(_opened(folder), path) if isinstance(folder, int) else os.path.abspath(path)


_open, _close, _readlink = os.open, os.close, os.readlink


def _note(log: Path, line: str) -> None:
    """Opened anew each time: processes of the run close what they do not know."""
    descriptor = _open(log, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, line.encode())
    _close(descriptor)


def _opened(descriptor: int) -> str:
    try:
        return _readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def _halved(kind: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if kind == "preadv":
        (buffer,) = arguments[1]
        return (arguments[0], [memoryview(buffer)[: max(1, len(buffer) // 2)]], *arguments[2:])
    if kind == "pwrite":
        return (arguments[0], memoryview(arguments[1])[: max(1, len(arguments[1]) // 2)], *arguments[2:])
    return (*arguments[:2], max(1, arguments[2] // 2), *arguments[3:])


class Server:
    """The prepared process; `run` has it fork a child."""

    def __init__(self, folder: Path) -> None:
        """folder: for what the children say."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
                "OPENBLAS_NUM_THREADS": "1",
            },
        )

    def run(self, *words: object, folder: Path, **how: Any) -> Ran:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = Order([str(word) for word in words], str(folder), **how)
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        return Ran(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


# Runs bake in a session of its own and writes slowly, so that a signal from outside arrives in the middle.
SLOW = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
write = os.pwrite

def slow(*arguments):
    time.sleep(0.2)
    return write(*arguments)

os.pwrite = slow
from bake.cli import run
run()
"""


def slow_run(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, words)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for_draft(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while not list(folder.glob(".*bake-draft")) and time.monotonic() < deadline:
        time.sleep(0.01)


def serve(folder: Path) -> None:
    """Answer orders until there are no more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # whatever the tests were started under
    import bake.cli.fuse
    import bake.execute.pipeline
    import bake.verify.numeric  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not survive the fork"
    out, err, log = folder / "out", folder / "err", folder / "log"
    for line in sys.stdin:
        raw = json.loads(line)
        order = Order(**{**raw, "fault": Fault(**raw["fault"]) if raw["fault"] else None})
        for path in (out, err, log):
            path.write_bytes(b"")
        child = os.fork()
        if child == 0:
            _answer(order, out, err, log)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        calls = [(kind, path) for kind, _, path in (entry.partition(" ") for entry in log.read_text().splitlines())]
        print(json.dumps(asdict(Ran(code, out.read_text(), err.read_text(), calls))), flush=True)


def _answer(order: Order, out: Path, err: Path, log: Path) -> None:
    """The child: a run of bake that ends the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.close(0)
    from bake import cli

    if order.hooked:
        Events(order, log).install()
    sys.argv[1:] = order.words
    with contextlib.suppress(BaseException):
        cli.run()
    os._exit(70)  # run does not return


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
