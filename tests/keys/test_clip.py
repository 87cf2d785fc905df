"""Text encoders: OpenCLIP's fused projections under Hugging Face names."""

from __future__ import annotations

import pytest
from layouts import Clip, hf_clip, openclip

from bake.keys import clip
from bake.keys.places import Place, split_parameter

SMALL = Clip(width=6, layers=2, vocabulary=8, positions=4)


def own_modules(shapes):
    found = {}
    for name in shapes:
        module, parameter = split_parameter(name)
        found.setdefault(module, {})[parameter] = (Place(name),)
    return found


@pytest.fixture
def open_names():
    shapes = dict(openclip(SMALL))
    return clip.openclip_aliases(own_modules(shapes), shapes)


def test_every_hugging_face_module_has_a_place_in_openclip(open_names) -> None:
    for name in dict(hf_clip(SMALL)):
        module, parameter = split_parameter(name)
        if not module.endswith("position_ids"):
            assert parameter in open_names[module] or parameter == "weight"
            assert open_names["text_model." + module] == open_names[module]


@pytest.mark.parametrize(("projection", "rows"), [("q_proj", (0, 6)), ("k_proj", (6, 12)), ("v_proj", (12, 18))])
def test_q_k_and_v_are_thirds_of_the_fused_tensor(open_names, projection: str, rows: tuple[int, int]) -> None:
    found = open_names[f"text_model.encoder.layers.1.self_attn.{projection}"]
    assert found["weight"] == (Place("transformer.resblocks.1.attn.in_proj_weight", rows),)
    assert found["bias"] == (Place("transformer.resblocks.1.attn.in_proj_bias", rows),)


def test_the_text_projection_is_stored_transposed(open_names) -> None:
    assert open_names["text_projection"]["weight"] == (Place("text_projection", None, True),)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("encoder.layers.0.mlp.fc1", "transformer.resblocks.0.mlp.c_fc.weight"),
        ("encoder.layers.0.mlp.fc2", "transformer.resblocks.0.mlp.c_proj.weight"),
        ("encoder.layers.0.layer_norm2", "transformer.resblocks.0.ln_2.weight"),
        ("encoder.layers.0.self_attn.out_proj", "transformer.resblocks.0.attn.out_proj.weight"),
        ("embeddings.token_embedding", "token_embedding.weight"),
        ("embeddings.position_embedding", "positional_embedding"),
        ("final_layer_norm", "ln_final.weight"),
    ],
)
def test_the_other_modules_are_renamed(open_names, theirs: str, ours: str) -> None:
    assert open_names[theirs]["weight"][0].tensor == ours


@pytest.mark.parametrize("level", ["", "text_model."])
def test_names_with_and_without_the_level_of_older_transformers_are_one(level: str) -> None:
    shapes = {level + name: shape for name, shape in hf_clip(SMALL)}
    own = own_modules(shapes)
    names = own | clip.hf_aliases(own, shapes)
    with_level = names["text_model.encoder.layers.0.mlp.fc1"]
    assert with_level == names["encoder.layers.0.mlp.fc1"]
    assert with_level["weight"][0].tensor == f"{level}encoder.layers.0.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("old", "new"), [("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")]
)
def test_old_diffusers_names_of_the_projections(open_names, old: str, new: str) -> None:
    path = "text_model.encoder.layers.0.self_attn."
    assert open_names[path + old] == open_names[path + new]
