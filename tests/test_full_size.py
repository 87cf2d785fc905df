"""Full-size models: exactness over hundreds of millions of elements, and memory that stays where it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import layouts
import numpy as np
import pytest
from models import write_random
from support import ROOT, bake

from bake.keys import unet

pytestmark = [pytest.mark.big, pytest.mark.xdist_group("big")]

# Runs bake and says on stderr how much memory the process took at most, in kB. Linux counts what the parent
# held at the fork towards ru_maxrss; its VmHWM begins anew with the program.
MEASURED = """
import pathlib, re, resource, sys
from bake.cli import main
try:
    main(sys.argv[1:])
finally:
    status = pathlib.Path("/proc/self/status")
    own = re.search(r"VmHWM:\\s*(\\d+)", status.read_text()) if status.exists() else None
    print(own[1] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def measured(*words: object) -> tuple[dict, int]:
    """(JSON document, peak resident bytes) of a bake in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    kilobytes = int(finished.stderr.split()[-1])
    return json.loads(finished.stdout), kilobytes * (1 if sys.platform == "darwin" else 1024)


def write_lora(path: Path, shapes: layouts.Shapes, rank: int, convolutions: bool) -> Path:
    """kohya's names for every Linear layer, and every convolution if asked, of a UNet."""
    prefix, wanted = "model.diffusion_model.", {}
    ldm = {
        name.removeprefix(prefix).removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.startswith(prefix) and name.endswith(".weight") and len(shape) > 1
    }
    names = unet.translate(ldm)
    for module, shape in ldm.items():
        if convolutions or "attentions" in names[module]:
            flat = "lora_unet_" + names[module].replace(".", "_")
            wanted[f"{flat}.lora_up.weight"] = (shape[0], rank, *(1,) * (len(shape) - 2))
            wanted[f"{flat}.lora_down.weight"] = (rank, *shape[1:])
    return write_random(path, wanted)


def test_sd15_is_exact_and_untouched_where_it_should_be(sd15: Path, big_space: Path) -> None:
    lora = write_lora(big_space / "lora.safetensors", layouts.sd1(), 32, convolutions=False)
    output = big_space / "out.safetensors"
    done, peak = measured("fuse", sd15, "-l", f"{lora}:0.8", "-o", output)
    assert done["components"] == {"unet": {"matched": 192, "total": 192}}
    assert peak < 600 * 2**20
    report = bake("verify", output, "--full", "--search", sd15.parent, "--json").json
    assert report["ok"]
    assert report["untouched_identical"]
    assert report["elements"] > 250_000_000
    assert report["equal_share"] >= 0.9998
    assert report["max_ulp"] <= 0.55


def test_memory_stays_below_a_gibibyte_for_sdxl(big_space: Path) -> None:
    """A 6.9 GB base with a rank-128 LoCon over the whole UNet."""
    base = write_random(big_space / "sdxl.safetensors", layouts.sdxl())
    lora = write_lora(big_space / "locon.safetensors", layouts.sdxl(), 128, convolutions=True)
    done, peak = measured("fuse", base, "-l", f"{lora}:0.8", "-o", big_space / "out.safetensors")
    assert done["components"]["unet"] == {"matched": 794, "total": 794}
    assert done["bytes"]["written"] > 6.9e9
    assert peak < 2**30


def test_many_loras_cost_no_more_memory_than_one(sd15: Path, big_space: Path) -> None:
    loras = []
    for number in range(5):
        path = write_lora(big_space / f"lora{number}.safetensors", layouts.sd1(), 32, convolutions=False)
        with path.open("r+b") as file:  # different content, so that they are different LoRAs
            file.seek(-2 * number - 2, 2)
            file.write(np.float16(0.5).tobytes())
        loras += ["-l", f"{path}:0.2"]
    _, one = measured("fuse", sd15, *loras[:2], "-o", big_space / "one.safetensors")
    _, five = measured("fuse", sd15, *loras, "-o", big_space / "five.safetensors")
    assert five < one + 200 * 2**20


def memory_of_tree(process: int) -> int:
    """Bytes that a process and its children take now; what they share counts once."""
    total, children = 0, [process]
    try:
        for thread in Path(f"/proc/{process}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
        for number in children:
            found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{number}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) * 1024 if found else 0
    except (OSError, ProcessLookupError):
        pass  # one of them has just ended
    return total


def merged(*words: object) -> tuple[dict, int]:
    """(JSON document, peak bytes of the process and its workers) of a merge."""
    command = [sys.executable, "-m", "bake", "merge", *map(str, words), "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        peak = 0
        while running.poll() is None:
            peak = max(peak, memory_of_tree(running.pid))
            time.sleep(0.1)
        assert running.stdout is not None
        return json.loads(running.stdout.read()), peak


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process and its workers share")
def test_sdxl_merges_in_bounded_memory_and_more_models_need_no_more(big_space: Path) -> None:
    models = []
    for number in range(3):
        path = write_random(big_space / f"{number}.safetensors", layouts.sdxl())
        with path.open("r+b") as file:  # different content
            file.seek(-2 * number - 2, 2)
            file.write(np.float16(0.5).tobytes())
        models.append(path)
    out = big_space / "out.safetensors"
    done, two = merged("weighted_sum", *models[:2], "-p", "alpha=0.3", "-o", out)
    assert done["verification"]["equal_share"] == 1
    assert 0 < two < 2**30
    _, three = merged("linear", *models, "-o", out, "--overwrite")
    assert three < two + 100 * 2**20
