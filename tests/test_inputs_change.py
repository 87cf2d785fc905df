"""Inputs that change while a run reads them: whenever it happens, nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import kohya_lora, sd1_pair
from names import small
from support import bake, drafts, save

from bake import api
from bake.errors import InputChanged, InputError
from bake.io.writeback import Writeback


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def replace(path: Path) -> None:
    """By another file of the same size and time."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def remove(path: Path) -> None:
    path.unlink()


STAGES = ("bake.api.Execution", "bake.api._write_headers", "bake.api._verified", "bake.api._check_unchanged")


@pytest.mark.parametrize("verify", ["none", "sample"])
@pytest.mark.parametrize("role", ["base", "adapter"])
@pytest.mark.parametrize("change", [grow, touch, replace, remove], ids=lambda change: change.__name__)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.rpartition(".")[2])
def test_an_input_that_changes_is_noticed_whenever_it_happens(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    change: Callable[[Path], None],
    role: str,
    verify: api.Verification,
) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"old")
    name = stage.rpartition(".")[2]
    step = getattr(api, name)

    def changing(*arguments, **named):
        change(base if role == "base" else lora)
        return step(*arguments, **named)

    monkeypatch.setattr(api, name, changing)
    with pytest.raises(InputError if change is remove else InputChanged):
        api.fuse(base, [lora], output, overwrite=True, verify=verify)
    assert output.read_bytes() == b"old"
    assert not drafts(tmp_path)


def test_a_base_that_changes_while_it_is_copied_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    enter = Writeback.__enter__

    def meanwhile(self: Writeback) -> Writeback:
        save(base, {"x": np.ones(4, np.float16)})
        return enter(self)

    monkeypatch.setattr(Writeback, "__enter__", meanwhile)
    done = bake("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors", "--json")
    assert done.code == 3
    assert done.json["error"]["code"] in ("input-changed", "unreadable")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_link_that_is_turned_to_another_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    other = save(tmp_path / "other.safetensors", kohya_lora(small("sd1"), seed=5)[0])
    os.utime(other, ns=(lora.stat().st_atime_ns, lora.stat().st_mtime_ns))
    link = tmp_path / "link.safetensors"
    link.symlink_to(lora)
    plan = api.build_plan(base, [link])
    link.unlink()
    link.symlink_to(other)
    with pytest.raises(InputChanged):
        api.run_plan(plan, tmp_path / "out.safetensors", verify="none")
    assert not drafts(tmp_path)


def test_a_pipe_is_no_input(tmp_path: Path) -> None:
    _, lora, _ = sd1_pair(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    done = bake("fuse", tmp_path / "pipe.safetensors", "-l", lora, "-o", tmp_path / "out.safetensors")
    assert done.code == 3
    assert "not a regular file" in done.err
