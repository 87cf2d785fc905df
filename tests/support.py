"""What the tests share: files made and read by the safetensors library, and float64 arithmetic in NumPy.

Nothing here uses bake's own reader, writer or maths, so that none of them can vouch for itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
SD1_BASE = FIXTURES / "sd1" / "base.safetensors"
KOHYA_LORA = FIXTURES / "sd1" / "loras" / "watercolour.safetensors"
DIFFUSERS_LORA = FIXTURES / "sd1" / "loras" / "fine_lines.safetensors"

Arrays = dict[str, "NDArray[Any]"]

BF16 = "bf16"  # stands for the dtype NumPy lacks


def save(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file with the safetensors library."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    # ascontiguousarray alone would make vectors of scalars
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    save_file(contiguous, path, metadata)
    return path


def save_torch(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> Path:
    """The same for dtypes that NumPy lacks."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def load(path: Path) -> Arrays:
    """Every tensor of a safetensors file in float64 (integers as they are), read by the safetensors library."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return {
        name: (tensor.to(torch.float64) if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in tensors.items()
    }


def raw(path: Path) -> dict[str, tuple[str, bytes]]:
    """name -> (dtype, bytes), by the format's description: 8 bytes of length, JSON, data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {name: (info["dtype"], data[slice(*info["data_offsets"])]) for name, info in header.items()}


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    content = path.read_bytes()
    found: dict[str, str] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    return found


def random(seed: int, *shape: int, spread: float = 1.0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape) * spread


def lora_delta(up: NDArray[Any], down: NDArray[Any], mid: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """The LoRA update in float64, by the definition: one sum per output element."""
    up64, down64 = up.astype(np.float64), down.astype(np.float64)
    up64 = up64.reshape(up64.shape[0], up64.shape[1])
    if mid is not None:
        down64 = down64.reshape(down64.shape[0], down64.shape[1])
        return np.einsum("ab...,oa,bi->oi...", mid.astype(np.float64), up64, down64)
    return np.tensordot(up64, down64, 1)


def rounded(values: NDArray[np.float64], dtype: type[np.floating[Any]]) -> NDArray[np.float64]:
    """float64 rounded once to `dtype` by NumPy."""
    return values.astype(dtype).astype(np.float64)


def ulps(found: NDArray[np.float64], exact: NDArray[np.float64], base: NDArray[np.float64]) -> float:
    """The largest error in units of the last place of float16, at the larger of |base| and |exact|."""
    size = np.maximum(np.abs(base), np.abs(exact)).astype(np.float16)
    return float(np.max(np.abs(found - exact) / np.spacing(size).astype(np.float64)))


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def bake(*words: object) -> Done:
    """Run the command line in this process."""
    from bake.cli import main
    from bake.interrupts import STOPPING

    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(word) for word in words])
    except SystemExit as end:
        return Done(end.code if isinstance(end.code, int) else 0, out.getvalue(), err.getvalue())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise AssertionError("main returned")


def bake_process(*words: object, cwd: Path | None = None, **environment: str) -> Done:
    """Run the command line in a fresh process."""
    finished = subprocess.run(
        [sys.executable, "-m", "bake", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    return Done(finished.returncode, finished.stdout, finished.stderr)


def drafts(folder: Path) -> list[Path]:
    """What bake left lying around in `folder`."""
    return sorted(folder.glob(".*bake*"))


def iter_shared(folder: Path, pattern: str) -> Iterator[Path]:
    yield from sorted(folder.glob(pattern))
