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


def test_a_vanished_file_is_an_input_error(one) -> None:
    path, files = one
    path.unlink()
    with pytest.raises(InputError, match="any more"):
        files.check_unchanged()
