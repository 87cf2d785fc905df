"""Workers that share out jobs. Processes are made in fresh ones: pytest itself has too much to be copied."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from support import ROOT

from bake.errors import BakeError, NonFinite
from bake.execute.plain import crew
from bake.execute.plain.crew import Shift, Threads, start_crew
from bake.execute.team import Stopped, Team
from bake.progress import Silent

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are only copied on Linux")

START = """
import fcntl, json, os, signal, sys, threading, time
from bake.errors import BakeError, NonFinite, UsageError
from bake.execute.plain import crew
from bake.execute.plain.crew import Processes, can_fork, start_crew
from bake.execute.team import Stopped, Team
from bake.progress import Silent

class Counted(Silent):
    done = 0

    def advance(self, count):
        self.done += count

def take_all(shift):
    taken = []
    while (numbers := shift.next()) is not None:
        taken += numbers
        shift.advance(len(numbers))
    return taken

def sleep(shift):
    time.sleep(60)

def start(workers, jobs, work, team=None, progress=None):
    found = start_crew(workers, jobs, work, team or Team(), progress or Silent())
    assert type(found) is Processes
    return found

def children():
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
"""


def fresh(program: str, **environment: str) -> subprocess.Popen[str]:
    """A process that runs `program`, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", START + program],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def answer(program: str) -> Any:
    """What a fresh process prints, as JSON."""
    process = fresh(program)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return json.loads(out)


class Counted(Silent):
    done = 0

    def advance(self, count: int) -> None:
        self.done += count


JOBS = [(1, 0), (1, 1), (3, 2), (2, 100), (3, 1024), (2, 1025), (4, 50_000)]


def test_threads_do_every_job_once_and_progress_adds_up() -> None:
    def take_all(shift: Shift) -> list[int]:
        taken: list[int] = []
        while (numbers := shift.next()) is not None:
            taken += numbers
            shift.advance(len(numbers))
        return taken

    for workers, jobs in JOBS:
        progress = Counted()
        found = start_crew(workers, jobs, take_all, Team(), progress)
        assert isinstance(found, Threads)
        results = found.join()
        assert len(results) == workers
        assert sorted(number for taken in results for number in taken) == list(range(jobs))
        assert progress.done == jobs


@linux
def test_processes_do_every_job_once_and_progress_adds_up() -> None:
    program = f"""
opened, found = os.listdir("/proc/self/fd"), []
for workers, jobs in {JOBS}:
    progress = Counted()
    results = start(workers, jobs, take_all, progress=progress).join()
    assert len(results) == workers
    assert sorted(number for taken in results for number in taken) == list(range(jobs))
    found.append(progress.done)
assert os.listdir("/proc/self/fd") == opened
print(json.dumps([found, children()]))
"""
    assert answer(program) == [[jobs for _, jobs in JOBS], None]


@linux
def test_processes_work_beside_each_other_and_tell_how_far_they_are_meanwhile() -> None:
    program = """
def meet(shift):
    (number,) = shift.next()
    shift.advance(10)
    os.write(pipes[number][1], b"here")
    return os.read(pipes[1 - number][0], 4).decode(), os.getpid() != parent, os.read(go[0], 2).decode()

class Going(Counted):
    def advance(self, count):
        super().advance(count)
        if self.done == 20:
            os.write(go[1], b"go" * 2)

crew._close_all_but = lambda *kept: None
parent, pipes, go = os.getpid(), [os.pipe(), os.pipe()], os.pipe()
running = start(2, 2, meet, progress=Going())
print(json.dumps([running.join(), list(running._done)]))
"""
    assert answer(program) == [[["here", True, "go"]] * 2, [10, 10]]  # each counts in a place of its own


@linux
def test_what_a_process_raises_arrives_as_it_was() -> None:
    program = """
import errno
errors = [
    NonFinite("too large", tensor="a", row=3),
    OSError(errno.ENOSPC, "No space left", "/there"),
    FileNotFoundError(errno.ENOENT, "not there", "/here"),
    MemoryError("no more"),
    KeyError("key"),
    KeyboardInterrupt(),
]
found = []
for error in errors:
    def fail(shift):
        while (numbers := shift.next()) is not None:
            if 5 in numbers:
                raise error
        time.sleep(60)  # the others do not end by themselves

    running = start(3, 20, fail)
    try:
        running.join()
    except BaseException as caught:
        found.append([type(caught).__name__, str(caught), getattr(caught, "details", getattr(caught, "errno", None))])
    running.stop()
print(json.dumps([found, children()]))
"""
    found, left = answer(program)
    assert found == [
        ["NonFinite", "too large", {"tensor": "a", "row": 3}],
        ["OSError", "[Errno 28] No space left: '/there'", errno.ENOSPC],
        ["FileNotFoundError", "[Errno 2] not there: '/here'", errno.ENOENT],
        ["MemoryError", "no more", None],
        ["KeyError", "'key'", None],
        ["KeyboardInterrupt", "", None],
    ]
    assert left is None


@linux
def test_what_cannot_travel_is_told_in_words() -> None:
    program = """
class Holding(Exception):
    def __init__(self):
        super().__init__("what was wrong")
        self.lock = threading.Lock()

class Demanding(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")

def fail(shift):
    raise error

found = []
for error in (Holding(), Demanding("what was", "wrong")):
    running = start(2, 2, fail)
    try:
        running.join()
    except Exception as caught:
        found.append([isinstance(caught, UsageError), str(caught)])
    running.stop()
print(json.dumps(found))
"""
    (is_usage, held), (is_usage_too, demanded) = answer(program)
    assert not is_usage
    assert not is_usage_too
    assert "Holding: what was wrong" in held
    assert "Demanding: what was wrong" in demanded


@linux
def test_a_killed_process_is_a_clear_error_and_ends_the_others() -> None:
    program = """
def die(shift):
    (number,) = shift.next()
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

running = start(3, 3, die)
try:
    running.join()
except UsageError as error:
    running.stop()
    print(json.dumps([error.message, children()]))
"""
    message, left = answer(program)
    assert message.startswith("a worker was killed (signal 9): ")
    assert "--memory" in message
    assert "--threads" in message
    assert left is None


@linux
def test_a_failing_team_stops_the_processes() -> None:
    program = """
team = Team()
running = start(2, 2, sleep, team)
team.start("copier", lambda: team.stop(NonFinite("elsewhere")))
started = time.monotonic()
try:
    running.join()
except Stopped:
    running.stop()
    running.stop()  # once more does no harm
    print(json.dumps([time.monotonic() - started < 30, children()]))
"""
    assert answer(program) == [True, None]


@linux
def test_a_process_that_cannot_be_started_ends_those_that_were() -> None:
    program = """
fork, made = os.fork, []

def limited():
    if len(made) == 2:
        raise BlockingIOError(11, "too many processes")
    made.append(fork())
    return made[-1]

os.fork, opened = limited, os.listdir("/proc/self/fd")
try:
    start(3, 3, sleep)
except UsageError as error:
    print(json.dumps([error.message, children(), os.listdir("/proc/self/fd") == opened]))
"""
    message, left, is_closed = answer(program)
    assert message == "cannot start a worker (too many processes): give bake fewer (--threads)"
    assert left is None
    assert is_closed


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_they_belong_to(number: int) -> None:
    program = """
def work(shift):
    os.write(1, f"{os.getpid()}\\n".encode())  # at once
    time.sleep(60)

start(2, 2, work)
time.sleep(60)
"""
    process = fresh(program)
    assert process.stdout is not None
    workers = {int(process.stdout.readline()) for _ in range(2)}
    assert len(workers | {process.pid}) == 3
    os.kill(process.pid, number)
    process.communicate(timeout=20)  # returns when nobody has their standard output any more
    assert process.returncode == -number


@linux
def test_a_process_whose_parent_was_gone_before_it_looked_ends_at_once() -> None:
    program = """
prctl_later, crew.ctypes.CDLL = crew.ctypes.CDLL, lambda name: (time.sleep(0.3), prctl_later(name))[1]
start(1, 1, sleep)
os._exit(0)
"""
    process = fresh(program)
    assert process.communicate(timeout=20) == ("", "")


@linux
def test_ctrl_c_is_for_the_parent_alone() -> None:
    program = """
def hit(shift):
    os.kill(os.getpid(), signal.SIGINT)
    return "unharmed"

print(json.dumps(start(2, 2, hit).join()))
"""
    assert answer(program) == ["unharmed"] * 2


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_the_parent_does_about_a_signal_never_happens_in_a_process(number: int) -> None:
    program = f"""
def clean_up(number, frame):
    print("cleaned up", os.getpid(), flush=True)

def fork():
    pid = original()
    if pid == 0:
        os.kill(os.getpid(), {int(number)})
    return pid

original, os.fork = os.fork, fork
signal.signal({int(number)}, clean_up)
try:
    print(json.dumps(start(1, 1, take_all).join()))
except UsageError as error:
    print(json.dumps(error.message[:30]))
"""
    assert answer(program) == [[0]]


@linux
def test_processes_hold_no_lock_and_no_file_of_the_parent() -> None:
    program = f"""
def look(shift):
    held = [os.path.realpath(f"/proc/self/fd/{{name}}") for name in os.listdir("/proc/self/fd") if int(name) > 2]
    return len([name for name in held if "/fd/" not in name])

with open({__file__!r}) as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    looking, running = start(1, 1, look), start(1, 1, sleep)
    found = looking.join()
for _ in range(1000):  # until the second one has come so far
    with open({__file__!r}) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.01)
else:
    found = "locked"
running.stop()
print(json.dumps(found))
"""
    assert answer(program) == [0]


@linux
def test_a_process_with_another_thread_is_not_copied() -> None:
    program = """
ended = threading.Event()
found = [can_fork()]
thread = threading.Thread(target=ended.wait)
thread.start()
found += [can_fork(), type(start_crew(1, 1, take_all, Team(), Silent())).__name__]
ended.set()
thread.join()
print(json.dumps(found))
"""
    assert answer(program) == [True, False, "Threads"]


@linux
def test_a_traceback_is_printed_where_it_is_asked_for() -> None:
    program = """
def fail(shift):
    raise NonFinite("too large")

try:
    start(1, 1, fail).join()
except NonFinite:
    print("caught")
"""
    for asked, has_traceback in (("1", True), ("", False)):
        process = fresh(program, BAKE_TRACEBACK=asked)
        out, err = process.communicate(timeout=20)
        assert out == "caught\n"
        assert ("in fail\n" in err) == has_traceback


@pytest.mark.parametrize(
    "error", [NonFinite("too large", tensor="a"), OSError(errno.ENOSPC, "full"), MemoryError("no more")], ids=repr
)
def test_what_a_thread_raises_arrives_and_ends_the_others(error: Exception) -> None:
    def fail(shift: Shift) -> None:
        if shift.next() == range(1):
            raise error
        while True:
            shift.check()

    running = start_crew(3, 3, fail, Team(), Silent())
    with pytest.raises(type(error)) as caught:
        running.join()
    running.stop()
    assert caught.value is error


def test_a_failing_team_stops_the_threads() -> None:
    team, met = Team(), []

    def work(shift: Shift) -> None:
        try:
            while True:
                shift.check()
        except Stopped:
            met.append("stopped")
            raise

    running = start_crew(2, 2, work, team, Silent())
    team.stop(BakeError("elsewhere"))
    with pytest.raises(BakeError, match="elsewhere"):
        running.join()
    assert met == ["stopped"] * 2


def test_the_numbers_of_all_shares_fit_into_a_pipe() -> None:
    assert crew._MOST_JOBS * 4 <= 4096  # the size of the smallest; more would wait for readers that are not there yet
