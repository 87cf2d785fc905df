"""The place of an output: what is refused before anything is created."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest
from models import sd1_pair
from support import bake, drafts

from bake import api
from bake.errors import NoSpace, OutputExists, OutputRefused, SameFile
from bake.io import target as module
from bake.io.target import check_target, lies_in

Usage = namedtuple("Usage", "total used free")


def check(target: Path, inputs=(), is_folder: bool = False, overwrite: bool = False, needed: int = 100) -> Path:
    return check_target(target, inputs, is_folder, overwrite, needed)


def make_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "old.safetensors").write_bytes(b"old")
    return folder


class TestPlaces:
    def test_a_free_place_is_accepted(self, tmp_path: Path) -> None:
        assert check(tmp_path / "out.safetensors") == tmp_path / "out.safetensors"

    @pytest.mark.parametrize("there", [True, False], ids=["there", "dangling"])
    def test_a_link_is_followed(self, tmp_path: Path, there: bool) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "out.safetensors").symlink_to(tmp_path / "real" / "x.safetensors")
        if there:
            (tmp_path / "real" / "x.safetensors").touch()
        place = check(tmp_path / "out.safetensors", overwrite=there)
        assert place == tmp_path / "real" / "x.safetensors"

    def test_a_link_into_a_folder_that_is_missing_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "out.safetensors").symlink_to(tmp_path / "nowhere" / "x.safetensors")
        with pytest.raises(OutputRefused, match=r"nowhere does not exist"):
            check(tmp_path / "out.safetensors")

    def test_a_link_to_itself_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "out").symlink_to(tmp_path / "out")
        with pytest.raises(OutputRefused):
            check(tmp_path / "out", overwrite=True)
        assert (tmp_path / "out").is_symlink()

    def test_the_folder_of_the_output_must_exist(self, tmp_path: Path) -> None:
        with pytest.raises(OutputRefused, match="does not exist"):
            check(tmp_path / "no" / "out")

    def test_a_folder_in_the_place_of_a_file_and_the_reverse_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        with pytest.raises(OutputRefused, match="not a regular file"):
            check(tmp_path / "folder", overwrite=True)
        with pytest.raises(OutputRefused, match="is a file"):
            check(tmp_path / "file", is_folder=True, overwrite=True)

    def test_a_pipe_is_no_output(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OutputRefused, match="not a regular file"):
            check(tmp_path / "pipe", overwrite=True)

    @pytest.mark.skipif(not Path("/dev/null").exists(), reason="no device files on this system")
    def test_a_device_is_no_output(self, tmp_path: Path) -> None:
        (tmp_path / "null.safetensors").symlink_to("/dev/null")
        with pytest.raises(OutputRefused):
            check(Path("/dev/null"), overwrite=True)
        with pytest.raises(OutputRefused):
            check(tmp_path / "null.safetensors", overwrite=True)
        assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)

    def test_a_mounted_disk_is_not_exchanged(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
        with pytest.raises(OutputRefused, match="disk is mounted"):
            check(tmp_path / "out", is_folder=True)

    @pytest.mark.parametrize("place", ["parent", "out"])
    def test_a_place_that_the_system_does_not_show_is_a_refusal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
    ) -> None:
        (tmp_path / "out").touch()
        hidden, look = {"parent": tmp_path, "out": tmp_path / "out"}[place], os.stat

        def refuse(path, *arguments: object, **named: object) -> os.stat_result:
            if not isinstance(path, int) and Path(path) == hidden:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return look(path, *arguments, **named)

        monkeypatch.setattr(os, "stat", refuse)
        with pytest.raises(OutputRefused, match="Permission denied"):
            check(tmp_path / "out", overwrite=True)


class TestExisting:
    def test_an_existing_output_needs_overwrite(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_bytes(b"old")
        with pytest.raises(OutputExists, match="--overwrite"):
            check(tmp_path / "out")
        assert check(tmp_path / "out", overwrite=True)

    def test_an_empty_folder_is_free(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert check(tmp_path / "out", is_folder=True)

    def test_a_folder_that_is_no_model_is_never_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
        with pytest.raises(OutputExists, match="does not look like a model"):
            check(tmp_path / "out", is_folder=True, overwrite=True)

    def test_another_users_file_in_a_folder_like_tmp_is_not_ours_to_replace(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "out").write_bytes(b"theirs")
        monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1000)
        assert check(tmp_path / "out", overwrite=True)
        tmp_path.chmod(0o1777)
        with pytest.raises(OutputRefused, match="belongs to somebody else"):
            check(tmp_path / "out", overwrite=True)


class TestInputs:
    @pytest.mark.parametrize("how", ["same", "symlink", "hardlink"])
    def test_an_input_is_no_output(self, tmp_path: Path, how: str) -> None:
        base = tmp_path / "base.safetensors"
        base.write_bytes(b"weights")
        target = base if how == "same" else tmp_path / "out.safetensors"
        if how == "symlink":
            target.symlink_to(base)
        if how == "hardlink":
            target.hardlink_to(base)
        with pytest.raises(SameFile):
            check(target, [base], overwrite=True)

    def test_a_folder_that_holds_an_input_is_no_output(self, tmp_path: Path) -> None:
        folder = make_model(tmp_path / "model")
        with pytest.raises(SameFile):
            check(folder, [folder / "old.safetensors"], is_folder=True, overwrite=True)

    def test_names_do_not_matter_where_case_does_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file system without case: every name in capitals finds what the small letters find."""
        folder = make_model(tmp_path / "model")
        look, there = os.stat, os.path.lexists

        def small(path):
            return path if isinstance(path, int) else str(path).replace("MODEL", "model")

        monkeypatch.setattr(os, "stat", lambda path, *arguments, **named: look(small(path), *arguments, **named))
        monkeypatch.setattr(os.path, "lexists", lambda path: there(small(path)))
        with pytest.raises(SameFile):
            check(tmp_path / "MODEL", [folder / "old.safetensors"], is_folder=True, overwrite=True)
        assert lies_in(tmp_path / "MODEL" / "deep" / "out", folder)
        assert not lies_in(tmp_path / "other" / "out", folder)

    @pytest.mark.parametrize("name", [".out.bake-draft", ".out.bake-old"])
    def test_an_input_where_the_draft_will_be_is_not_taken_for_litter(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"rescued by hand")
        with pytest.raises(SameFile, match="choose another"):
            check(tmp_path / "out", [tmp_path / name])


class TestSpace:
    def test_a_disk_that_is_too_small_is_refused_before_any_work(self, tmp_path: Path) -> None:
        with pytest.raises(NoSpace, match="free") as caught:
            check(tmp_path / "out", needed=10**18)
        assert caught.value.details["needed"] == 10**18

    @pytest.mark.parametrize("has_old", [False, True])
    def test_exactly_enough_is_enough_and_a_byte_less_is_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_old: bool
    ) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        output = tmp_path / "out.safetensors"
        plan = api.build_plan(base, [lora])
        needed = api.output_bytes(plan)
        api.run_plan(plan, output)
        assert output.stat().st_size == needed  # of the whole new file, whatever lies there already
        if not has_old:
            output.unlink()
        for free, code in ((needed - 1, 8), (needed, 0)):
            usage = Usage(10**12, 0, free)
            monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
            for command in ("plan", "fuse"):
                done = bake(command, base, "-l", lora, "-o", output, "--overwrite", "--json")
                assert done.code == code, done
                if code:
                    assert done.json["error"]["code"] == "no-space"
                    assert output.exists() == has_old
            assert not drafts(tmp_path)

    def test_side_files_count(self, tmp_path: Path) -> None:
        from scenes import _folder, state

        base, _, lora, _, output = _folder(tmp_path)
        plan = api.build_plan(base, [lora])
        api.run_plan(plan, output)
        written = sum((output / path).stat().st_size for path, digest in state(Path(output)).items() if digest)
        assert api.output_bytes(plan) == written

    @pytest.mark.parametrize("is_folder", [False, True])
    def test_what_a_killed_run_left_there_counts_as_free(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folder: bool
    ) -> None:
        left = tmp_path / ".out.bake-draft"
        if is_folder:
            left.mkdir()
        (left / "shard" if is_folder else left).write_bytes(b"x" * 100_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 1000))
        assert check(tmp_path / "out", is_folder=is_folder, needed=100_000)
        with pytest.raises(NoSpace):
            check(tmp_path / "out", is_folder=is_folder, needed=200_000)


class TestPermissions:
    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_without_permission_is_refused(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(OutputRefused, match="no permission"):
            check(tmp_path / "out")

    def test_what_the_system_says_of_the_folder_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.os, "access", lambda path, mode: False)
        with pytest.raises(OutputRefused, match="no permission"):
            check(tmp_path / "out")


@pytest.mark.parametrize("command", ["plan", "fuse"])
@pytest.mark.parametrize("how", ["input", "hard link", "folder", "pipe", "exists", "draft", "embeddings"])
def test_plan_and_fuse_refuse_alike_and_create_nothing(tmp_path: Path, how: str, command: str) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    output = tmp_path / "out.safetensors"
    if how == "input":
        output = base
    if how == "hard link":
        output.hardlink_to(lora)
    if how == "folder":
        output.mkdir()
    if how == "pipe":
        os.mkfifo(output)
    if how == "exists":
        output.write_bytes(b"old")
    if how == "draft":
        base = base.rename(tmp_path / ".out.safetensors.bake-draft")
    if how == "embeddings":
        import numpy as np
        from support import load, save

        save(lora, {**{k: v.astype(np.float16) for k, v in load(lora).items()}, "<s1>": np.ones((1, 768), np.float32)})
        (tmp_path / "out.embeddings").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    options = [] if how == "exists" else ["--overwrite"]
    done = bake(command, base, "-l", lora, "-o", output, *options)
    assert done.code == 8, done
    assert done.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
