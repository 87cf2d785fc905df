"""Time whole bakes against plain copies of the same file, in turn, and print medians and ratios.

    python scripts/bench.py FOLDER [--case sd15] [--case sdxl] [--runs 3]

FOLDER needs room for three checkpoints: 7 GB for sd15, 22 GB for sdxl. Models are made of random
values under the real names. Every figure is a whole fresh process, run A B A B, files in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import layouts
import numpy as np

import bake
from bake.io.header import build_header, lay_out
from bake.keys import unet

_POOL_VALUES = 4_194_301  # prime, so that the rows of a tensor do not repeat


@dataclass(frozen=True)
class Case:
    """One bake that is timed."""

    shapes: Callable[[], layouts.Shapes]
    rank: int
    convolutions: bool
    loras: int = 1


CASES = {
    "sd15": Case(layouts.sd1, 32, False),
    "sd15-five": Case(layouts.sd1, 32, False, loras=5),
    "sdxl": Case(layouts.sdxl, 128, True),
}


@dataclass(frozen=True)
class Run:
    """One finished process."""

    seconds: float
    peak_bytes: int


def write_model(path: Path, shapes: layouts.Shapes, seed: int) -> None:
    """A safetensors file of random fp16 values (integers are zero)."""
    placed = lay_out((name, layouts.stored_dtype(name), shape) for name, shape in shapes.items())
    pool = (np.random.default_rng(seed).standard_normal(_POOL_VALUES) * 0.02).astype(np.float16).tobytes()
    with path.open("wb") as file:
        file.write(build_header(placed, {"format": "pt"}))
        for info in placed.values():
            source = pool if info.dtype == "F16" else bytes(len(pool))
            left = info.nbytes
            while left:
                left -= file.write(source[:left])


def lora_shapes(shapes: layouts.Shapes, rank: int, convolutions: bool) -> layouts.Shapes:
    """kohya's names for every Linear layer, and every convolution if asked, of a UNet."""
    prefix = "model.diffusion_model."
    ldm = {
        name.removeprefix(prefix).removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.startswith(prefix) and name.endswith(".weight") and len(shape) > 1
    }
    names = unet.translate(ldm)
    found: layouts.Shapes = {}
    for module, shape in ldm.items():
        if convolutions or "attentions" in names[module]:
            flat = "lora_unet_" + names[module].replace(".", "_")
            found[f"{flat}.lora_up.weight"] = (shape[0], rank, *(1,) * (len(shape) - 2))
            found[f"{flat}.lora_down.weight"] = (rank, *shape[1:])
    return found


def timed(words: Sequence[str]) -> Run:
    """Run a command and measure it."""
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status != 0:
        sys.exit(f"failed: {' '.join(words)}")
    return Run(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def bench(folder: Path, name: str, runs: int) -> dict[str, object]:
    """Medians of one case."""
    case = CASES[name]
    base, output = folder / "base.safetensors", folder / "out.safetensors"
    write_model(base, case.shapes(), 0)
    words = ["fuse", str(base), "-o", str(output), "--overwrite", "-q"]
    for number in range(case.loras):
        lora = folder / f"lora{number}.safetensors"
        write_model(lora, lora_shapes(case.shapes(), case.rank, case.convolutions), number + 1)
        words += ["-l", f"{lora}:{0.8 / case.loras:.3f}"]
    commands = {
        "cp": ["cp", str(base), str(output)],
        "import torch": [sys.executable, "-c", "import torch"],
        "bake": [sys.executable, "-m", "bake", *words],
    }
    timed(["cp", str(base), str(output)])  # the first touch of everything is not measured
    measured: dict[str, list[Run]] = {command: [] for command in commands}
    for _ in range(runs):
        for command, line in commands.items():
            measured[command].append(timed(line))
    seconds = {command: statistics.median(run.seconds for run in done) for command, done in measured.items()}
    return {
        "case": name,
        "seconds": {command: round(median, 2) for command, median in seconds.items()},
        "ratio to cp + import": round(seconds["bake"] / (seconds["cp"] + seconds["import torch"]), 2),
        "peak MiB": max(run.peak_bytes for run in measured["bake"]) // 2**20,
        "base GB": round(base.stat().st_size / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", action="append", choices=CASES, help="default: sd15")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    print(f"bake {bake.__version__}, {os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}")
    for name in arguments.case or ["sd15"]:
        folder = arguments.folder / f"bench-{name}"
        folder.mkdir(parents=True)
        try:
            print(json.dumps(bench(folder, name, arguments.runs)))
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
