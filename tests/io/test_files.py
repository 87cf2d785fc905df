"""Byte ranges: whole or an error, inside the kernel or not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bake.errors import InputError
from bake.io import files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


@pytest.fixture(params=["positioned", "seeking"])
def access(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading: by position, and as on Windows with a seek before."""
    if request.param == "seeking":
        monkeypatch.setattr(files, "_read_some", files._read_after_seek)
        monkeypatch.setattr(files, "_write_some", files._write_after_seek)


@pytest.mark.usefixtures("access")
def test_a_range_is_read_and_written_whole(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(2**20))
    with files.reading(source) as fd:
        content = files.read_bytes(fd, 100, 700_000, source)
    assert content == source.read_bytes()[100:700_000]
    descriptor = files.open_for_writing(target)
    files.write_at(descriptor, memoryview(content), 50)
    os.close(descriptor)
    assert target.read_bytes()[50 : 50 + len(content)] == content


def test_short_reads_and_writes_are_continued(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = files._read_some, files._write_some
    monkeypatch.setattr(files, "_read_some", lambda fd, buffer, offset: read(fd, buffer[:777], offset))
    monkeypatch.setattr(files, "_write_some", lambda fd, data, offset: write(fd, data[:555], offset))
    target = tmp_path / "target"
    target.touch()
    with files.reading(source) as fd:
        content = files.read_bytes(fd, 0, 10_000, source)
    descriptor = files.open_for_writing(target)
    files.write_at(descriptor, memoryview(content), 0)
    os.close(descriptor)
    assert target.read_bytes() == source.read_bytes()[:10_000]


def test_reading_past_the_end_is_an_error_that_names_the_place(source: Path) -> None:
    with files.reading(source) as fd, pytest.raises(InputError, match="ends at byte 1048576, 10 more"):
        files.read_bytes(fd, 2**20 - 10, 2**20 + 10, source)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        files.open_for_reading(tmp_path / "nothing")


@pytest.mark.parametrize("failure", [None, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_copies_are_exact_with_and_without_the_kernel(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int | None
) -> None:
    if failure is not None:

        def refuse(*arguments: object) -> int:
            raise OSError(failure, os.strerror(failure))

        monkeypatch.setattr(os, "copy_file_range", refuse)
    target = tmp_path / "target"
    target.write_bytes(b"x" * 2_000_000)
    done: list[int] = []
    descriptor = files.open_for_writing(target)
    with files.reading(source) as fd:
        files.copy_range(fd, 1000, 1_000_001, descriptor, 7, source, done.append)
    os.close(descriptor)
    written = target.read_bytes()
    assert written[7 : 7 + 999_001] == source.read_bytes()[1000:1_000_001]
    assert written[:7] == b"x" * 7
    assert set(written[7 + 999_001 :]) == {ord("x")}
    assert sum(done) == 999_001


@pytest.mark.parametrize(("broken", "kind"), [("preadv", InputError), ("pwrite", OSError)])
def test_which_disk_is_broken_shows_when_the_kernel_cannot_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, kind: type[Exception]
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "broken disk")

    target = tmp_path / "target"
    target.touch()
    descriptor = files.open_for_writing(target)
    monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr(os, broken, fail)
    with files.reading(source) as fd, pytest.raises(kind, match="broken disk"):
        files.copy_range(fd, 0, 100, descriptor, 0, source, lambda count: None)
    os.close(descriptor)


def test_a_system_that_writes_nothing_and_says_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.touch()
    descriptor = files.open_for_writing(target)
    monkeypatch.setattr(os, "pwrite", lambda *arguments: 0)
    with pytest.raises(OSError, match="writes no more"):
        files.write_at(descriptor, memoryview(b"x"), 0)
    os.close(descriptor)


def test_a_file_is_copied_and_made_whole(source: Path, tmp_path: Path) -> None:
    files.copy_file(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    files.write_file(tmp_path / "made", b"content")
    assert (tmp_path / "made").read_bytes() == b"content"
    with pytest.raises(InputError, match="No such file"):
        files.copy_file(tmp_path / "nothing", tmp_path / "other")
