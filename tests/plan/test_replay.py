"""A stored recipe finds its inputs again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from models import llama, peft_lora, random_arrays, sd1_pair
from support import save

from bake.api import check_output, fuse, stored_recipe
from bake.errors import InputError
from bake.plan.recipe import AdapterChoice
from bake.plan.replay import recipe_from_record


@pytest.fixture
def baked(tmp_path: Path) -> Path:
    base, lora, _ = sd1_pair(tmp_path / "in")
    (tmp_path / "out").mkdir()
    fuse(base, [AdapterChoice(lora, 0.5, te=0.25, rank_limit=1)], tmp_path / "out" / "x.safetensors")
    return tmp_path / "out" / "x.safetensors"


def replay(path: Path, *folders: Path):
    return recipe_from_record(stored_recipe(path), folders, str(path))


def test_inputs_are_found_below_the_folders_searched(baked: Path, tmp_path: Path) -> None:
    recipe = replay(baked, tmp_path)
    assert recipe.base == tmp_path / "in" / "base.safetensors"
    assert recipe.adapters == (AdapterChoice(tmp_path / "in" / "style.safetensors", 0.5, te=0.25, rank_limit=1),)


def test_renamed_inputs_are_found_by_digest(baked: Path, tmp_path: Path) -> None:
    deep = tmp_path / "elsewhere" / "deep"
    shutil.move(tmp_path / "in", deep)
    (deep / "style.safetensors").rename(deep / "renamed.safetensors")
    assert replay(baked, tmp_path).adapters[0].path == deep / "renamed.safetensors"


def test_a_file_of_the_same_name_and_size_but_other_content_is_not_taken(baked: Path, tmp_path: Path) -> None:
    lora = tmp_path / "in" / "style.safetensors"
    content = bytearray(lora.read_bytes())
    content[-1] ^= 1
    lora.write_bytes(content)
    with pytest.raises(InputError, match=r"needs style.safetensors \(SHA-256") as caught:
        replay(baked, tmp_path)
    assert "--search" in caught.value.message


def test_verification_replays_and_passes(baked: Path, tmp_path: Path) -> None:
    assert check_output(baked, search=[tmp_path / "in"], full=True).ok


def test_a_sharded_base_and_a_peft_folder_are_found_as_folders(tmp_path: Path) -> None:
    shapes = llama()
    folder = tmp_path / "models" / "llama"
    half = sorted(shapes)[: len(shapes) // 2]
    index = {}
    for number, part in enumerate((half, sorted(set(shapes) - set(half))), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save(folder / shard, random_arrays({name: shapes[name] for name in part}))
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    adapter = tmp_path / "adapters" / "style"
    save(adapter / "adapter_model.safetensors", peft_lora(shapes, ["model.layers.0.self_attn.q_proj.weight"]))
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    fuse(folder, [adapter], tmp_path / "out")
    recipe = replay(tmp_path / "out", tmp_path / "models", tmp_path / "adapters")
    assert recipe.base == folder
    assert recipe.adapters[0].path == adapter / "adapter_model.safetensors"
    assert check_output(tmp_path / "out", search=[tmp_path / "models", tmp_path / "adapters"], full=True).ok
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        replay(tmp_path / "out", tmp_path / "models", tmp_path / "adapters")


def test_a_file_without_a_recipe_says_so(tmp_path: Path) -> None:
    base, _, _ = sd1_pair(tmp_path)
    with pytest.raises(InputError, match=r"carries no bake.recipe.*--base and -l"):
        stored_recipe(base)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(schema=2),
        lambda r: r.pop("base"),
        lambda r: r.update(adapters=3),
        lambda r: r.update(settings=None),
        lambda r: r["base"].update(files=[]),
        lambda r: r["adapters"][0].update(weight="heavy"),
        lambda r: r["adapters"][0].update(files=[{}]),
        lambda r: r["base"]["files"][0].update(name=7),
    ],
)
def test_a_malformed_recipe_is_an_input_error(baked: Path, tmp_path: Path, change) -> None:
    record = stored_recipe(baked)
    change(record)
    with pytest.raises(InputError):
        recipe_from_record(record, [tmp_path], "x")
