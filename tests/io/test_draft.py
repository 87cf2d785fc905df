"""Drafts: the output appears whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, drafts

from bake.errors import NoSpace, OutputBusy, OutputRefused
from bake.io import moves as module
from bake.io.draft import Draft


def make_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "old.safetensors").write_bytes(b"old")
    return folder


class TestFiles:
    def test_published_bytes_replace_the_old_file(self, tmp_path: Path) -> None:
        place = tmp_path / "out"
        place.write_bytes(b"old")
        with Draft(place, {"": 3}, overwrite=True) as draft:
            draft.file("").write_bytes(b"new")
            assert place.read_bytes() == b"old"
            draft.publish()
        assert place.read_bytes() == b"new"
        assert not drafts(tmp_path)

    def test_an_error_leaves_the_old_file_and_no_litter(self, tmp_path: Path) -> None:
        place = tmp_path / "out"
        place.write_bytes(b"old")
        with pytest.raises(RuntimeError), Draft(place, {"": 100}, overwrite=True):
            raise RuntimeError
        assert place.read_bytes() == b"old"
        assert not drafts(tmp_path)

    def test_space_is_reserved_at_once(self, tmp_path: Path) -> None:
        with Draft(tmp_path / "out", {"": 123_456}) as draft:
            assert draft.path.stat().st_size == 123_456
            assert draft.path.stat().st_blocks * 512 >= 123_456

    def test_the_mode_is_that_of_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            with Draft(tmp_path / "out", {"": 1}) as draft:
                draft.publish()
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640

    @pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoSpace), (errno.EACCES, OutputRefused)])
    def test_a_disk_that_refuses_the_space_is_a_typed_error_without_litter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
    ) -> None:
        def refuse(*arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(kind), Draft(tmp_path / "out", {"": 100}):
            pass
        assert not drafts(tmp_path)

    def test_a_file_system_without_reservation_gets_an_empty_file_of_the_size(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "not here")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with Draft(tmp_path / "out", {"": 1000}) as draft:
            assert draft.path.stat().st_size == 1000

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_failure_while_publishing_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        place = tmp_path / "out"
        place.write_bytes(b"old")

        def fail(*arguments: object) -> None:
            raise OSError(errno.EIO, "broken disk")

        with Draft(place, {"": 3}, overwrite=True) as draft:
            monkeypatch.setattr(os, call, fail)
            with pytest.raises(OutputRefused, match="broken disk"):
                draft.publish()
        assert place.read_bytes() == b"old"
        assert not drafts(tmp_path)


class TestLocks:
    def test_a_second_run_on_the_same_output_is_told(self, tmp_path: Path) -> None:
        with Draft(tmp_path / "out", {"": 10}) as draft:
            other = subprocess.run(
                [sys.executable, "-c", f"from bake.io.draft import Draft; from pathlib import Path; "
                 f"Draft(Path({str(tmp_path / 'out')!r}), {{'': 5}}).__enter__()"],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert "OutputBusy" in other.stderr
            assert draft.path.stat().st_size == 10

    def test_runs_on_different_outputs_do_not_meet(self, tmp_path: Path) -> None:
        with Draft(tmp_path / "a", {"": 1}), Draft(tmp_path / "b", {"": 1}):
            pass

    @pytest.mark.parametrize("is_folder", [False, True])
    def test_what_a_killed_run_left_is_noticed_and_replaced(self, tmp_path: Path, is_folder: bool) -> None:
        place = tmp_path / "out"
        left = tmp_path / ".out.bake-draft"
        if is_folder:
            (left / "deep").mkdir(parents=True)
            (left / "deep" / "rest").write_bytes(b"rest")
        else:
            left.write_bytes(b"a longer rest than the new file")
        with Draft(place, {"x.safetensors": 3} if is_folder else {"": 3}) as draft:
            assert draft.leftover
            draft.publish()
        assert not drafts(tmp_path)
        size = (place / "x.safetensors" if is_folder else place).stat().st_size
        assert size == 3
        assert not is_folder or [path.name for path in place.iterdir()] == ["x.safetensors"]

    def test_a_run_that_finds_nothing_says_nothing(self, tmp_path: Path) -> None:
        with Draft(tmp_path / "out", {"": 1}) as draft:
            assert not draft.leftover

    def test_busy_is_an_output_refusal(self) -> None:
        assert issubclass(OutputBusy, OutputRefused)


class TestFolders:
    @pytest.mark.parametrize("in_one_step", [True, False])
    def test_a_folder_is_exchanged_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool
    ) -> None:
        place = make_model(tmp_path / "out")
        if not in_one_step:
            monkeypatch.setattr(module.sys, "platform", "darwin")
        with Draft(place, {"unet/a.safetensors": 3, "b.safetensors": 3}, overwrite=True) as draft:
            draft.file("unet/a.safetensors").write_bytes(b"new")
            assert (place / "old.safetensors").exists()
            draft.publish()
        assert sorted(path.name for path in place.rglob("*")) == ["a.safetensors", "b.safetensors", "unet"]
        assert (place / "unet" / "a.safetensors").read_bytes() == b"new"
        assert not drafts(tmp_path)

    def test_a_run_killed_between_the_two_steps_is_undone_by_the_next(self, tmp_path: Path) -> None:
        place = make_model(tmp_path / "out")
        place.rename(tmp_path / ".out.bake-old")
        with pytest.raises(RuntimeError), Draft(place, {"a": 1}, overwrite=True):
            raise RuntimeError
        assert (place / "old.safetensors").read_bytes() == b"old"
        assert not drafts(tmp_path)

    def test_a_new_folder_is_renamed_into_place(self, tmp_path: Path) -> None:
        with Draft(tmp_path / "out", {"a": 1}) as draft:
            assert not (tmp_path / "out").exists()
            draft.publish()
        assert (tmp_path / "out" / "a").stat().st_size == 1

    def test_an_error_removes_the_whole_draft(self, tmp_path: Path) -> None:
        place = make_model(tmp_path / "out")
        with pytest.raises(RuntimeError), Draft(place, {"a": 1}, overwrite=True):
            raise RuntimeError
        assert (place / "old.safetensors").read_bytes() == b"old"
        assert not drafts(tmp_path)
