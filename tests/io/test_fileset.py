"""The inputs of a run: opened on demand, closed, unchanged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from support import save

from bake.errors import InputChanged, InputError
from bake.io.fileset import Expected, FileSet


@pytest.fixture
def one(tmp_path: Path) -> tuple[Path, FileSet]:
    path = save(tmp_path / "a.safetensors", {"x": np.ones(4, np.float32)})
    status = path.stat()
    return path, FileSet([Expected(path, status.st_size, status.st_mtime_ns)])


def test_a_file_stays_open_while_anybody_uses_it(one) -> None:
    _, files = one
    with files.using(0) as file:
        with files.using(0) as same:
            assert same is file
        assert file._fd is None or file.kernel_span()[0] >= 0
        file.read_into(0, memoryview(bytearray(4)))
    assert file._fd is None


def test_a_changed_file_is_noticed_on_opening_and_at_the_end(one) -> None:
    path, files = one
    files.check_unchanged()
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputChanged, match="changed after it was planned"):
        files.check_unchanged()
    with pytest.raises(InputChanged), files.using(0):
        pass


def test_a_file_in_its_place_with_its_size_and_time_is_noticed(tmp_path: Path) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(path, {"x": np.ones(4, np.float32)})
    status = path.stat()
    save(other, {"x": np.zeros(4, np.float32)})
    known = Expected(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    FileSet([known]).check_unchanged()
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    with pytest.raises(InputChanged):
        FileSet([known]).check_unchanged()


def test_a_new_link_to_a_file_does_not_change_it(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"x": np.ones(4, np.float32)})
    status = path.stat()
    (tmp_path / "link").hardlink_to(path)
    path.chmod(0o600)
    assert path.stat().st_ctime_ns != status.st_ctime_ns
    FileSet([Expected(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)]).check_unchanged()


def test_a_vanished_file_is_an_input_error(one) -> None:
    path, files = one
    path.unlink()
    with pytest.raises(InputError, match="any more"):
        files.check_unchanged()
