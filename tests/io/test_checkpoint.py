"""Bases: one file, a stack, shards, a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import save

from bake.errors import FolderError, InputError, Unsupported, UsageError
from bake.io.checkpoint import open_checkpoint

ONE = np.ones((2, 2), np.float16)


def names(checkpoint) -> list[str]:
    return [name for name, _, _ in checkpoint.tensors()]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save(folder / "model-00001-of-00002.safetensors", {"a": ONE, "b": ONE})
    save(folder / "model-00002-of-00002.safetensors", {"c": ONE})
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    index = {"metadata": {"total_size": 24}, "weight_map": {**shards, "c": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    (folder / "optimizer.pt").write_bytes(b"training state")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "download.lock").touch()
    return folder


@pytest.fixture
def diffusers(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    save(folder / "unet" / "diffusion_pytorch_model.safetensors", {"conv_in.weight": ONE})
    save(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", {"conv_in.weight": ONE})
    save(folder / "text_encoder" / "model.fp16.safetensors", {"embeddings.weight": ONE})
    for relative in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        (folder / relative).parent.mkdir(exist_ok=True)
        (folder / relative).write_text("{}")
    return folder


def test_one_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "a.safetensors", {"x": ONE}))
    assert checkpoint.packaging == "file"
    assert names(checkpoint) == ["x"]


def test_a_stack_keeps_its_files_apart(tmp_path: Path) -> None:
    base, other = save(tmp_path / "a.safetensors", {"x": ONE}), save(tmp_path / "b.safetensors", {"x": ONE})
    checkpoint = open_checkpoint(base, [other])
    assert checkpoint.packaging == "stack"
    assert names(checkpoint) == ["a.safetensors/x", "b.safetensors/x"]


def test_a_stack_of_two_files_of_one_name_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "a.safetensors", {"x": ONE})
    with pytest.raises(UsageError, match=r"two files of the stack are called a.safetensors"):
        open_checkpoint(base, [save(tmp_path / "other" / "a.safetensors", {"y": ONE})])


def test_shards_are_one_model_and_side_files_travel(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.packaging == "sharded"
    assert names(checkpoint) == ["a", "b", "c"]
    assert [index.relative for index in checkpoint.indexes] == ["model.safetensors.index.json"]
    assert checkpoint.configs[""]["model_type"] == "llama"
    assert checkpoint.side_files == ("config.json", "tokenizer.json")
    assert checkpoint.left_out == ("optimizer.pt", "pytorch_model.bin")


def test_components_of_a_pipeline_are_grouped_by_folder_and_one_variant_is_taken(diffusers: Path) -> None:
    checkpoint = open_checkpoint(diffusers)
    assert checkpoint.packaging == "diffusers"
    assert names(checkpoint) == ["text_encoder/embeddings.weight", "unet/conv_in.weight"]
    assert [part.relative for part in checkpoint.files] == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert checkpoint.left_out[0] == "unet/diffusion_pytorch_model.fp16.safetensors"
    assert "scheduler/scheduler_config.json" in checkpoint.side_files


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda f, i: (f / "model-00002-of-00002.safetensors").unlink(), "00002-of-00002.safetensors is missing"),
        (lambda f, i: i["weight_map"].pop("b"), "'b' is in the file but not listed"),
        (lambda f, i: i["weight_map"].update(d="model-00002-of-00002.safetensors"), "'d' is not in"),
        (lambda f, i: i["weight_map"].update(c="../model.safetensors"), "not the name of a shard"),
        (lambda f, i: i["weight_map"].update(c="/etc/passwd"), "not the name of a shard"),
        (lambda f, i: i["weight_map"].update(c="sub\\x.safetensors"), "not the name of a shard"),
        (lambda f, i: i["weight_map"].update(c="x.bin"), "not the name of a shard"),
        (lambda f, i: i["weight_map"].update(c=3), "weight_map"),
        (lambda f, i: i.pop("weight_map"), "weight_map"),
    ],
)
def test_an_index_that_does_not_agree_with_its_shards_is_refused(sharded: Path, change, complaint: str) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(sharded, index)
    path.write_text(json.dumps(index))
    with pytest.raises(FolderError, match=complaint):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' + "[" * 100_000])
def test_an_index_that_is_no_json_object_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError):
        open_checkpoint(sharded)


def test_shards_without_their_index_are_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(FolderError, match="no index"):
        open_checkpoint(sharded)


def test_several_files_without_an_index_are_not_guessed_between(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", {"x": ONE})
    save(tmp_path / "b.safetensors", {"x": ONE})
    with pytest.raises(FolderError, match="name the one you mean"):
        open_checkpoint(tmp_path)


def test_a_folder_with_pickled_weights_only_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FolderError, match="saved as safetensors first"):
        open_checkpoint(tmp_path)


def test_a_pipeline_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FolderError, match="no component folder"):
        open_checkpoint(tmp_path)


def test_files_cannot_be_added_to_a_folder(diffusers: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="single-file base"):
        open_checkpoint(diffusers, [tmp_path / "x.safetensors"])


def test_shards_may_be_links_as_in_the_hub_cache(sharded: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.rename(blob)
    shard.symlink_to(blob)
    assert names(open_checkpoint(sharded)) == ["a", "b", "c"]


def test_a_missing_base_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nothing.safetensors")


def test_a_folder_of_gguf_files_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(Unsupported, match="GGUF"):
        open_checkpoint(tmp_path)
