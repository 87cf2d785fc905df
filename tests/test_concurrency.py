"""Runs at the same time: on one output one wins and the others are told, on different ones they do not meet."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from crashing import Fault, Server
from models import sd1_pair
from scenes import prepare, state
from support import ROOT, bake_process, drafts

from bake import api
from bake.errors import BakeError, OutputBusy, OutputExists, OutputRefused
from bake.io import draft as module
from bake.io import moves
from bake.io.draft import Draft


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bake", *map(str, words)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "over"])
def test_of_real_runs_on_one_output_one_wins_and_the_others_are_told(tmp_path: Path, overwrite: bool) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    output, inputs = tmp_path / "out.safetensors", {}
    if overwrite:
        output.write_bytes(b"old")
    inputs = state(tmp_path)
    words = ("fuse", base, "-l", lora, "-o", output, *(["--overwrite"] if overwrite else []))
    ended = [(p.communicate(timeout=120), p.returncode) for p in [start(*words) for _ in range(3)]]
    for (out, err), code in ended:
        assert code in (0, 8)
        if code == 8:
            assert out == ""
            assert "being written by another bake" in err or "exists" in err or "appeared" in err
    assert 0 in [code for _, code in ended]
    assert bake_process("verify", output, "--full").code == 0
    assert {path: digest for path, digest in state(tmp_path).items() if path != output.name} == {
        path: digest for path, digest in inputs.items() if path != output.name
    }


def test_real_runs_on_different_outputs_do_not_disturb_each_other(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    outputs = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for process in [start("fuse", base, "-l", lora, "-o", output) for output in outputs]:
        err = process.communicate(timeout=120)[1]
        assert (process.returncode, err) == (0, "")
    assert len({output.read_bytes() for output in outputs}) == 1
    assert not drafts(tmp_path)


@pytest.mark.parametrize("name", ["file over an old one", "folder over an old one", "file with embeddings"])
def test_many_runs_in_one_process_race_for_one_output(server: Server, tmp_path: Path, name: str, runs: int) -> None:
    """Threads, which start within microseconds; the file locks hold between descriptors, not processes."""
    scene = prepare(server, name, tmp_path)
    told = 0
    for number in range(max(3, runs // 4)):
        folder = scene.copy(tmp_path / str(number))
        ended = race([word.replace("{}", str(folder)) for word in scene.words], scene.has_old)
        assert all(error is None or isinstance(error, (OutputBusy, OutputExists)) for error in ended), ended
        assert None in ended
        assert state(folder) == scene.after
        told += 4 - ended.count(None)
    assert told


def race(words: list[str], overwrite: bool) -> list[BakeError | None]:
    """What became of four runs that start in the same moment."""
    base, output = words[1], words[words.index("-o") + 1]
    lora, _, weight = words[words.index("-l") + 1].partition(":")
    ready = threading.Barrier(4)

    def run(_: int) -> BakeError | None:
        ready.wait()
        try:
            api.fuse(base, [(lora, float(weight or 1))], output, overwrite=overwrite, threads=1)
        except BakeError as error:
            return error
        return None

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(run, range(4)))


def publish_after(draft: Draft, meanwhile: Callable[[], object]) -> None:
    """A run during which something else happens."""
    with draft:
        meanwhile()
        draft.publish()


def test_an_output_that_another_run_publishes_meanwhile_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with pytest.raises(OutputExists, match="appeared"):
        publish_after(Draft(place, {"": 3}), lambda: place.write_bytes(b"first"))
    assert place.read_bytes() == b"first"
    assert not drafts(tmp_path)


def test_without_the_systems_help_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "_rename_with", lambda old, new, flag: False)
    test_an_output_that_another_run_publishes_meanwhile_is_kept(tmp_path)


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    with pytest.raises(OutputExists):
        publish_after(Draft(place, {"a": 3}), lambda: (place / "thesis.txt").write_text("years of work"))
    assert [each.name for each in place.iterdir()] == ["thesis.txt"]
    assert not drafts(tmp_path)


def test_an_output_published_between_check_and_start_is_not_replaced_unasked(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.write_bytes(b"first")
    with pytest.raises(OutputExists), Draft(place, {"": 3}):
        pass
    assert place.read_bytes() == b"first"
    assert not drafts(tmp_path)


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_run_that_starts_exactly_when_another_publishes_gets_a_draft_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folder: bool
) -> None:
    """It opens the draft before the rename and locks it after: what it has locked is the output by then."""
    sizes = {"a": 3} if is_folder else {"": 3}
    first = Draft(tmp_path / "out", sizes).__enter__()
    lock = module._lock

    def publish_first(descriptor: int) -> bool | None:
        monkeypatch.setattr(module, "_lock", lock)
        first.publish()
        return lock(descriptor)

    monkeypatch.setattr(module, "_lock", publish_first)
    before = None
    with Draft(tmp_path / "out", sizes, overwrite=True) as second:
        assert not second.leftover
        before = state(tmp_path / "out")
        assert second.path.exists()
        second.publish()
    assert state(tmp_path / "out") == before  # as long, and as empty
    assert not drafts(tmp_path)


def test_a_draft_that_somebody_removes_is_missed_before_it_is_renamed(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.write_bytes(b"old")
    draft = Draft(place, {"": 3}, overwrite=True)

    def replace_draft() -> None:
        draft.path.unlink()
        draft.path.write_bytes(b"somebody else's")

    with pytest.raises(OutputRefused, match="removed or replaced"):
        publish_after(draft, replace_draft)
    assert place.read_bytes() == b"old"
    assert draft.path.read_bytes() == b"somebody else's"


def test_where_there_are_no_locks_a_draft_that_is_found_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with Draft(tmp_path / "out", {"": 3}) as first:
        with pytest.raises(OutputBusy, match="no locks to tell"), Draft(tmp_path / "out", {"": 3}):
            pass
        first.publish()
    assert not drafts(tmp_path)


def test_a_busy_output_is_told_while_the_other_run_is_in_the_middle(server: Server, tmp_path: Path) -> None:
    scene = prepare(server, "folder", tmp_path)
    folder = scene.copy(tmp_path)
    with Draft(folder / "out", {"model.safetensors": 10}):
        ran = scene.run(folder, Fault("", 0, ""))
    assert ran.code == 8
    assert ran.err == f"bake: {folder / 'out'} is being written by another bake at this moment\n"
    assert state(folder) == scene.before
