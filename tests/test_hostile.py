"""Every hostile file: the documented exit code, one message, nothing written, nothing changed, nothing allocated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import FIXTURES, Done, bake

HOSTILE = FIXTURES / "hostile"
CASES: list[dict[str, Any]] = json.loads((HOSTILE / "cases.json").read_text())
BASE, ADAPTER = HOSTILE / "good" / "base.safetensors", HOSTILE / "good" / "adapter.safetensors"


def listing(folder: Path) -> dict[str, bytes]:
    """Everything below `folder`, with its content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def judge(done: Done, exit_code: int, says: str) -> None:
    """The exit code is the one that was due, and a refusal is one message and nothing else."""
    assert done.code == exit_code, done.err or done.out
    if exit_code == 0:
        return
    assert done.out == ""
    assert done.err.startswith("bake: ")
    assert "Traceback" not in done.err
    assert "a bug in bake" not in done.err
    assert len(done.err) < 3000
    assert not any(ord(letter) < 32 and letter != "\n" for letter in done.err)
    assert says in done.err


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder beside copies of the good base and adapter."""
    shutil.copytree(HOSTILE / "good", tmp_path / "good")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_hostile_file_is_refused_by_every_command_and_nothing_is_written(case: dict[str, Any], place: Path) -> None:
    given = place / case["path"] if "path" in case else place
    if "path" in case:
        source = HOSTILE / case["path"]
        shutil.copytree(source, given) if source.is_dir() else shutil.copyfile(source, given)
    before = listing(place)
    output = place / "work" / "out.safetensors"
    if case["role"] == "base":
        request: list[object] = [given, "-l", place / "good" / ADAPTER.name]
    elif case["role"] == "adapter":
        request = [place / "good" / BASE.name, "-l", given]
    else:
        request = [place / "good" / BASE.name, "--prompt", case.get("prompt", ""), "--lora-dir", place / "good"]
    exit_code, says = case["exit"], case["says"]
    if "path" in case:
        judge(bake("inspect", given), case.get("inspect", exit_code), says)
    if case["role"] == "baked":
        judge(bake("verify", given), exit_code, says)
    else:
        judge(bake("plan", *request), 0 if exit_code == 7 and case.get("inspect") == 0 else exit_code, says)
        judge(bake("fuse", *request, "-o", output), exit_code, says)
    if exit_code == 0:
        output.unlink(missing_ok=True)
    assert listing(place) == before
