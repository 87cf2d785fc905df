"""Adapters that strangers published, on full-size bases with the real names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from headers import write_listed
from listed_models import list_path
from models import UNET, peft_lora, random_arrays
from names import read_list, small
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


# Real adapters, a published base that they belong to, and how many modules of each component land there.
PAIRS = [
    ("lokr_kohya_sd15/smart_falcon_4_lokr.safetensors", "sd15_original", {"unet": 278, "te1": 72}),
    ("lokr_kohya_sd15/smart_falcon_4_lokr.safetensors", "sd15_diffusers", {"unet": 278, "te1": 72}),
    ("diffusers_unet_sd15", "sd15_original", {"unet": 128}),
    ("diffusers_unet_sd15", "sd15_diffusers", {"unet": 128}),
    ("diffusers_attnproc_sd15", "sd15_original", {"unet": 128}),
    ("diffusers_attnproc_sd15", "sd15_diffusers", {"unet": 128}),
    (
        *("cloneofsimo_safetensors/lora_disney_inpainting.safetensors", "sd15_inpainting_original"),
        {"unet": 144, "te1": 48},
    ),
    ("cloneofsimo_safetensors/lora_disney_inpainting.safetensors", "sd15_diffusers", {"unet": 144, "te1": 48}),
    ("cloneofsimo_pt/lora_pop.pt", "sd21_original", {"unet": 128}),
    ("cloneofsimo_pt/lora_pop.pt", "sd21_diffusers", {"unet": 128}),
    ("peft_minilm", "minilm_l6", {"model": 12}),
    ("peft_gpt2_conv1d", "gpt2_small", {"model": 36}),
    ("mlx_qwen2", "qwen25_0.5b", {"model": 4}),
]


@pytest.mark.parametrize(("adapter", "base", "components"), PAIRS)
def test_a_published_adapter_maps_completely(
    shared: Path, tmp_path: Path, adapter: str, base: str, components: dict[str, int]
) -> None:
    written = write_listed(tmp_path / base, list_path(shared, base))
    done = bake("plan", written, "-l", shared / "data" / adapter, "--json")
    assert done.code == 0, done.out
    found = {name: (part["matched"], part["total"]) for name, part in done.json["components"].items()}
    assert found == {name: (count, count) for name, count in components.items()}
    assert done.json["unmatched"] == []


@pytest.mark.parametrize(
    ("adapter", "base", "code", "says"),
    [
        ("cloneofsimo_pt/lora_pop.pt", "sd15_original", 5, "Stable Diffusion 2 (sd2); the base is Stable Diffusion 1"),
        (
            *("lokr_kohya_sd15/smart_falcon_4_lokr.safetensors", "sd21_original"),
            *(5, "Stable Diffusion 1 (sd1); the base is Stable Diffusion 2 (sd2)"),
        ),
        ("not_a_lora/flora_textual_inversion.pt", "sd15_original", 6, "a textual inversion"),
        ("unknown_names/sam_lora_rank2.safetensors", "sd15_original", 6, "SAM"),
        ("mlx_qwen2", "sd15_original", 5, "a language model"),
        ("peft_gpt2_conv1d", "sd15_original", 5, "a language model"),
        ("peft_minilm", "sd15_original", 4, "12 of 12 adapter modules"),
        ("peft_oracle/ia3_mlp", "sd15_original", 4, "1 of 1 adapter modules"),
        ("mlx_qwen2", "minilm_l6", 4, "4 of 4 adapter modules"),
    ],
)
def test_what_does_not_belong_here_is_refused_for_its_true_reason(
    shared: Path, tmp_path: Path, adapter: str, base: str, code: int, says: str
) -> None:
    written = write_listed(tmp_path / base, list_path(shared, base))
    done = bake("fuse", written, "-l", shared / "data" / adapter, "-o", tmp_path / "out.safetensors")
    assert done.code == code, done.err
    assert says in done.err
    assert [path.name for path in tmp_path.iterdir()] == [written.name]


def test_the_inpainting_lora_brings_its_words(shared: Path, tmp_path: Path) -> None:
    base = write_listed(tmp_path / "inpaint", list_path(shared, "sd15_inpainting_original"))
    lora = shared / "data" / "cloneofsimo_safetensors" / "lora_disney_inpainting.safetensors"
    found = bake("plan", base, "-l", lora, "--json").json
    assert (found["family"], found["variant"]) == ("sd1", "inpainting")
    assert found["components"] == {"unet": {"matched": 144, "total": 144}, "te1": {"matched": 48, "total": 48}}
    assert [(one["token"], one["vectors"], one["encoder"], one["file"]) for one in found["embeddings"]] == [
        ("<s1>", 1, "clip_l", "s1.safetensors"),
        ("<s2>", 1, "clip_l", "s2.safetensors"),
    ]


# Modules of the published LoKr and where SD1 has them, by hand; the first is all zeros.
LOKR_MODULES = {
    "lora_unet_down_blocks_0_resnets_0_conv1": UNET + "input_blocks.1.0.in_layers.2.weight",
    "lora_unet_down_blocks_0_resnets_0_conv2": UNET + "input_blocks.1.0.out_layers.3.weight",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (
        UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    ),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    ),
}


def test_a_published_lokr_is_fused_right(shared: Path, tmp_path: Path) -> None:
    file = shared / "data" / "lokr_kohya_sd15" / "smart_falcon_4_lokr.safetensors"
    factors = {n: a for n, a in load(file).items() if n.rpartition(".")[0] in LOKR_MODULES}
    assert len(factors) == 5 * len(LOKR_MODULES)
    lora = save(tmp_path / "lokr.safetensors", {name: a.astype(np.float16) for name, a in factors.items()})
    _, real = read_list(list_path(shared, "sd15_original"))
    shapes = small("sd1") | {tensor: real[tensor] for tensor in LOKR_MODULES.values()}
    base = save(tmp_path / "base.safetensors", random_arrays(shapes, np.float32))
    done = bake("fuse", base, "-l", f"{lora}:0.7", "-o", tmp_path / "out.safetensors", "--verify", "full")
    assert done.code == 0, done.err
    before, after = load(base), load(tmp_path / "out.safetensors")
    for module, tensor in LOKR_MODULES.items():
        one, two = (factors[f"{module}.lokr_w{n}_a"] @ factors[f"{module}.lokr_w{n}_b"] for n in (1, 2))
        scale = float(factors[f"{module}.alpha"]) / 4  # the rank
        exact = before[tensor] + 0.7 * scale * np.kron(one, two).reshape(before[tensor].shape)
        np.testing.assert_allclose(after[tensor], exact, rtol=2e-7, atol=1e-7, err_msg=tensor)
    assert np.abs(after[tensor] - before[tensor]).max() > 0


def test_a_published_mlx_adapter_is_fused_right(shared: Path, tmp_path: Path) -> None:
    about, shapes = read_list(list_path(shared, "qwen25_0.5b"))
    layers = {name: shape for name, shape in shapes.items() if ".layers.22." in name or ".layers.23." in name}
    base = tmp_path / "base"
    save(base / "model.safetensors", random_arrays(layers, np.float32))
    (base / "config.json").write_text(json.dumps(about["config"]["config.json"]))
    adapter = shared / "data" / "mlx_qwen2"
    done = bake("fuse", base, "-l", adapter, "-o", tmp_path / "out", "--verify", "full")
    assert done.code == 0, done.err
    factors = load(adapter / "adapters.safetensors")
    before, after = load(base / "model.safetensors"), load(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed <= {name.replace("lora_a", "weight") for name in factors}
    for module in {name.rpartition(".")[0] for name in factors}:
        update = 20 * (factors[f"{module}.lora_a"] @ factors[f"{module}.lora_b"]).T
        np.testing.assert_allclose(after[f"{module}.weight"], before[f"{module}.weight"] + update, rtol=1e-6, atol=1e-7)


def run_net(weights: dict[str, np.ndarray]) -> torch.Tensor:
    """The little network of the published oracle: embedding, Conv1D, ReLU, linear, log-softmax."""
    tensors = {name: torch.from_numpy(array).float() for name, array in weights.items()}
    x = tensors["emb.weight"][torch.arange(90).reshape(9, 10)]
    x = torch.relu(x @ tensors["conv1d.weight"] + tensors["conv1d.bias"]).flatten(1)
    return torch.log_softmax(x @ tensors["lin0.weight"].T + tensors["lin0.bias"], dim=-1)


def test_the_published_answer_of_the_peft_oracle_for_a_lora(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "peft_oracle" / "lora_emb_conv1d"
    done = bake("fuse", folder / "base.safetensors", "-l", folder, "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    (expected,) = load(folder / "expected.safetensors").values()
    found = run_net(load(tmp_path / "out.safetensors")).double().numpy()
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(run_net(load(folder / "base.safetensors")).double().numpy() - expected).max() > 0.5


def run_mlp(weights: dict[str, np.ndarray]) -> torch.Tensor:
    """The other little network of the published oracle: linear, ReLU, linear, log-softmax."""
    tensors = {name: torch.from_numpy(array).float() for name, array in weights.items()}
    x = torch.arange(90).reshape(9, 10).float()
    x = torch.relu(x @ tensors["lin0.weight"].T + tensors["lin0.bias"])
    return torch.log_softmax(x @ tensors["lin1.weight"].T + tensors["lin1.bias"], dim=-1)


def test_the_published_answer_of_the_peft_oracle_for_an_ia3(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "peft_oracle" / "ia3_mlp"
    done = bake("fuse", folder / "base.safetensors", "-l", folder, "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    (expected,) = load(folder / "expected.safetensors").values()
    found = run_mlp(load(tmp_path / "out.safetensors")).double().numpy()
    assert np.abs(found - expected).max() < 2e-5  # the published answer is float32, of values up to 40
    assert np.abs(run_mlp(load(folder / "base.safetensors")).double().numpy() - expected).max() > 10


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
