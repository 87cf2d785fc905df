"""Adapters: files, trainers' folders, and the key that orders them by content."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import save

from bake.errors import InputError
from bake.io.adapter import content_key, open_adapter
from bake.io.tensorfile import open_tensors

ONE = {"x.lora_A.weight": np.ones((2, 3), np.float32), "x.lora_B.weight": np.ones((4, 2), np.float32)}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_trainers_folder_is_known_by_its_file(tmp_path: Path, name: str) -> None:
    save(tmp_path / "style" / name, ONE)
    adapter = open_adapter(tmp_path / "style")
    assert adapter.name == "style"
    assert adapter.config is None
    assert set(adapter.file.tensors) == set(ONE)


def test_the_configuration_beside_the_weights_is_read_whichever_is_named(tmp_path: Path) -> None:
    weights = save(tmp_path / "adapter_model.safetensors", ONE)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    assert open_adapter(tmp_path).config == open_adapter(weights).config == {"peft_type": "LORA", "r": 2}


def test_a_configuration_beside_an_unrelated_file_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert open_adapter(save(tmp_path / "style.safetensors", ONE)).config is None


def test_a_folder_without_an_adapter_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter here"):
        open_adapter(tmp_path)


def test_the_content_key_depends_on_content_alone(tmp_path: Path) -> None:
    one = content_key(open_tensors(save(tmp_path / "one.safetensors", ONE)))
    same = content_key(open_tensors(save(tmp_path / "folder" / "two.safetensors", ONE)))
    changed = dict(ONE, **{"x.lora_A.weight": np.full((2, 3), 2, np.float32)})
    other = content_key(open_tensors(save(tmp_path / "three.safetensors", changed)))
    assert one == same != other


def test_the_content_key_of_an_empty_file_exists(tmp_path: Path) -> None:
    assert content_key(open_tensors(save(tmp_path / "none.safetensors", {})))
