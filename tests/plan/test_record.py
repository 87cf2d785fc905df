"""What the output says about itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from models import sd1_pair
from support import load, metadata, save

import bake
from bake.api import build_plan, fuse
from bake.identify.checkpoint import BaseIdentity
from bake.plan.record import RECIPE_KEY, carried_metadata


def fused(folder: Path, output: str = "out.safetensors", **options) -> tuple[Path, dict[str, str]]:
    base, lora, _ = sd1_pair(folder)
    fuse(base, [(lora, 0.8)], folder / output, **options)
    return folder / output, metadata(folder / output)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_recipe_names_inputs_by_digest_and_never_by_path(tmp_path: Path) -> None:
    _, found = fused(tmp_path)
    recipe = json.loads(found[RECIPE_KEY])
    base, lora = tmp_path / "base.safetensors", tmp_path / "style.safetensors"
    assert recipe["version"] == bake.__version__
    assert recipe["base"]["files"] == [
        {"name": "base.safetensors", "size": base.stat().st_size, "sha256": sha256(base)}
    ]
    (adapter,) = recipe["adapters"]
    assert adapter["weight"] == 0.8
    assert adapter["files"] == [{"name": "style.safetensors", "size": lora.stat().st_size, "sha256": sha256(lora)}]
    assert recipe["components"] == {"unet": [5, 5], "te1": [1, 1]}
    assert str(tmp_path) not in json.dumps(found)


def test_web_uis_find_their_keys(tmp_path: Path) -> None:
    _, found = fused(tmp_path)
    digest = sha256(tmp_path / "base.safetensors")
    recipe, models = json.loads(found["sd_merge_recipe"]), json.loads(found["sd_merge_models"])
    assert recipe["type"] == "bake"
    assert recipe["primary_model_hash"] == digest
    assert recipe["loras"][0]["name"] == "style.safetensors"
    assert models[digest]["name"] == "base.safetensors"
    assert models[digest]["legacy_hash"] == "e3b0c442"
    assert found["modelspec.architecture"] == "stable-diffusion-v1"
    assert found["modelspec.title"] == "base + style (0.8)"
    assert found["modelspec.merged_from"] == "base, style"
    assert found["format"] == "pt"


def test_the_name_and_the_time_of_the_output_leave_no_trace(tmp_path: Path) -> None:
    one, _ = fused(tmp_path, "one.safetensors")
    two = tmp_path / "two.safetensors"
    fuse(tmp_path / "base.safetensors", [(tmp_path / "style.safetensors", 0.8)], two)
    assert one.read_bytes() == two.read_bytes()


def test_no_recipe_leaves_no_names_and_no_digests(tmp_path: Path) -> None:
    path, found = fused(tmp_path, record=False)
    assert "style" not in json.dumps(found)
    assert b"style" not in path.read_bytes()
    assert not {RECIPE_KEY, "sd_merge_recipe", "sd_merge_models", "modelspec.title"} & set(found)


def test_the_users_keys_have_the_last_word(tmp_path: Path) -> None:
    _, found = fused(tmp_path, metadata={"modelspec.title": "Mine", "author": "me"})
    assert (found["modelspec.title"], found["author"]) == ("Mine", "me")


def test_a_bake_on_a_bake_keeps_the_history(tmp_path: Path) -> None:
    first, _ = fused(tmp_path)
    fuse(first, [tmp_path / "style.safetensors"], tmp_path / "second.safetensors")
    found = metadata(tmp_path / "second.safetensors")
    recipe = json.loads(found[RECIPE_KEY])
    assert recipe["base"]["recipe"]["adapters"][0]["weight"] == 0.8
    models = json.loads(found["sd_merge_models"])
    assert {entry["name"] for entry in models.values()} == {"base.safetensors", "out.safetensors"}
    assert models[sha256(first)]["sd_merge_recipe"]["loras"][0]["weight"] == 0.8


def test_stale_identities_are_dropped_and_load_bearing_keys_kept() -> None:
    base = {
        **{"modelspec.hash_sha256": "0x1", "modelspec.thumbnail": "data:", "sshs_model_hash": "1", "ss_epoch": "3"},
        **{"prompt": "{}", "workflow": "{}", "modelspec.title": "old", "modelspec.date": "2020"},
        **{"config": '{"transformer": {}}', "_quantization_metadata": "{}", "modelspec.license": "MIT", "own": "x"},
    }
    found = carried_metadata(base, BaseIdentity("sd1", "original", ()), {})
    assert {key for key in base if key in found} == {"config", "_quantization_metadata", "modelspec.license", "own"}


@pytest.mark.parametrize(("stored", "kept"), [("mlx", "mlx"), ("pt", "pt"), ("np", "pt"), (None, "pt")])
def test_the_format_key_is_one_that_loaders_accept(stored: str | None, kept: str) -> None:
    base = {} if stored is None else {"format": stored}
    assert carried_metadata(base, BaseIdentity("llama", "huggingface", ()), {})["format"] == kept


def test_damaged_records_of_the_base_do_not_stop_a_bake(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    broken = {RECIPE_KEY: "{", "sd_merge_models": "[1]", "sd_merge_recipe": "null"}
    damaged = save(tmp_path / "b.safetensors", {n: a.astype("float16") for n, a in load(base).items()}, broken)
    fuse(damaged, [lora], tmp_path / "out.safetensors")
    recipe = json.loads(metadata(tmp_path / "out.safetensors")[RECIPE_KEY])
    assert "recipe" not in recipe["base"]


def test_a_language_model_gets_a_recipe_but_no_image_keys(tmp_path: Path) -> None:
    from models import llama, peft_lora, random_arrays

    save(tmp_path / "base.safetensors", random_arrays(llama()))
    lora = save(tmp_path / "a.safetensors", peft_lora(llama(), ["model.layers.0.self_attn.q_proj.weight"]))
    fuse(tmp_path / "base.safetensors", [lora], tmp_path / "out.safetensors")
    assert set(metadata(tmp_path / "out.safetensors")) == {"format", RECIPE_KEY}


def test_header_space_is_known_before_the_digests(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    plan = build_plan(base, [lora])
    from bake.api import output_bytes

    fuse(base, [lora], tmp_path / "out.safetensors")
    assert output_bytes(plan) == (tmp_path / "out.safetensors").stat().st_size
