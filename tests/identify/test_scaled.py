"""Scaled fp8 layers are told by what lies beside their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scaled import SHAPES, plain_tensors, scaled_base
from support import bake, save_torch

from bake.errors import InputError
from bake.identify.scaled import quantised, scaled_layers
from bake.io.checkpoint import open_checkpoint
from bake.keys.scaled import NEW, OLD, is_marker

PREFIX = "model.diffusion_model."


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_layers_of_both_generations_are_found(tmp_path: Path, new: bool, by_row: bool) -> None:
    checkpoint = open_checkpoint(scaled_base(tmp_path / "base.safetensors", new, by_row=by_row, prefix=PREFIX))
    found = scaled_layers(checkpoint)
    assert found.layers.keys() == {PREFIX + name for name in SHAPES}
    for layer in found.layers.values():
        assert layer.generation is (NEW if new else OLD)
        assert (layer.dtype, layer.by_row) == ("F8_E4M3", by_row)
        assert len(layer.beside) == (3 if new else 2)
    assert found.markers == (frozenset() if new else {PREFIX + "scaled_fp8"})
    assert quantised(checkpoint, found) is None


def test_ordinary_and_plain_fp8_weights_have_no_scales(tmp_path: Path) -> None:
    tensors = plain_tensors()
    tensors["blocks.1.mlp.weight"] = tensors["blocks.1.mlp.weight"].to(torch.float8_e5m2)
    tensors["blocks.1.mlp.scale"] = torch.ones(())
    checkpoint = open_checkpoint(save_torch(tmp_path / "base.safetensors", tensors))
    found = scaled_layers(checkpoint)
    assert not found.layers
    assert not found.beside
    assert quantised(checkpoint, found) is None


def test_a_scale_without_a_weight_is_left_to_those_who_know_other_formats(tmp_path: Path) -> None:
    tensors = plain_tensors() | {"blocks.9.mlp.weight_scale": torch.ones(())}
    checkpoint = open_checkpoint(save_torch(tmp_path / "base.safetensors", tensors))
    found = quantised(checkpoint, scaled_layers(checkpoint))
    assert found is not None
    assert found.kind == "scaled fp8"


@pytest.mark.parametrize("text", ["[]", "{", '{"layers": []}', "{}"])
def test_metadata_that_lists_no_layers_is_malformed(tmp_path: Path, text: str) -> None:
    base = save_torch(tmp_path / "base.safetensors", plain_tensors(), {"_quantization_metadata": text})
    with pytest.raises(InputError, match="_quantization_metadata"):
        scaled_layers(open_checkpoint(base))


@pytest.mark.parametrize(
    ("name", "expected"), [("scaled_fp8", True), ("a.scaled_fp8", True), ("a.unscaled_fp8", False)]
)
def test_markers(name: str, expected: bool) -> None:
    assert is_marker(name) == expected


def test_inspect_says_how_many_layers_are_scaled(tmp_path: Path) -> None:
    base = scaled_base(tmp_path / "base.safetensors", True)
    assert "scaled fp8: 3 layers" in bake("inspect", base).out
    found = bake("inspect", base, "--json").json
    assert (found["scaled_layers"], found["quantised"]) == (3, None)
