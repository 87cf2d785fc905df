"""Killed at any moment, bake leaves the old output or none, and the next run cleans up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import sd1_pair
from support import ROOT, bake, drafts, load

# Runs bake with one function replaced: at its n-th call in any process bake is killed, before or after the work.
DRIVER = """
import importlib, os, signal, sys
bake = os.getpid()
where, number, moment, *words = sys.argv[1:]
module, _, name = where.rpartition(".")
owner = importlib.import_module(module)
original, calls = getattr(owner, name), 0

def counted(*arguments, **named):
    global calls
    calls += 1
    if calls == int(number) and moment == "before":
        os.kill(bake, signal.SIGKILL)
    result = original(*arguments, **named)
    if calls == int(number) and moment == "after":
        os.kill(bake, signal.SIGKILL)
    return result

setattr(owner, name, counted)
from bake.cli import main
main(words)
"""

# Writes slowly, so that a signal from outside arrives in the middle.
SLOW = """
import importlib, sys, time
where, *words = sys.argv[1:]
worker = importlib.import_module(where)
write = worker.write_at

def slow(*arguments):
    time.sleep(0.3)
    write(*arguments)

worker.write_at = slow
from bake.cli import main
main(words)
"""

# With torch, and without, in processes.
WORKERS = {
    "bake.execute.worker": ("--rounding", "stochastic"),
    "bake.execute.plain.pipeline": ("--rounding", "nearest"),
}

POINTS = [
    *(("bake.io.draft._create", 1, "before"), ("bake.io.draft._create", 1, "after")),
    *(("bake.execute.engine.copy_range", 1, "before"), ("bake.execute.engine.copy_range", 3, "after")),
    *((f"{worker}.write_at", number, moment) for worker in WORKERS for number, moment in ((1, "before"), (3, "after"))),
    *(("bake.api._write_headers", 1, "before"), ("bake.api._write_headers", 1, "after")),
    *(("bake.api.check_files", 1, "before"), ("bake.api.check_files", 1, "after")),
    *(("os.fsync", 1, "before"), ("os.fsync", 1, "after"), ("os.replace", 1, "before")),
]


def run(driver: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", driver, *map(str, words)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # its group is that of its workers alone
    )


@pytest.mark.parametrize("existing", [True, False], ids=["old output", "no output"])
@pytest.mark.parametrize(("where", "number", "moment"), POINTS, ids=str)
def test_a_killed_run_leaves_the_old_output_or_none(
    tmp_path: Path, where: str, number: int, moment: str, existing: bool
) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    inputs = base.read_bytes(), lora.read_bytes()
    output = tmp_path / "out.safetensors"
    if existing:
        output.write_bytes(b"old")
    rounding = WORKERS.get(where.rpartition(".")[0], ())
    words = ("fuse", base, "-l", lora, "-o", output, "--overwrite", "--device", "cpu", *rounding)
    process = run(DRIVER, where, number, moment, *words)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert output.read_bytes() == b"old" if existing else not output.exists()
    assert (base.read_bytes(), lora.read_bytes()) == inputs
    left = drafts(tmp_path)
    done = bake(*words)
    assert done.code == 0
    assert ("killed run" in done.err) == bool(left)
    assert len(load(output)) == 1145
    assert not drafts(tmp_path)


def test_killed_after_the_rename_the_new_output_is_complete(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    output = tmp_path / "out.safetensors"
    process = run(DRIVER, "os.replace", 1, "after", "fuse", base, "-l", lora, "-o", output)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert bake("verify", output, "--full").code == 0
    assert not drafts(tmp_path)


@pytest.mark.parametrize("is_for_all", [False, True], ids=["bake alone", "its group, as Ctrl-C"])
@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_polite_signal_stops_the_run_and_cleans_up(
    tmp_path: Path, number: int, code: int, worker: str, is_for_all: bool
) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"old")
    words = ("fuse", base, "-l", lora, "-o", output, "--overwrite", "--threads", 1, "--device", "cpu")
    process = run(SLOW, worker, *words, *WORKERS[worker])
    deadline = time.monotonic() + 30
    while not drafts(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    (os.killpg if is_for_all else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == ""
    assert err == "bake: interrupted: the output is as it was before\n"
    assert output.read_bytes() == b"old"
    assert not drafts(tmp_path)


def test_a_folder_killed_between_exchange_and_clean_up_is_complete(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    clip = tmp_path / "clip.safetensors"
    from models import UNET, random_arrays
    from names import small
    from support import save

    arrays = random_arrays(small("sd1"))
    save(base, {name: array for name, array in arrays.items() if name.startswith(UNET)})
    prefix = "cond_stage_model.transformer."
    save(clip, {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)})
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    words = ("fuse", base, "--also", clip, "-l", lora, "-o", out, "--overwrite")
    process = run(DRIVER, "shutil.rmtree", 1, "before", *words)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert sorted(path.name for path in out.iterdir()) == ["base.safetensors", "clip.safetensors"]
    assert bake("verify", out, "--full").code == 0
    assert len(drafts(tmp_path)) == 1
    assert bake(*words).code == 0
    assert not drafts(tmp_path)
