"""Adapters that strangers published, on full-size bases with the real names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import peft_lora
from names import read_list
from support import bake, load, save

pytestmark = pytest.mark.xdist_group("big")


def make(shared: Path, name: str, output: Path, *words: str) -> Path:
    """A model of random weights from a published list of names."""
    script = shared / "names" / "make_random.py"
    subprocess.run([sys.executable, script, shared / "names" / name, output, *words], check=True)
    return output


@pytest.mark.big
@pytest.mark.parametrize(
    ("adapter", "components"),
    [
        ("diffusers_unet_sd15/pytorch_lora_weights.safetensors", {"unet": 128}),
        ("diffusers_attnproc_sd15/pytorch_lora_weights.safetensors", {"unet": 128}),
        ("cloneofsimo_safetensors/lora_disney_inpainting.safetensors", {"unet": 144, "te1": 48}),
    ],
)
def test_a_published_lora_maps_completely_and_is_fused_right(
    sd15: Path, shared: Path, tmp_path: Path, adapter: str, components: dict[str, int]
) -> None:
    output = tmp_path / "out.safetensors"
    done = bake("fuse", sd15, "-l", f"{shared / 'data' / adapter}:0.9", "-o", output, "--json")
    assert done.code == 0, done.out
    found = {name: (part["matched"], part["total"]) for name, part in done.json["components"].items()}
    assert found == {name: (count, count) for name, count in components.items()}
    report = bake("verify", output, "--full", "--search", sd15.parent, "--search", shared / "data", "--json").json
    output.unlink()
    assert report["ok"]
    assert report["untouched_identical"]
    assert report["untouched"]["tensors"] == 1145 - sum(components.values())
    assert report["equal_share"] >= 0.9998
    assert report["max_ulp"] <= 0.55


@pytest.mark.big
@pytest.mark.parametrize(
    ("adapter", "code", "says"),
    [
        ("cloneofsimo_pt/lora_pop.pt", 5, "Stable Diffusion 2 (sd2); the base is Stable Diffusion 1 (sd1)"),
        ("lokr_kohya_sd15/smart_falcon_4_lokr.safetensors", 6, "LoKr"),
        ("not_a_lora/flora_textual_inversion.pt", 6, "a textual inversion"),
        ("unknown_names/sam_lora_rank2.safetensors", 6, "SAM"),
        ("mlx_qwen2", 5, "a language model"),
        ("peft_gpt2_conv1d", 5, "a language model"),
        ("peft_minilm", 4, "12 of 12 adapter modules"),
        ("peft_oracle/ia3_mlp", 6, "IA3"),
    ],
)
def test_what_does_not_belong_here_is_refused_for_its_true_reason(
    sd15: Path, shared: Path, tmp_path: Path, adapter: str, code: int, says: str
) -> None:
    done = bake("fuse", sd15, "-l", shared / "data" / adapter, "-o", tmp_path / "out.safetensors")
    assert done.code == code
    assert says in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.big
def test_the_inpainting_lora_fits_the_inpainting_base(shared: Path, big_space: Path) -> None:
    base = make(shared, "sd15_inpainting_original.json", big_space / "inpaint.safetensors", "--dtype", "F16")
    lora = shared / "data" / "cloneofsimo_safetensors" / "lora_disney_inpainting.safetensors"
    found = bake("plan", base, "-l", lora, "--json").json
    base.unlink()
    assert (found["family"], found["variant"]) == ("sd1", "inpainting")
    assert found["components"] == {"unet": {"matched": 144, "total": 144}, "te1": {"matched": 48, "total": 48}}
    assert "token embeddings (<s1>, <s2>)" in " ".join(found["notes"])


def run_net(weights: dict[str, np.ndarray]) -> torch.Tensor:
    """The little network of the published oracle: embedding, Conv1D, ReLU, linear, log-softmax."""
    tensors = {name: torch.from_numpy(array).float() for name, array in weights.items()}
    x = tensors["emb.weight"][torch.arange(90).reshape(9, 10)]
    x = torch.relu(x @ tensors["conv1d.weight"] + tensors["conv1d.bias"]).flatten(1)
    return torch.log_softmax(x @ tensors["lin0.weight"].T + tensors["lin0.bias"], dim=-1)


def test_the_published_answer_of_the_peft_oracle(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "peft_oracle" / "lora_emb_conv1d"
    done = bake("fuse", folder / "base.safetensors", "-l", folder, "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    (expected,) = load(folder / "expected.safetensors").values()
    found = run_net(load(tmp_path / "out.safetensors")).double().numpy()
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(run_net(load(folder / "base.safetensors")).double().numpy() - expected).max() > 0.5


def test_gpt2_with_a_published_adapter(shared: Path, tmp_path: Path) -> None:
    base = make(shared, "gpt2_small.json", tmp_path / "gpt2")
    adapter = shared / "data" / "peft_gpt2_conv1d"
    done = bake("fuse", base, "-l", adapter, "-o", tmp_path / "out", "--verify", "full", "--json")
    assert done.code == 0, done.out
    assert done.json["components"] == {"model": {"matched": 36, "total": 36}}
    factors = load(adapter / "adapter_model.safetensors")
    before, after = load(base / "model.safetensors"), load(tmp_path / "out" / "model.safetensors")
    module = "base_model.model.transformer.h.3.mlp.c_proj"
    update = 4 * (factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]).T
    np.testing.assert_allclose(after["h.3.mlp.c_proj.weight"], before["h.3.mlp.c_proj.weight"] + update, atol=1e-6)


@pytest.mark.big
def test_sharded_language_model_with_a_peft_adapter(shared: Path, big_space: Path) -> None:
    base = make(shared, "qwen25_0.5b.json", big_space / "qwen", "--shards", "3")
    (base / "tokenizer.json").write_text("{}")
    _, shapes = read_list(shared / "names" / "qwen25_0.5b.json")
    targets = [name for name in shapes if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight"))]
    adapter = big_space / "adapter"
    save(adapter / "adapter_model.safetensors", peft_lora(shapes, targets, rank=16))
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 1}))
    done = bake("fuse", base, "-l", adapter, "-o", big_space / "out", "--verify", "full", "--json")
    assert done.code == 0, done.out
    assert done.json["components"]["model"] == {"matched": 72, "total": 72}
    assert done.json["verification"]["equal_share"] >= 0.9998
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (big_space / "out").iterdir()} == names
