"""Adapters saved by the trainers' own code, each with its base and the weights the trainer's forward pass gives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Arrays, bake, load

from bake.identify.checkpoint import BaseIdentity, identify_checkpoint
from bake.io.checkpoint import open_checkpoint
from bake.keys.modules import ModuleIndex
from bake.keys.places import split_parameter

# How many modules of each component an adapter updates: all that it has.
MODULES = {
    "diffusers-flux-lora": {"transformer": 266},
    "diffusers-sd15-kohya": {"unet": 150},
    "diffusers-sdxl-lora": {"unet": 560, "te1": 48, "te2": 128},
    "kohya-flux-lora": {"transformer": 304, "te1": 72},
    "kohya-flux-split-qkv": {"transformer": 114},
    "kohya-sd15-dylora": {"unet": 192, "te1": 72},
    "kohya-sd15-locon": {"unet": 278},
    "kohya-sd15-lora": {"unet": 192, "te1": 72},
    "kohya-sd15-oft": {"unet": 128},
    "kohya-sdxl-lora": {"unet": 722, "te1": 72, "te2": 192},
    "lycoris-sd15-diag-oft": {"unet": 194},
    "lycoris-sd15-dora-in": {"unet": 194},
    "lycoris-sd15-dora-out": {"unet": 128},
    "lycoris-sd15-ia3": {"unet": 80},
    "lycoris-sd15-locon-norm": {"unet": 258},
    "lycoris-sd15-loha": {"unet": 194, "te1": 72},
    "lycoris-sd15-lokr-both": {"unet": 194},
    "lycoris-sd15-lokr-tucker": {"unet": 88},
    "lycoris-wrapper-sd15-lokr": {"unet": 128},
    "onetrainer-sd15-dora-comfy": {"unet": 192},
    "onetrainer-sdxl-lora-legacy": {"unet": 722, "te1": 72, "te2": 193},
    "peft-llama-dora": {"model": 14},
    "peft-llama-ia3": {"model": 6},
    "peft-llama-lokr": {"model": 6},
    "peft-llama-lora-rs": {"model": 6},
    "peft-llama-tokens": {"model": 3},
    "peft-moe-target-params": {"model": 6},
}
TOLERANCE = 1e-6


def read_case(shared: Path, name: str) -> tuple[Path, dict[str, Any]]:
    folder = shared / "cases" / name
    return folder, json.loads((folder / "case.json").read_text())


def adapter_of(folder: Path, case: dict) -> Path:
    return folder if "adapter_config.json" in case["adapter"] else folder / case["adapter"][0]


def fused(name: str, base: Path, adapter: Path, weight: float, output: Path) -> Arrays:
    """The tensors of the verified result, named as in the index of its base; every module applied."""
    words = ("-l", f"{adapter}:{weight}", "--dtype", "fp32", "-o", output, "--verify", "full", "--json")
    done = bake("fuse", base, *words)
    assert done.code == 0, done.out
    assert done.json["components"] == {c: {"matched": n, "total": n} for c, n in MODULES[name].items()}
    assert not done.json["unmatched"]
    return all_tensors(output)


def all_tensors(checkpoint: Path) -> Arrays:
    """Every tensor of a file or folder; in a diffusers folder with the component's folder before it."""
    files = sorted(checkpoint.rglob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    return {
        ("" if file.parent in (checkpoint, checkpoint.parent) else f"{file.parent.name}/") + name: values
        for file in files
        for name, values in load(file).items()
    }


def expected_weights(folder: Path, case: dict, base: Path) -> Iterator[tuple[float, Arrays, bool]]:
    """(weight, tensors that change, whether these are all of them).

    At other weights than 1 bake interpolates DoRA, as A1111 and ComfyUI do, and not as its trainers do.
    """
    for expected in case["expected"]:
        weight, tensors = expected["multiplier"], load(folder / expected["file"])
        complete = not expected.get("subset")
        if "dora" in case["name"] and weight != 1:
            before, after = all_tensors(base), load(folder / "expected_1.0.safetensors")
            tensors = {name: before[name] + weight * (values - before[name]) for name, values in after.items()}
            complete = True
        yield weight, tensors, complete


@pytest.mark.parametrize("name", MODULES)
def test_a_trainers_adapter_gives_the_trainers_weights(shared: Path, tmp_path: Path, name: str) -> None:
    folder, case = read_case(shared, name)
    base = folder / case["base"].get("single_file", case["base"].get("hf_folder"))
    before = all_tensors(base)
    for weight, expected, complete in expected_weights(folder, case, base):
        output = tmp_path / (f"out_{weight}" if base.is_dir() else f"out_{weight}.safetensors")
        found = fused(name, base, adapter_of(folder, case), weight, output)
        for tensor, values in expected.items():
            np.testing.assert_allclose(found[tensor], values, rtol=0, atol=TOLERANCE, err_msg=tensor)
        if complete:
            for tensor in before.keys() - expected.keys():
                np.testing.assert_array_equal(found[tensor], before[tensor], err_msg=tensor)


@pytest.mark.parametrize("name", [name for name in MODULES if "-sd" in name])
def test_the_diffusers_folder_gives_them_too(shared: Path, tmp_path: Path, name: str) -> None:
    folder, case = read_case(shared, name)
    base = folder / case["base"]["diffusers"]
    found = fused(name, base, adapter_of(folder, case), 1.0, tmp_path / "out")
    before = all_tensors(base)
    expected = in_the_layout_of(base, folder / case["base"]["single_file"], load(folder / "expected_1.0.safetensors"))
    for tensor, values in expected.items():
        np.testing.assert_allclose(found[tensor], values, rtol=0, atol=TOLERANCE, err_msg=tensor)
    for tensor in before.keys() - expected.keys():
        np.testing.assert_array_equal(found[tensor], before[tensor], err_msg=tensor)


def in_the_layout_of(folder: Path, file: Path, weights: Arrays) -> Arrays:
    """`weights`, which are named as in `file`, under the names and in the pieces of a diffusers folder."""
    identity, names, _ = look_up(folder)
    _, _, index = look_up(file)
    found: Arrays = {}
    used: Counter[str] = Counter()
    for name in names:
        component = next(component for component in identity.components if name.startswith(component.prefix))
        module, parameter = split_parameter(name.removeprefix(component.prefix))
        for place in index.spellings.get(component.name, {}).get(module, {}).get(parameter, ()):
            if place.tensor in weights:
                values = weights[place.tensor][slice(*(place.rows or (None,)))]
                found[name] = values.T if place.transposed else values
                used[place.tensor] += values.size
    assert used == {name: values.size for name, values in weights.items()}
    return found


def look_up(checkpoint: Path) -> tuple[BaseIdentity, list[str], ModuleIndex]:
    opened = open_checkpoint(checkpoint)
    try:
        shapes = {name: info.shape for name, _, info in opened.tensors()}
    finally:
        opened.close()
    identity = identify_checkpoint(opened)
    return identity, list(shapes), ModuleIndex(identity.components, shapes)


def test_there_is_no_other_case(shared: Path) -> None:
    assert {path.parent.name for path in (shared / "cases").glob("*/case.json")} == MODULES.keys()
