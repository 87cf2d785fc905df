"""Bases that are folders, and stacks of files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SD1_MODULES, UNET, kohya_lora, llama, peft_lora, random_arrays
from names import small
from safetensors import safe_open
from support import drafts, load, lora_delta, raw, rounded, save

from bake.api import fuse
from bake.keys.unet import translate

CLIP = "cond_stage_model.transformer."


def split_sd1() -> tuple[dict, dict]:
    arrays = random_arrays(small("sd1"))
    unet = {name.removeprefix(UNET): array for name, array in arrays.items() if name.startswith(UNET)}
    clip = {name.removeprefix(CLIP): array for name, array in arrays.items() if name.startswith(CLIP)}
    return unet, clip


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A diffusers folder of SD1, its UNet in two shards."""
    folder = tmp_path / "pipeline"
    unet, clip = split_sd1()
    names = translate({name.rpartition(".")[0] for name in unet})
    renamed = {f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": array for n, array in unet.items()}
    keys = sorted(renamed)
    index = {}
    for number, part in enumerate((keys[:300], keys[300:]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save(folder / "unet" / shard, {key: renamed[key] for key in part}, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    text = json.dumps({"metadata": {"total_size": sum(a.nbytes for a in renamed.values())}, "weight_map": index})
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    save(folder / "text_encoder" / "model.safetensors", clip, {"format": "pt"})
    for relative in ("model_index.json", "unet/config.json", "text_encoder/config.json", "tokenizer/vocab.json"):
        (folder / relative).parent.mkdir(exist_ok=True)
        (folder / relative).write_text(f'{{"_class_name": "{relative}"}}')
    return folder


def test_a_diffusers_folder_comes_out_as_a_diffusers_folder(pipeline: Path, tmp_path: Path) -> None:
    arrays, deltas = kohya_lora(small("sd1"))
    lora = save(tmp_path / "lora.safetensors", arrays)
    result = fuse(pipeline, [lora], tmp_path / "out", verify="full")
    assert {name: (c.matched, c.total) for name, c in result.plan.components.items()} == {"unet": (5, 5), "te1": (1, 1)}
    relative = lambda folder: {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}  # noqa: E731
    assert relative(pipeline) == relative(tmp_path / "out")
    for side in ("model_index.json", "unet/config.json", "tokenizer/vocab.json"):
        assert (pipeline / side).read_bytes() == (tmp_path / "out" / side).read_bytes()
    touched = 0
    for path in sorted(pipeline.rglob("*.safetensors")):
        before, after = raw(path), raw(tmp_path / "out" / path.relative_to(pipeline))
        assert before.keys() == after.keys()
        touched += sum(before[name] != after[name] for name in before)
    assert touched == len(deltas) == 6
    fc2 = "text_model.encoder.layers.11.mlp.fc2.weight"
    expected = load(pipeline / "text_encoder" / "model.safetensors")[fc2] + deltas[CLIP + fc2]
    found = load(tmp_path / "out" / "text_encoder" / "model.safetensors")[fc2]
    np.testing.assert_array_equal(found, rounded(expected, np.float16))
    index = json.loads((tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "out" / "unet" / shard, "np") as file:
            assert name in file.keys()  # noqa: SIM118 - not a dict


def test_a_stack_is_written_file_by_file_with_one_accounting(tmp_path: Path) -> None:
    unet, clip = split_sd1()
    base, text = save(tmp_path / "unet.safetensors", unet), save(tmp_path / "clip_l.safetensors", clip)
    arrays, deltas = kohya_lora(small("sd1"))
    lora = save(tmp_path / "lora.safetensors", arrays)
    result = fuse(base, [lora], tmp_path / "out", also=[text], verify="full")
    assert {name: c.matched for name, c in result.plan.components.items()} == {"unet": 5, "te1": 1}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip_l.safetensors", "unet.safetensors"]
    for module, tensor in SD1_MODULES.items():
        prefix, path = (UNET, base) if tensor.startswith(UNET) else (CLIP, text)
        name = tensor.removeprefix(prefix)
        exact = load(path)[name] + deltas[tensor]
        found = load(tmp_path / "out" / path.name)[name]
        assert np.mean(found == rounded(exact, np.float16)) > 0.99, module


def test_a_language_model_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shapes = llama()
    arrays = random_arrays(shapes, np.float32)
    save(folder / "model.safetensors", arrays, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    adapter = tmp_path / "adapter"
    target = "model.layers.1.mlp.down_proj.weight"
    factors = peft_lora(shapes, [target])
    save(adapter / "adapter_model.safetensors", factors)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    result = fuse(folder, [(adapter, 0.5)], tmp_path / "out")
    assert "not copied from the base folder: pytorch_model.bin" in result.plan.notes
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    up, down = (factors[f"base_model.model.{target[:-7]}.lora_{side}.weight"] for side in "BA")
    exact = arrays[target] + 0.5 * 4 * lora_delta(up, down)
    np.testing.assert_allclose(load(tmp_path / "out" / "model.safetensors")[target], exact, rtol=1e-6, atol=1e-6)


def test_an_existing_folder_is_replaced_as_a_whole(pipeline: Path, tmp_path: Path) -> None:
    lora = save(tmp_path / "lora.safetensors", kohya_lora(small("sd1"))[0])
    out = tmp_path / "out"
    out.mkdir()
    (out / "model_index.json").write_text("{}")
    (out / "old.txt").write_text("old")
    fuse(pipeline, [lora], out, overwrite=True)
    assert not (out / "old.txt").exists()
    assert (out / "unet" / "config.json").exists()
    assert not drafts(tmp_path)


def test_a_pickled_checkpoint_comes_out_as_safetensors(tmp_path: Path) -> None:
    arrays = random_arrays(small("sd1"))
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save({"state_dict": state, "global_step": 840000}, tmp_path / "base.ckpt")
    factors, deltas = kohya_lora(small("sd1"))
    lora = save(tmp_path / "lora.safetensors", factors)
    result = fuse(tmp_path / "base.ckpt", [lora], tmp_path / "out.safetensors", verify="full")
    assert result.report is not None
    assert result.report.untouched_identical
    after = load(tmp_path / "out.safetensors")
    for name, array in arrays.items():
        exact = array + deltas[name] if name in deltas else array
        assert np.mean(after[name] == (rounded(exact, np.float16) if name in deltas else array)) > 0.99
