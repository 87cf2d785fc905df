"""The index of all spellings: every name once, nothing twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from names import read_list, small

from bake.identify.checkpoint import _components_of_file
from bake.keys.dialects import addresses, flatten
from bake.keys.modules import Component, ModuleIndex
from bake.keys.places import Place, split_parameter

FAMILIES = ["sd1", "sd2", "sdxl", "sdxl-refiner"]


def index_of(shapes) -> ModuleIndex:
    return ModuleIndex(tuple(_components_of_file("", shapes)), shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_flat_spellings_are_unambiguous(family: str) -> None:
    """`.` -> `_` loses information; no two modules of one component may meet there."""
    index = index_of(small(family))
    for name, spellings in index.spellings.items():
        targets: dict[str, set[str]] = {}
        for path, parameters in spellings.items():
            targets.setdefault(flatten(path), set()).add(str(sorted(parameters.items())))
        assert {flat for flat, places in targets.items() if len(places) > 1} == set(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_reached_by_its_flat_name(family: str) -> None:
    shapes = small(family)
    index = index_of(shapes)
    for component in index.components:
        prefix = {"unet": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_"}.get(component.name)
        for path, parameters in index.spellings[component.name].items():
            if prefix is not None:
                found = index.find(addresses(prefix + flatten(path))[0])
                assert found is not None
                assert found.parameters == parameters


@pytest.mark.parametrize(
    ("module", "place"),
    [
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            Place("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"),
        ),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            Place("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"),
        ),
        (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            Place("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"),
        ),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q",
            Place("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"),
        ),
        (
            "lora_te1_text_model_encoder_layers_3_self_attn_k_proj",
            Place("conditioner.embedders.0.transformer.text_model.encoder.layers.3.self_attn.k_proj.weight"),
        ),
        (
            "lora_te2_text_model_encoder_layers_3_self_attn_k_proj",
            Place("conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight", (8, 16)),
        ),
        (
            "text_encoder_2.encoder.layers.3.self_attn.k_proj",
            Place("conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight", (8, 16)),
        ),
        ("lora_te2_text_projection", Place("conditioner.embedders.1.model.text_projection", None, True)),
        (
            "model.diffusion_model.out.2",
            Place("model.diffusion_model.out.2.weight"),
        ),
    ],
)
def test_one_tensor_has_many_names(module: str, place: Place) -> None:
    index = index_of(small("sdxl"))
    found = next(filter(None, map(index.find, addresses(module))))
    assert found.parameters["weight"] == (place,)


def test_names_of_one_component_do_not_reach_another() -> None:
    index = index_of(small("sdxl"))
    assert index.find(addresses("lora_te1_input_blocks_0_0")[0]) is None
    assert index.find(addresses("unet.text_model.encoder.layers.0.mlp.fc1")[0]) is None


def test_a_name_nobody_has_is_not_found() -> None:
    index = index_of(small("sd1"))
    assert not any(map(index.find, addresses("lora_unet_no_such_module")))


def test_two_modules_that_flatten_alike_are_an_error_when_they_differ() -> None:
    shapes = {"a.b_c.weight": (1,), "a_b.c.weight": (1,)}
    index = ModuleIndex((Component("unet", "", "plain"),), shapes)
    with pytest.raises(AssertionError, match="means both"):
        index.find(addresses("lora_unet_a_b_c")[0])


def test_a_component_with_a_longer_prefix_keeps_its_names() -> None:
    shapes = {"a.weight": (1,), "sub.a.weight": (1,)}
    index = ModuleIndex((Component("whole", "", "plain"), Component("part", "sub.", "plain")), shapes)
    assert list(index.spellings["part"]) == ["a"]
    assert list(index.spellings["whole"]) == ["a"]
    assert index.spellings["part"]["a"]["weight"][0].tensor == "sub.a.weight"


@pytest.mark.parametrize(
    "name",
    ["sd15_original.json", "sd15_inpainting_original.json", "sd21_original.json", "sdxl_base_original.json.gz"],
)
def test_full_coverage_of_published_checkpoints_maps_once_and_completely(shared: Path, name: str) -> None:
    """Every 2-D and 4-D weight of UNet and text encoders, in kohya's names, lands on its own tensor rows."""
    _, shapes = read_list(shared / "names" / name)
    index = index_of(shapes)
    reached: Counter[tuple[str, tuple[int, int] | None]] = Counter()
    for component in index.components:
        prefix = {"unet": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_"}.get(component.name)
        if prefix is None:
            continue
        own = {
            split_parameter(tensor[len(component.prefix) :])[0]
            for tensor in shapes
            if tensor.startswith(component.prefix)
        }
        for path in own:
            found = index.find(addresses(prefix + flatten(path))[0])
            assert found is not None, path
            reached[found.parameters.get("weight", (Place(path),))[0].tensor, None] += 1
    assert set(reached.values()) == {1}
