"""Extraction of a full-size model: memory is Python, torch, one difference and the factors of one module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT
from test_full_size import MEASURED

pytestmark = [pytest.mark.big, pytest.mark.xdist_group("big")]

_LIMIT_KB = 1_000_000  # the two models have 4.2 GB


def test_memory_does_not_grow_with_the_model(sd15: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.safetensors"
    tuned.write_bytes(sd15.read_bytes())
    with tuned.open("rb") as file:
        begin = int.from_bytes(file.read(8), "little") + 8
    values = np.memmap(tuned, np.float16, "r+", offset=begin)
    for first in range(0, len(values), 10_000_000):  # another model: every value a little larger
        values[first : first + 10_000_000] *= np.float16(1.01)
    del values
    words = ("extract", tuned, sd15, "-o", tmp_path / "l.safetensors", "--rank", 4, "--only", "unet", "--no-recipe")
    command = [sys.executable, "-c", MEASURED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < _LIMIT_KB
