"""Writing to the disk beside the work."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from models import sd1_pair

from bake.api import build_plan, fuse
from bake.errors import NoSpace
from bake.io import files, writeback
from bake.io.writeback import Writeback


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writeback, "_PAUSE", 0.001)
    monkeypatch.setattr(writeback, "_SMALLEST", 1)


def fail(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "no space left")


def test_files_are_written_while_they_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(writeback, "start_writing", synced.append)
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with Writeback([path], forget=False):
        while len(synced) < 3:
            time.sleep(0.001)
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("can_ask", [True, False])
def test_the_system_is_asked_to_write_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_ask: bool
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(files, "_sync_file_range", lambda *range_: asked.append("range") or (0 if can_ask else -1))
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: asked.append("whole"), raising=False)
    files.start_writing(0)
    assert asked == (["range"] if can_ask else ["range", "whole"])


def test_what_the_disk_refused_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writeback, "start_writing", fail)
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with pytest.raises(OSError, match="no space"), Writeback([path], forget=False) as running:
        running._thread.join()
    with pytest.raises(ZeroDivisionError), Writeback([path], forget=False) as running:
        running._thread.join(1 / 0)


def test_a_run_whose_disk_fills_up_in_the_background_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    monkeypatch.setattr(writeback, "start_writing", fail)
    with pytest.raises(NoSpace):
        fuse(base, [lora], tmp_path / "out.safetensors")
    assert set(tmp_path.iterdir()) == {base, lora}


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no such advice")
def test_a_run_that_outgrows_the_memory_clears_up_behind_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    fuse(base, [lora], tmp_path / "kept.safetensors")
    dropped = {base.stat().st_ino: 0}

    def advise(descriptor: int, begin: int, count: int, advice: int) -> None:
        file = os.fstat(descriptor).st_ino
        if advice == os.POSIX_FADV_DONTNEED and file in dropped:
            dropped[file] += count

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    fuse(base, [lora], tmp_path / "out.safetensors")
    stored = sum(tensor.source.span[1] - tensor.source.span[0] for _, tensor in build_plan(base, [lora]).tensors())
    assert list(dropped.values()) == [stored]
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "kept.safetensors").read_bytes()


def test_only_what_is_not_in_memory_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("the system cannot tell what is in memory")
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    advised: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, begin, count, advice: advised.append(count))
    with files.reading(path) as descriptor:
        files.prefetch(descriptor, 0, 100_000)
        assert advised == []

        def not_there(*arguments: object) -> int:
            raise BlockingIOError

        monkeypatch.setattr(os, "preadv", not_there)
        files.prefetch(descriptor, 0, 100_000)
    assert advised == [100_000]
