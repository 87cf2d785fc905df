"""What an output tells about what it was made from: by default names and no paths, with --no-recipe nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import llama, peft_lora, random_arrays, sd1_pair
from support import Arrays, bake, metadata, random, save

SECRET = b"quetzal"  # in the names of everything that shall not be told
PRIVATE = b"tukan"  # in the path of everything
_TITLES = {"modelspec.title", "modelspec.merged_from"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder whose name is nobody's business."""
    folder = tmp_path / "tukan's models"
    folder.mkdir()
    return folder


def written(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of everything in `folder`; names count as content."""
    for path in folder.rglob("*"):
        relative = path.relative_to(folder).as_posix()
        yield relative, relative.encode() + (path.read_bytes() if path.is_file() else b"")


def single(place: Path) -> tuple[list[object], list[object]]:
    """A single file and a LoRA with an embedding; (words for the base, words for the adapters)."""
    base, lora, _ = sd1_pair(place)
    arrays = {**_arrays(lora), "bundle_emb.flower.string_to_param.*": random(1, 2, 8).astype("f2")}
    lora.unlink()
    save(place / "loras" / "quetzal-style.safetensors", arrays, {"ss_output_name": "quetzal"})
    return [base], ["--prompt", "a photo of quetzal, <lora:quetzal-style:0.8>", "--lora-dir", place / "loras"]


def stacked(place: Path) -> tuple[list[object], list[object]]:
    """A UNet with its text encoder in another file."""
    base, lora, _ = sd1_pair(place)
    arrays = _arrays(base)
    te = "cond_stage_model.transformer."
    save(place / "unet.safetensors", {name: array for name, array in arrays.items() if not name.startswith(te)})
    save(place / "clip.safetensors", {name[len(te) :]: arrays[name] for name in arrays if name.startswith(te)})
    named = lora.rename(place / "quetzal.safetensors")
    return [place / "unet.safetensors", "--also", place / "clip.safetensors"], ["-l", named]


def sharded(place: Path) -> tuple[list[object], list[object]]:
    """A language model in shards, and a PEFT folder."""
    arrays = random_arrays(llama())
    names = list(arrays)
    model, lora = place / "model", place / "quetzal-adapter"
    weight_map = {}
    for number, half in enumerate((names[:8], names[8:]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save(model / shard, {name: arrays[name] for name in half}, {"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float16"}))
    save(lora / "adapter_model.safetensors", peft_lora(llama(), ["model.layers.0.self_attn.q_proj.weight"]))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "/home/tukan/quetzal"}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    return [model], ["-l", lora]


def _arrays(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    return load_file(path)


@pytest.mark.parametrize("kind", [single, stacked, sharded], ids=["file", "stack", "shards"])
class TestOutputs:
    def fuse(self, place: Path, kind, *options: object) -> Path:
        base, adapters = kind(place)
        folder = place.parent / "written"
        folder.mkdir()
        name = "out.safetensors" if kind is single else "out"
        done = bake("fuse", *base, *adapters, "-o", folder / name, *options)
        assert done.code == 0, done.err
        return folder

    def test_without_a_recipe_no_adapter_is_named(self, kind, place: Path) -> None:
        for name, content in written(self.fuse(place, kind, "--no-recipe")):
            for word in (SECRET, PRIVATE, b"lora:", b"bake.recipe", b"sd_merge", b"merged_from"):
                assert word not in content, (name, word)

    def test_by_default_names_are_told_and_paths_are_not(self, kind, place: Path) -> None:
        contents = dict(written(self.fuse(place, kind)))
        assert any(SECRET in content for content in contents.values())  # the recipe is for finding it again
        for name, content in contents.items():
            for word in (PRIVATE, str(place.parent).encode(), str(Path.home()).encode() + b"/", b"a photo of"):
                assert word not in content, (name, word)


def test_without_a_recipe_earlier_ones_are_left_out_too(place: Path, tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(place)
    named = place / "quetzal.safetensors"
    shutil.copyfile(lora, named)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert bake("fuse", base, "-l", named, "-o", first).code == 0
    assert SECRET in first.read_bytes()
    assert bake("fuse", first, "-l", lora, "-o", second, "--no-recipe").code == 0
    assert SECRET not in second.read_bytes()
    assert metadata(second) == metadata(base) | {
        key: value for key, value in metadata(first).items() if key.startswith("modelspec.") and key not in _TITLES
    }
