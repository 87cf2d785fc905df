"""Whatever the system refuses, wherever: one clear error with the right code, the old output, and nothing left behind.

Or the fault does not matter, and the output is the one of an undisturbed run.
"""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashing import Fault, Ran, Server
from scenes import Scene, prepare, spread, state

# What is tried with each kind of call. Those that a system gives for it, and some that it should not.
ERRORS = {
    "open": (errno.EACCES, errno.EIO, errno.EMFILE, errno.ENOSPC, errno.EROFS, errno.EDQUOT),
    "close": (errno.EIO, errno.EINTR, errno.EDQUOT, errno.ENOSPC),
    "preadv": (errno.EIO, errno.EINTR, errno.ESTALE),
    "pwrite": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG),
    "copy_file_range": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EXDEV, errno.EINTR),
    "posix_fallocate": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EOPNOTSUPP),
    "mkdir": (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO),
    "rmdir": (errno.EIO, errno.EROFS, errno.EACCES),
    "unlink": (errno.EIO, errno.EROFS, errno.EACCES),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS),
    "replace": (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT),
    "rename": (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT),
    "renameat2": (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT),
    "stat": (errno.EIO, errno.EACCES),
    "lstat": (errno.EIO, errno.EACCES),
    "fstat": (errno.EIO, errno.ESTALE),
}
INPUT, OUTPUT, VERIFICATION = 3, 8, 9
FULL = (errno.ENOSPC, errno.EDQUOT)


def check_after_a_fault(scene: Scene, folder: Path, ran: Ran, fault: Fault) -> None:
    """The fault did not matter, or it was reported as what it is and nothing has changed."""
    words, left = f"{fault}: {ran}", state(folder)
    path = ran.calls[0][1].removeprefix(str(folder)) if ran.calls else "?"
    assert "Traceback" not in ran.err, words
    assert "bug" not in ran.err, words
    if ran.code == 0:
        assert left == scene.after, words
        return
    assert ran.err.count("\n") == 1 or ran.code == VERIFICATION, words  # which lists what it found
    if "complete and in place" in ran.err:  # what failed came after the rename
        assert ran.code == OUTPUT, words
        assert scene.output_of(left) == scene.output_of(scene.after), words
        return
    is_input = path.startswith("/in")
    codes = {INPUT} if is_input else {OUTPUT, VERIFICATION} if fault.kind in READING else {OUTPUT}
    if path == "":  # the folder that both are in
        codes = {INPUT, OUTPUT}
    assert ran.code in codes, words
    if "could not be removed" in ran.err:  # the draft: the error says so
        assert scene.output_of(left) == scene.output_of(scene.before), words
        return
    replaced = {path: digest for path, digest in left.items() if digest == scene.after.get(path)}
    if "out.embeddings: the system failed" in ran.err:  # the only files that are replaced one after the other
        assert {*left.items()} - {*replaced.items()} <= {*scene.before.items()}, words
        assert scene.output_of(left) == scene.output_of(scene.before), words
        return
    assert left == scene.before, words


READING = ("open", "close", "preadv", "fstat", "stat", "lstat")


def faults(scene: Scene, count: int) -> Iterator[Fault]:
    """Calls spread over the run: every kind, every error, each as often as gives `count` or more."""
    each = max(1, count // sum(len(numbers) for kind, numbers in ERRORS.items() if scene.calls[kind]))
    for kind, numbers in ERRORS.items():
        places = spread(list(range(len(scene.calls[kind]))), each * len(numbers))
        for turn, place in enumerate(places):
            yield Fault(kind, place, "fail", code=numbers[turn % len(numbers)])


def test_every_call_that_fails_is_reported_or_does_not_matter(scene: Scene, tmp_path: Path, runs: int) -> None:
    codes = set()
    for fault in faults(scene, runs):
        folder = scene.copy(tmp_path)
        ran = scene.run(folder, fault)
        check_after_a_fault(scene, folder, ran, fault)
        codes.add(ran.code)
        shutil.rmtree(folder)
    assert {INPUT, OUTPUT} <= codes


@pytest.mark.parametrize("kind", ["preadv", "pwrite", "copy_file_range"])
def test_a_call_that_does_only_a_part_is_continued(scene: Scene, tmp_path: Path, kind: str) -> None:
    for number in spread(list(range(len(scene.calls[kind]))), 2):
        folder = scene.copy(tmp_path)
        ran = scene.run(folder, Fault(kind, number, "short"))
        assert ran.code == 0, ran
        assert state(folder) == scene.after
        shutil.rmtree(folder)


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_a_disk_that_fails_for_good_leaves_a_draft_that_is_named(server: Server, tmp_path: Path, code: int) -> None:
    scene = prepare(server, "folder over an old one", tmp_path)
    folder = scene.copy(tmp_path)
    fault = Fault("pwrite", 2, "fail", code=code, again=True, where=".out.bake-draft")
    ran = scene.run(folder, fault)
    assert ran.code == OUTPUT
    assert f"its draft {folder / '.out.bake-draft'} could not be removed" in ran.err
    assert scene.output_of(state(folder)) == scene.output_of(scene.before)
    again = scene.run(folder, hooked=False)
    assert again.code == 0
    assert "killed run" in again.err
    assert state(folder) == scene.after


def test_a_run_that_is_interrupted_by_harmless_signals_all_the_time_is_the_same(server: Server, tmp_path: Path) -> None:
    """What the system calls EINTR: calls are cut short and made again."""
    scene = prepare(server, "folder", tmp_path)
    folder = scene.copy(tmp_path)
    ran = scene.run(folder, Fault("open", 1, "signal", "after", signal.SIGALRM, again=True))
    assert ran.code == 0, ran
    assert state(folder) == scene.after
