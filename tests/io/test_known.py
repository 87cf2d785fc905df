"""Digests that are remembered, and files whose digest must not be."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bake.io import digest, known
from bake.io.digest import digest_file, known_digest


@pytest.fixture
def old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written long ago, and an empty memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "_SETTLED", 0)
    path = tmp_path / "model.bin"
    path.write_bytes(b"one" * 1000)
    time.sleep(0.02)
    return path


def forget_how_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("the file was read again")

    monkeypatch.setattr(digest, "digest_file", fail)


def test_an_unchanged_file_is_not_read_again(old_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = known_digest(old_file)
    assert first == digest_file(old_file)
    forget_how_to_read(monkeypatch)
    assert known_digest(old_file) == first


def test_a_file_of_the_same_size_and_time_with_other_bytes_is(old_file: Path) -> None:
    first, times = known_digest(old_file), old_file.stat()
    time.sleep(0.02)
    old_file.write_bytes(b"two" * 1000)
    os.utime(old_file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known_digest(old_file) == digest_file(old_file) != first


def test_a_file_in_the_place_of_another_is(old_file: Path, tmp_path: Path) -> None:
    first = known_digest(old_file)
    other = tmp_path / "other"
    other.write_bytes(b"two" * 1000)
    os.replace(other, old_file)
    assert known_digest(old_file) == digest_file(old_file) != first


def test_a_file_that_was_just_written_is_not_remembered(old_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_SETTLED", 10**12)
    known_digest(old_file)
    assert known.Known().recall(old_file, old_file.stat()) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "[" * 100_000])
def test_a_damaged_memory_is_no_memory(old_file: Path, content: str) -> None:
    known_digest(old_file)
    place = known._place()
    assert place.is_file()
    place.write_text(content)
    assert known_digest(old_file) == digest_file(old_file)


def test_the_digest_of_a_damaged_entry_is_not_believed(old_file: Path) -> None:
    known_digest(old_file)
    place = known._place()
    place.write_text(place.read_text().replace('"sha256": "', '"sha256": "0'))
    assert known_digest(old_file) == digest_file(old_file)


def test_a_place_that_cannot_be_written_is_no_error(
    old_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    assert known_digest(old_file) == digest_file(old_file)


def test_only_the_latest_files_are_kept(tmp_path: Path, old_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_KEPT", 2)
    paths = [tmp_path / f"{number}.bin" for number in range(3)]
    for path in paths:
        path.write_bytes(b"x")
    time.sleep(0.02)
    for path in paths:
        known_digest(path)
    assert [known.Known().recall(path, path.stat()) is not None for path in paths] == [False, True, True]
