"""The UNet's two layouts: one dictionary, both ways, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from names import read_list, small

from bake.keys import unet
from bake.keys.places import Place, split_parameter

PREFIX = "model.diffusion_model."
FAMILIES = ["sd1", "sd2", "sdxl", "sdxl-refiner"]
LISTS = {
    "sd1": ("sd15_original.json", "sd15_diffusers.json"),
    "sd2": ("sd21_original.json", "sd21_diffusers.json"),
    "sdxl": ("sdxl_base_original.json.gz", "sdxl_base_diffusers.json.gz"),
    "sdxl-refiner": ("sdxl_refiner_original.json", "sdxl_refiner_diffusers.json"),
}


def modules(shapes, prefix: str) -> set[str]:
    return {split_parameter(name.removeprefix(prefix))[0] for name in shapes if name.startswith(prefix)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_has_a_name_in_the_other_layout_and_comes_back(family: str) -> None:
    ldm = modules(small(family), PREFIX)
    there = unet.translate(ldm)
    assert set(there) == ldm
    assert len(set(there.values())) == len(ldm)
    back = unet.translate(there.values())
    assert all(back[other] == module for module, other in there.items())


@pytest.mark.parametrize(
    ("family", "ldm", "diffusers"),
    [
        ("sd1", "input_blocks.0.0", "conv_in"),
        ("sd1", "input_blocks.4.1.proj_out", "down_blocks.1.attentions.0.proj_out"),
        ("sd1", "input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("sd1", "output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("sd1", "output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("sd1", "input_blocks.4.0.skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("sdxl", "output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("sdxl", "label_emb.0.2", "add_embedding.linear_2"),
        ("sdxl", "middle_block.1.transformer_blocks.9.norm1", "mid_block.attentions.0.transformer_blocks.9.norm1"),
        ("sdxl", "middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
    ],
)
def test_known_pairs(family: str, ldm: str, diffusers: str) -> None:
    names = unet.translate(modules(small(family), PREFIX))
    assert names[ldm] == diffusers
    assert unet.translate(names.values())[diffusers] == ldm


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_layouts_of_published_checkpoints_are_each_others_translation(shared: Path, family: str) -> None:
    original, diffusers = (read_list(shared / "names" / name)[1] for name in LISTS[family])
    ldm, theirs = modules(original, PREFIX), modules(diffusers, "unet/")
    assert set(unet.translate(ldm).values()) == theirs
    assert set(unet.translate(theirs).values()) == ldm


def test_an_independent_key_map_of_sd1_says_the_same(shared: Path) -> None:
    pairs = json.loads((shared / "data" / "keys" / "sd1_ldm_to_diffusers.json").read_text())
    pairs = pairs.get("ldm_diffusers_keymap", pairs)
    names = unet.translate(modules(pairs, PREFIX))
    checked = 0
    for ours, theirs in pairs.items():
        if ours.startswith(PREFIX) and isinstance(theirs, str):
            module, _ = split_parameter(ours.removeprefix(PREFIX))
            assert names[module] == split_parameter(theirs.removeprefix("unet_"))[0]
            checked += 1
    assert checked > 600


def test_diffusers_own_models_have_these_names() -> None:
    diffusers = pytest.importorskip("diffusers", reason="the diffusers oracle is not installed")
    torch = pytest.importorskip("torch")
    sdxl = {
        **{"block_out_channels": (32, 64, 128), "layers_per_block": 2, "cross_attention_dim": 64},
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        **{"transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True},
        **{"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 64},
        "addition_time_embed_dim": 8,
    }
    for family, config in (("sd1", {"block_out_channels": (32, 64, 128, 128)}), ("sdxl", sdxl)):
        with torch.device("meta"):
            model = diffusers.UNet2DConditionModel(**config)
        theirs = {split_parameter(name)[0] for name in model.state_dict()}
        assert set(unet.translate(modules(small(family), PREFIX)).values()) == theirs


def test_a_pruned_model_with_fewer_blocks_follows_the_same_rules() -> None:
    """SSD-1B and its like: the blocks that are left are counted, not looked up by number."""
    shapes = small("sdxl")
    kept = {name for name in modules(shapes, PREFIX) if "transformer_blocks.5" not in name}
    names = unet.translate(kept)
    assert len(set(names.values())) == len(kept)


def test_aliases_of_attention_include_the_old_processor_names() -> None:
    own = {module: {"weight": (Place(module),)} for module in modules(small("sd1"), PREFIX)}
    found = unet.aliases(own, {})
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    target = own["input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"]
    for spelling in ("to_out.0", "to_out", "processor.to_out"):
        assert found[f"{attention}.{spelling}"] == target
    assert found[f"{attention}.processor.to_q"] == own["input_blocks.1.1.transformer_blocks.0.attn1.to_q"]
    assert not set(found) & set(own)
