"""Killed at any moment, bake leaves the old output or the new one, complete; the next run cleans up and succeeds.

`--runs N` says how many points of the run are tried; docs/reliability.md says what came of more than CI has time for.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crashing import Fault, Server, slow_run, wait_for_draft
from models import sd1_pair
from scenes import Scene, prepare, state
from support import ROOT, bake, bake_process, drafts, load


def check_after_a_kill(scene: Scene, folder: Path, words: str) -> None:
    """The folder is in order, and the next run puts it in the state of an undisturbed one."""
    left = state(folder)
    output = scene.output_of(left)
    is_new = output == scene.output_of(scene.after)
    assert is_new or output == scene.output_of(scene.before), (words, left)
    for path, digest in scene.before.items():
        if path.split("/")[0] == "in":
            assert left.get(path) == digest, (words, path)
    for path, digest in left.items():  # what lies beside the output is old or new, too
        if "bake-" not in path and digest:
            assert digest in (scene.before.get(path), scene.after.get(path)), (words, path)
    if is_new:
        assert {path: left.get(path) for path in scene.after} == scene.after, words
    if is_new and not scene.has_old:
        assert not scene.litter(folder), words
        return  # without --overwrite there is nothing more to do
    litter = [path for path in scene.litter(folder) if "bake-" in path]
    ran = scene.run(folder, hooked=False)
    assert ran.code == 0, (words, ran)
    assert ("killed run" in ran.err) == bool(litter), (words, ran.err, litter)
    assert state(folder) == scene.after, words


def test_a_killed_run_leaves_the_old_output_or_the_new_one(scene: Scene, tmp_path: Path, runs: int) -> None:
    for kind, number, moment in scene.points(runs):
        folder = scene.copy(tmp_path)
        ran = scene.run(folder, Fault(kind, number, "kill", moment))
        assert ran.code in (-signal.SIGKILL, 0), ran
        check_after_a_kill(scene, folder, f"killed {moment} {kind} {number}")
        shutil.rmtree(folder)


def test_everything_is_on_the_disk_before_it_is_renamed_and_the_names_are_after(scene: Scene) -> None:
    """What no kill shows, only a power cut: what the system has taken must be synced, in this order."""
    last_write: dict[str, int] = {}
    synced: dict[str, int] = {}
    renamed: dict[str, int] = {}
    for place, (kind, path) in enumerate(scene.order):
        if kind in ("pwrite", "copy_file_range", "posix_fallocate", "mkdir"):
            last_write[path] = place
        if kind in ("fsync", "fdatasync"):
            synced[path] = place
        if kind in ("rename", "replace", "renameat2"):
            renamed[path] = place
    drafts = {path: place for path, place in renamed.items() if path.endswith(".bake-draft")}
    assert drafts
    for draft, moved in drafts.items():
        inside = [path for path in last_write if path == draft or path.startswith(draft + "/")]
        assert inside
        for path in inside:
            if path in last_write:
                assert last_write[path] < synced[path] < moved, path
        assert synced[draft] < moved
        assert synced[draft.rpartition("/")[0]] > moved, draft
    removed = [place for place, (kind, _) in enumerate(scene.order) if kind in ("unlink", "rmdir")]
    assert all(place > max(drafts.values()) for place in removed), "the old output goes last"


def test_the_clean_up_after_a_kill_can_be_killed_as_well(server: Server, tmp_path: Path) -> None:
    scene = prepare(server, "folder over an old one", tmp_path)
    for number in range(len(scene.calls["fsync"])):
        folder = scene.copy(tmp_path)
        assert scene.run(folder, Fault("fsync", number, "kill")).code == -signal.SIGKILL
        for kind in ("unlink", "rmdir"):
            scene.run(folder, Fault(kind, number % 3, "kill", "after"))
        check_after_a_kill(scene, folder, f"killed at fsync {number}, then twice more")
        shutil.rmtree(folder)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", range(2))
def test_where_folders_are_exchanged_in_two_steps_the_next_run_puts_back_the_old_one(
    server: Server, tmp_path: Path, number: int, moment: str
) -> None:
    scene = prepare(server, "folder over an old one", tmp_path)
    folder = scene.copy(tmp_path)
    ran = scene.run(folder, Fault("replace", number, "kill", moment), two_steps=True)
    assert ran.code == -signal.SIGKILL
    if (number, moment) in ((0, "after"), (1, "before")):
        aside = folder / ".out.bake-old"
        assert {f"out/{path}": digest for path, digest in state(aside).items()} == {
            path: digest for path, digest in scene.output_of(scene.before).items() if path != "out"
        }
        words = [word.replace("{}", str(folder)) for word in scene.words]
        kept = scene.server.run(*words[:-1], folder=folder, hooked=False)
        assert kept.code == 8, "without --overwrite the old folder is put back and kept"
        assert state(folder) == scene.before
    else:
        check_after_a_kill(scene, folder, f"killed {moment} step {number}")


def test_no_process_of_a_killed_run_goes_on_writing(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    process = slow_run("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors")
    wait_for_draft(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while (left := processes_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def processes_of(session: int) -> list[int]:
    """Processes, but dead ones, of the session that a process began."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def test_a_real_process_killed_at_any_time_leaves_the_old_output_or_the_new_one(tmp_path: Path, runs: int) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    output = tmp_path / "out.safetensors"
    words = ("fuse", base, "-l", lora, "-o", output, "--overwrite")
    started = time.monotonic()
    assert bake_process(*words).code == 0
    whole = time.monotonic() - started
    new = output.read_bytes()
    inputs = base.read_bytes(), lora.read_bytes()
    times = random.Random(1)
    for _ in range(max(2, runs // 8)):
        output.write_bytes(b"old")
        process = subprocess.Popen(
            [sys.executable, "-m", "bake", *map(str, words)],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        time.sleep(whole * times.uniform(0.3, 1.0))
        process.kill()
        process.communicate(timeout=60)
        assert output.read_bytes() in (b"old", new)
        assert (base.read_bytes(), lora.read_bytes()) == inputs
        left = drafts(tmp_path)
        done = bake(*words)
        assert done.code == 0, done.err
        assert ("killed run" in done.err) == bool(left)
        assert output.read_bytes() == new
        assert not drafts(tmp_path)
    assert len(load(output)) == 1145
