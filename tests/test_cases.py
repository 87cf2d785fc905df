"""Adapters saved by the trainers' own code, each with its base and the weights the trainer's forward pass gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models import UNET
from support import bake, load

from bake.keys.places import split_parameter
from bake.keys.unet import translate

# What this version fuses; everything else among the cases has to be refused, by its name.
FUSED = {
    "diffusers-sd15-kohya": {"unet": 150},
    "diffusers-sdxl-lora": {"unet": 560, "te1": 48, "te2": 128},
    "kohya-sd15-dylora": {"unet": 192, "te1": 72},
    "kohya-sd15-locon": {"unet": 278},
    "kohya-sd15-lora": {"unet": 192, "te1": 72},
    "kohya-sdxl-lora": {"unet": 722, "te1": 72, "te2": 192},
    "lycoris-sd15-locon-norm": {"unet": 258},
    "onetrainer-sdxl-lora-legacy": {"unet": 722, "te1": 72, "te2": 193},
    "peft-llama-lora-rs": {"model": 6},
}


def adapter_of(folder: Path, case: dict) -> Path:
    return folder if "adapter_config.json" in case["adapter"] else folder / case["adapter"][0]


def all_tensors(output: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file or folder, named as the expected files name them: without the component's folder."""
    files = sorted(output.rglob("*.safetensors")) if output.is_dir() else [output]
    return {name: values for file in files for name, values in load(file).items()}


@pytest.mark.parametrize("name", FUSED)
def test_a_trainers_adapter_gives_the_trainers_weights(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "cases" / name
    case = json.loads((folder / "case.json").read_text())
    base = folder / case["base"].get("single_file", case["base"].get("hf_folder"))
    output = tmp_path / ("out" if base.is_dir() else "out.safetensors")
    for expected in case["expected"]:
        words = ("-l", f"{adapter_of(folder, case)}:{expected['multiplier']}", "--dtype", "fp32", "-o", output)
        done = bake("fuse", base, *words, "--overwrite", "--verify", "full", "--json")
        assert done.code == 0, done.out
        assert done.json["components"] == {c: {"matched": n, "total": n} for c, n in FUSED[name].items()}
        found, before = all_tensors(output), all_tensors(base)
        weights = load(folder / expected["file"])
        for tensor, values in weights.items():
            np.testing.assert_allclose(found[tensor], values, rtol=0, atol=1e-6, err_msg=tensor)
        if not expected.get("subset"):
            untouched = before.keys() - weights.keys()
            assert all(np.array_equal(found[tensor], before[tensor]) for tensor in untouched)


@pytest.mark.parametrize("name", [name for name in FUSED if "sd" in name])
def test_the_diffusers_folder_gives_them_too(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "cases" / name
    case = json.loads((folder / "case.json").read_text())
    words = ("-l", adapter_of(folder, case), "--dtype", "fp32", "-o", tmp_path / "out", "--verify", "full", "--json")
    done = bake("fuse", folder / case["base"]["diffusers"], *words)
    assert done.code == 0, done.out
    assert done.json["components"] == {c: {"matched": n, "total": n} for c, n in FUSED[name].items()}
    weights = {
        tensor.removeprefix(UNET): values for tensor, values in load(folder / "expected_1.0.safetensors").items()
    }
    ldm = {split_parameter(tensor.removeprefix(UNET))[0] for tensor in load(folder / case["base"]["single_file"])}
    names = translate(ldm)
    found = all_tensors(tmp_path / "out" / "unet")
    compared = 0
    for tensor, values in weights.items():
        module, parameter = split_parameter(tensor)
        if module in names:
            np.testing.assert_allclose(found[f"{names[module]}.{parameter}"], values, rtol=0, atol=1e-6, err_msg=tensor)
            compared += 1
    assert compared == FUSED[name]["unet"] + sum(
        1 for tensor in weights if "norm" in tensor and tensor.endswith("bias")
    )


def test_every_other_case_is_refused_by_name_and_writes_nothing(shared: Path, tmp_path: Path) -> None:
    for path in sorted((shared / "cases").glob("*/case.json")):
        if path.parent.name in FUSED:
            continue
        case = json.loads(path.read_text())
        base = path.parent / case["base"].get("single_file", case["base"].get("hf_folder"))
        output = tmp_path / ("out" if base.is_dir() else "out.safetensors")
        done = bake("fuse", base, "-l", adapter_of(path.parent, case), "-o", output)
        assert done.code in (4, 6), (path.parent.name, done)
        assert not output.exists()
