"""Layers of several language models, one above the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import llama, peft_lora, random_arrays
from support import Arrays, bake, load, random, raw, rounded, save

from bake import build_merge_plan, check_output, merge
from bake.api import plan_recipe, run_plan
from bake.errors import Mismatch, Unsupported, UsageError
from bake.plan.recipe import AdapterChoice, Layers, MergeChoice, Recipe

LAYERS = 3
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS}


def save_model(folder: Path, seed: int, width: int = 8, config: dict[str, Any] | None = None) -> Path:
    """A model in two shards."""
    arrays = {name: (array + seed) for name, array in random_arrays(llama(LAYERS, width)).items()}
    arrays["lm_head.weight"] = random(seed, *arrays["model.embed_tokens.weight"].shape).astype(np.float16)
    index = {}
    for number, names in enumerate((sorted(arrays)[:9], sorted(arrays)[9:]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save(folder / shard, {name: arrays[name] for name in names}, {"format": "pt"})
        index |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def loaded(folder: Path) -> Arrays:
    return {name: array for path in folder.glob("*.safetensors") for name, array in load(path).items()}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    kinds = [{"layer_types": [f"{name}{layer}" for layer in range(LAYERS)]} for name in "ab"]
    return [save_model(tmp_path / f"m{seed}", seed, config=kind) for seed, kind in enumerate(kinds, 1)]


def test_layers_are_counted_anew_and_every_byte_is_copied(models: list[Path], tmp_path: Path) -> None:
    words = ["--layers", "1=0:2", "--layers", "2=0:3", "--layers", "1=2:3"]
    done = bake("merge", "passthrough", *models, *words, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    one, two, out = (loaded(folder) for folder in (*models, tmp_path / "out"))
    sources = [(one, 0), (one, 1), (two, 0), (two, 1), (two, 2), (one, 2)]
    layers = {name for name in out if name.startswith("model.layers.")}
    assert {int(name.split(".")[2]) for name in layers} == set(range(len(sources)))
    for name in layers:
        model, layer = sources[int(name.split(".")[2])]
        inner = name.split(".", 3)[3]
        np.testing.assert_array_equal(out[name], model[f"model.layers.{layer}.{inner}"], err_msg=name)
    for name in out.keys() - layers:
        np.testing.assert_array_equal(out[name], one[name], err_msg=name)
    assert done.json["tensors"]["copied"] == len(out)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(sources)
    assert config["layer_types"] == ["a0", "a1", "b0", "b1", "b2", "a2"]
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert check_output(tmp_path / "out", search=[tmp_path], full=True).ok


def test_norm_and_head_are_those_of_the_last_layers(models: list[Path], tmp_path: Path) -> None:
    merge("passthrough", models, tmp_path / "out", layers=["1=0:2", "2=1:3"])
    one, two, out = (loaded(folder) for folder in (*models, tmp_path / "out"))
    np.testing.assert_array_equal(out["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(out[name], two[name])


def test_stacked_layers_are_scaled_fused_into_and_sharded_in_one_pass(models: list[Path], tmp_path: Path) -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    lora = save(tmp_path / "lora.safetensors", peft_lora(llama(4), [name]))
    choice = MergeChoice(
        "passthrough", tuple(models), parameters={"scale": 0.5}, layers=(Layers(0, 0, 2), Layers(1, 1, 3))
    )
    recipe = Recipe(choice, (AdapterChoice(lora, 0.5),), shard_size=1024)
    result = run_plan(plan_recipe(recipe), tmp_path / "out", verify="full")
    assert result.report is not None
    assert result.report.equal_share == 1
    two, out, factors = loaded(models[1]), loaded(tmp_path / "out"), load(lora)
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    update = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
    exact = 0.5 * two["model.layers.2.self_attn.q_proj.weight"] + 0.5 * update
    np.testing.assert_array_equal(out[name], rounded(exact, np.float16))
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_one_model_loses_layers(models: list[Path], tmp_path: Path) -> None:
    merge("passthrough", models[:1], tmp_path / "out", layers=["1=0:1"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    assert len(raw(tmp_path / "out" / "model.safetensors")) < len(loaded(models[0]))


@pytest.mark.parametrize(
    ("method", "layers", "says"),
    [
        ("passthrough", ["3=0:1"], "there are 2 models"),
        ("passthrough", ["0=0:1"], "there are 2 models"),
        ("passthrough", ["1=0:4"], "the layers 0 to 2"),
        ("passthrough", ["1=2:2"], "the layers 0 to 2"),
        ("passthrough", ["1:0:2"], "not MODEL=FIRST:END"),
        ("weighted_sum", ["1=0:2"], "--layers is for passthrough"),
    ],
)
def test_layers_that_cannot_be_meant_are_refused(models: list[Path], method: str, layers: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build_merge_plan(method, models, layers=layers)


def test_models_of_other_sizes_and_kinds_are_refused(models: list[Path], tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", 3, width=16)
    with pytest.raises(Mismatch, match="one architecture and size"):
        build_merge_plan("passthrough", [models[0], wide], layers=["1=0:2", "2=0:1"])
    alone = save(tmp_path / "alone.safetensors", random_arrays(llama(LAYERS)))
    with pytest.raises(Unsupported, match="language models in folders"):
        build_merge_plan("passthrough", [alone], layers=["1=0:2"])
