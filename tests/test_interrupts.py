"""Ctrl-C, SIGTERM and SIGHUP at any moment: one line, the code of the signal, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing import Fault, Server, slow_run, wait_for_draft
from models import sd1_pair
from scenes import Scene, prepare, state
from support import ROOT, bake, bake_process, drafts

from bake import api, cli
from bake.interrupts import uninterrupted

UNCHANGED = "bake: interrupted: the output is as it was before\n"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def check_after_a_signal(scene: Scene, folder: Path, ran, number: int, words: str) -> None:
    """An interrupted run has said so, in one line, and the folder is as before or as after a whole run."""
    left = state(folder)
    output = f"bake: interrupted: {folder / scene.output} is complete\n"
    if ran.code == 0:  # the signal came when everything was said and done, or never
        assert left == scene.after, words
    else:
        assert ran.code == 128 + number, (words, ran)
        assert ran.err in (UNCHANGED, output), (words, ran)
        assert left == (scene.before if ran.err == UNCHANGED else scene.after), (words, ran)


def test_a_signal_at_any_moment_leaves_no_litter(scene: Scene, tmp_path: Path, runs: int) -> None:
    codes = set()
    for place, (kind, number, moment) in enumerate(scene.points(max(3, runs // 2))):
        sent = SIGNALS[place % 3]
        folder = scene.copy(tmp_path)
        ran = scene.run(folder, Fault(kind, number, "signal", moment, sent, again=place % 2 == 1))
        check_after_a_signal(scene, folder, ran, sent, f"{sent!r} {moment} {kind} {number}")
        codes.add(ran.code)
        shutil.rmtree(folder)
    assert codes & {130, 143, 129}, codes


@pytest.mark.parametrize("name", ["file with embeddings over old ones", "folder over an old one"])
def test_a_signal_while_the_output_is_put_into_its_place_comes_too_late(
    server: Server, tmp_path: Path, name: str
) -> None:
    scene = prepare(server, name, tmp_path)
    renames = {kind: len(scene.calls[kind]) for kind in ("replace", "renameat2")}
    kind, number = next((kind, number - 1) for kind, number in renames.items() if number)
    for moment in ("before", "after"):
        folder = scene.copy(tmp_path)
        ran = scene.run(folder, Fault(kind, number, "signal", moment, signal.SIGINT, again=True))
        assert ran.code == 130
        assert ran.err == f"bake: interrupted: {folder / scene.output} is complete\n"
        assert state(folder) == scene.after
        shutil.rmtree(folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_from_outside_stops_the_run_and_cleans_up(tmp_path: Path, number: int, code: int) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"old")
    process = slow_run("fuse", base, "-l", lora, "-o", output, "--overwrite", "--threads", 1)
    wait_for_draft(tmp_path)
    for _ in range(20):  # an impatient user
        os.kill(process.pid, number)
        time.sleep(0.01)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", UNCHANGED)
    assert output.read_bytes() == b"old"
    assert not drafts(tmp_path)


def test_at_any_time_of_a_real_run_too(tmp_path: Path, runs: int) -> None:
    """While torch is imported, while it computes, while it leaves."""
    base, lora, _ = sd1_pair(tmp_path)
    output = tmp_path / "out.safetensors"
    words = ("fuse", base, "-l", lora, "-o", output)
    started = time.monotonic()
    assert bake_process(*words).code == 0
    whole = time.monotonic() - started
    new = output.read_bytes()
    times = random.Random(2)
    for place in range(max(3, runs // 10)):
        output.unlink(missing_ok=True)
        number = SIGNALS[place % 3]
        process = interruptible(*words)
        time.sleep(whole * times.uniform(0.2, 0.9))
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert not drafts(tmp_path)
        if err == UNCHANGED:
            assert (process.returncode, out) == (128 + number, "")
            assert not output.exists()
        else:
            assert err in ("", f"bake: interrupted: {output} is complete\n")
            assert process.returncode in (0, 128 + number)
            assert output.read_bytes() == new


def interruptible(*words: object) -> subprocess.Popen[str]:
    """The program, with the signals as a terminal leaves them, once it listens to them."""
    driver = (
        "import signal, sys\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from bake import cli\n"
        "listen = cli.listen\n"
        "def ready(handler):\n"
        "    listen(handler)\n"
        "    sys.__stdout__.write('.'); sys.__stdout__.flush(); cli.listen = listen\n"
        "cli.listen = ready\n"
        "cli.run()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver, *map(str, words)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == "."
    return process


def test_signals_that_the_parent_ignores_are_ignored(tmp_path: Path) -> None:
    """As nohup and a shell's background jobs want it."""
    base, lora, _ = sd1_pair(tmp_path)
    process = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
            "write = os.pwrite\n"
            "def kick(*arguments):\n    os.kill(os.getpid(), signal.SIGHUP)\n    return write(*arguments)\n"
            "os.pwrite = kick\nfrom bake.cli import run\nrun()",
            *map(str, ("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors", "-q")),
        ],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
    )
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("then", [None, AttributeError("module 'numpy' has no attribute 'matrix'")], ids=str)
def test_a_signal_that_an_import_swallows_counts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: Exception | None
) -> None:
    """torch imports NumPy and takes no notice if that fails; then it fails itself, or goes on without."""
    base, lora, _ = sd1_pair(tmp_path)
    write = api._write_headers

    def swallow(*arguments) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        if then is not None:
            raise then
        write(*arguments)

    monkeypatch.setattr(api, "_write_headers", swallow)
    monkeypatch.setattr(cli, "listen", lambda handler: signal.signal(signal.SIGTERM, handler))
    done = bake("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors")
    assert (done.code, done.out, done.err) == (143, "", UNCHANGED)
    assert not drafts(tmp_path)
    assert not (tmp_path / "out.safetensors").exists()


class TestUninterrupted:
    def test_a_signal_waits_for_the_end_of_the_block(self) -> None:
        done = []

        def work() -> None:
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                done.append(True)

        assert interrupted(work)
        assert done == [True]

    def test_blocks_inside_blocks_wait_for_the_outermost(self) -> None:
        done = []

        def work() -> None:
            with uninterrupted():
                with uninterrupted():
                    signal.raise_signal(signal.SIGINT)
                done.append(True)

        assert interrupted(work)
        assert done == [True]

    def test_the_handlers_are_put_back(self) -> None:
        before = [signal.getsignal(number) for number in SIGNALS]
        with uninterrupted():
            pass
        assert [signal.getsignal(number) for number in SIGNALS] == before


def interrupted(work: Callable[[], None]) -> bool:
    """True if `work` ends with Python's own answer to Ctrl-C, whatever the tests were started under."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        signal.signal(signal.SIGINT, before)
    return False
