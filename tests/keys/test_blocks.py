"""Every tensor of real checkpoints in its block, by tables written down apart from the code."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from listed import checkpoint_of, checkpoint_of_list, shapes_of
from listed_models import MODELS, list_path
from models import llama
from names import small

from bake.identify.checkpoint import identify_checkpoint
from bake.io.checkpoint import Checkpoint
from bake.keys.blocks import LISTS, SCHEMES, Block, blocks_of, depths, order_of, scheme_for
from bake.keys.modules import TABLES, Component, ModuleIndex
from bake.keys.places import split_parameter


def blocks_in(checkpoint: Checkpoint) -> dict[str, Block]:
    return blocks_of(identify_checkpoint(checkpoint).components, shapes_of(checkpoint))


def names_in(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: block.name for name, block in blocks_in(checkpoint).items()}


def expected_of_unet(name: str) -> str:
    """The table of docs/blocks.md for the original layout of Stable Diffusion."""
    if name.startswith(("cond_stage_model.", "conditioner.")):
        return "BASE"
    if name.startswith("first_stage_model."):
        return "VAE"
    if not name.startswith("model.diffusion_model."):
        return "OTHER"
    side, number, *_ = name.removeprefix("model.diffusion_model.").split(".")
    known = {"middle_block": "M00", "time_embed": "TIME", "label_emb": "LABEL", "out": "OUT"}
    return known.get(side) or ("IN" if side == "input_blocks" else "OUT") + number.zfill(2)


def expected_of_flux(name: str) -> str:
    first, number, *_ = name.split(".")
    if first in ("double_blocks", "single_blocks"):
        return first[0].upper() + number.zfill(2)
    return "OUT" if first == "final_layer" else "IN"


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_tensors_of_a_unet_are_in_the_block_their_name_says(family: str) -> None:
    found = names_in(checkpoint_of({"": small(family)}))
    assert found == {name: expected_of_unet(name) for name in found}


@pytest.mark.parametrize(
    "name",
    [
        *("sd15_original", "sd15_inpainting_original", "sd21_original", "sdxl_base_original", "sdxl_refiner_original"),
        "flux1_dev_original",
    ],
)
def test_every_tensor_of_a_published_checkpoint(shared: Path, name: str) -> None:
    found = names_in(checkpoint_of_list(list_path(shared, name)))
    expected = expected_of_flux if name.startswith("flux") else expected_of_unet
    assert found == {tensor: expected(tensor) for tensor in found}


PAIRED = [name for name, model in MODELS.items() if model.original and model.diffusers]


@pytest.mark.parametrize("name", PAIRED)
def test_both_layouts_have_every_row_in_the_same_block(shared: Path, name: str) -> None:
    model = MODELS[name]
    one, two = (checkpoint_of_list(list_path(shared, each)) for each in (model.original, model.diffusers))
    here, there = names_in(one), names_in(two)
    index = ModuleIndex(identify_checkpoint(one).components, shapes_of(one))
    compared = 0
    for component in identify_checkpoint(two).components:
        # stage B of Stable Cascade is the "decoder" of a folder; alone in a file it is the only model there is
        spellings = index.spellings.get(component.name) or index.spellings["unet"]
        for tensor in (tensor for tensor in there if tensor.startswith(component.prefix)):
            module, parameter = split_parameter(tensor[len(component.prefix) :])
            for place in spellings.get(module, {}).get(parameter, ()):
                assert here[place.tensor] == there[tensor], (place.tensor, tensor)
                compared += 1
    assert compared > 0.8 * len([block for block in there.values() if block not in ("VAE", "OTHER")])


@pytest.mark.parametrize("naming", TABLES)
def test_all_spellings_of_a_row_are_in_one_block(naming: str) -> None:
    component = Component("transformer", "", naming)
    for spellings in TABLES[naming].rows:
        paths = [f"{pattern.replace('#', '7')}.weight" for pattern, _ in spellings]
        found = {block.name for block in blocks_of([component], paths).values()}
        assert len(found) == 1, paths
        stack = re.match(r"(?:vace_|double_|single_|joint_)?(?:blocks|layers)\.#", spellings[0].pattern)
        assert stack is None or found.pop().endswith("07"), paths


def kohya_block(module: str) -> str:
    """kohya networks/svd_merge_lora.py get_lbw_block_index for SD1, as the index's name."""
    found = re.search(r"(up|down)_blocks_(\d+)_(resnets|upsamplers|downsamplers|attentions)_(\d+)_", module)
    if found is None:
        return "M00" if "mid_block_" in module else "none"
    level, place = int(found[2]), int(found[4])
    if found[1] == "down":
        return f"IN{3 * (level + 1) if found[3] == 'downsamplers' else 3 * level + place + 1:02d}"
    return f"OUT{3 * level + 2 if found[3] == 'upsamplers' else 3 * level + place:02d}"


def test_blocks_of_sd1_are_those_of_kohyas_rule() -> None:
    checkpoint = checkpoint_of({"": small("sd1")})
    found = names_in(checkpoint)
    spellings = ModuleIndex(identify_checkpoint(checkpoint).components, shapes_of(checkpoint)).spellings["unet"]
    seen = Counter()
    for module, parameters in spellings.items():
        if module.startswith(("down_blocks", "up_blocks", "mid_block")):
            flat = f"lora_unet_{module.replace('.', '_')}_"
            assert {found[place.tensor] for places in parameters.values() for place in places} == {kohya_block(flat)}
            seen[kohya_block(flat)] += 1
    assert set(seen) == set(LISTS["sd1"][26]) - {"BASE", "IN00"}


def test_the_extended_list_of_sdxl_names_every_tensor(shared: Path) -> None:
    for name in ("sdxl_base_original", "sdxl_base_diffusers"):
        fine = {block.fine for block in blocks_in(checkpoint_of_list(list_path(shared, name))).values()}
        assert fine == set(LISTS["sdxl"][110]) - {"IN0"}  # which no tensor has


# One tensor of the original SDXL for each form of the extended names: what supermerger's rule makes of it.
@pytest.mark.parametrize(
    ("tensor", "fine"),
    [
        ("input_blocks.0.0.weight", "IN00"),
        ("input_blocks.3.0.op.weight", "IN30"),
        ("input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", "IN410"),
        ("input_blocks.4.1.proj_in.weight", "IN41"),
        ("middle_block.0.in_layers.0.weight", "MID00"),
        ("middle_block.1.transformer_blocks.9.norm1.weight", "MID109"),
        ("output_blocks.2.2.conv.weight", "OUT22"),
        ("output_blocks.0.1.transformer_blocks.3.attn2.to_k.weight", "OUT013"),
        ("out.2.weight", "OUT9"),
        ("label_emb.0.0.weight", "LABEL"),
    ],
)
def test_an_extended_name(tensor: str, fine: str) -> None:
    assert blocks_in(checkpoint_of({"": small("sdxl")}))[f"model.diffusion_model.{tensor}"].fine == fine


@pytest.mark.parametrize(
    ("family", "length", "first", "last"),
    [
        *(("sd1", 17, "BASE", "OUT11"), ("sd1", 25, "IN00", "OUT11"), ("sd1", 26, "BASE", "OUT11")),
        *(("sdxl", 12, "BASE", "OUT05"), ("sdxl", 20, "BASE", "OUT08"), ("sdxl", 21, "BASE", "VAE")),
        *(("sdxl", 26, "BASE", "OUT11"), ("sdxl", 110, "CLIPL", "VAE"), ("flux", 61, "CLIP", "OUT")),
    ],
)
def test_a_list_has_as_many_names_as_values(family: str, length: int, first: str, last: str) -> None:
    names = LISTS[family][length]
    assert (len(names), len(set(names)), names[0], names[-1]) == (length, length, first, last)


def test_short_lists_name_the_blocks_with_attention() -> None:
    for family, length in (("sd1", 17), ("sdxl", 12)):
        found = names_in(checkpoint_of({"": small(family)}))
        attention = {found[name] for name in found if ".attn1." in name and name.startswith("model.diffusion_model.")}
        assert set(LISTS[family][length]) == attention | {"BASE"}


@pytest.mark.parametrize(
    ("scheme", "family", "homes"),
    [
        ("bake", "sd1", {"TIME": "IN00", "LABEL": "IN00", "OUT": "OUT11"}),
        ("bake", "sdxl", {"TIME": "IN00", "LABEL": "IN00", "OUT": "OUT08"}),
        (
            "supermerger",
            "sdxl",
            {"TIME": "IN00", "LABEL": "IN00", "OUT": "OUT08", "VAE": "BASE", "OTHER": "BASE"},
        ),
        ("mecha", "sd1", {"TIME": "BASE", "LABEL": "BASE", "OUT": "OUT11", "VAE": "BASE", "OTHER": "BASE"}),
        ("mecha", "sdxl", {"TIME": "BASE", "LABEL": "BASE", "OUT": "OUT08", "OTHER": "BASE"}),
        ("webui", "sd2", {"TIME": "full", "LABEL": "full", "OUT": "full"}),
        ("kohya", "sd1", {"TIME": "full", "LABEL": "full", "OUT": "full", "IN00": "full"}),
        ("kohya", "sdxl", {"TIME": "IN00", "LABEL": "IN00", "OUT": "full"}),
        ("mecha", "flux", {}),
    ],
)
def test_what_is_outside_the_blocks_counts_as_its_tool_has_it(scheme: str, family: str, homes: dict[str, str]) -> None:
    found = scheme_for(scheme, family)
    assert found.homes == homes
    assert found.unnamed == (1.0 if scheme == "kohya" else 0.0)
    assert scheme in SCHEMES


def test_layers_of_a_language_model() -> None:
    found = names_in(checkpoint_of({"": llama()}))
    assert found["model.embed_tokens.weight"] == "IN"
    assert found["model.layers.1.mlp.up_proj.weight"] == "L01"
    assert found["model.norm.weight"] == found["lm_head.weight"] == "OUT"


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("qwen25_vl_3b_new", {"IN": 1 + 1 + 5, "V": 32 * 12, "L": 36 * 12, "OUT": 1}),
        ("whisper_small", {"E": 12 * 15, "D": 12 * 24}),
        ("t5_large", {"IN": 1, "OUT": 2}),
        ("minilm_l6", {"L": 96, "OUT": 2}),
        ("gpt2_small", {"IN": 2, "L": 156, "OUT": 2}),
        ("mixtral_8x7b", {"IN": 1, "L": 992, "OUT": 2}),
    ],
)
def test_stacks_of_published_language_models(shared: Path, name: str, stacks: dict[str, int]) -> None:
    found = Counter(
        re.sub(r"\d\d$", "", block) for block in names_in(checkpoint_of_list(list_path(shared, name))).values()
    )
    assert {stack: found[stack] for stack in stacks} == stacks


def test_blocks_are_in_the_order_of_the_data() -> None:
    assert order_of(["OUT", "OUT01", "M00", "IN10", "IN02", "VAE", "TIME", "BASE", "OUT10"]) == [
        *("BASE", "TIME", "IN02", "IN10", "M00", "OUT01", "OUT10", "OUT", "VAE")
    ]
    assert order_of(LISTS["flux"][61]) == list(LISTS["flux"][61])
    assert order_of(["OUT", "IN00", "OUT00", "IN"]) == ["IN", "IN00", "OUT00", "OUT"]


def test_depth_goes_from_the_first_block_to_the_last() -> None:
    assert depths(["L00", "L01", "L02", "IN", "OUT"]) == {"L00": 0.0, "L01": 0.5, "L02": 1.0}
    assert depths(["D00", "D01", "S00", "S01", "S02"])["S00"] == 0.5
    assert depths(["V00", "V01", "L00", "L01"]) == {"V00": 0.0, "V01": 1.0, "L00": 0.0, "L01": 1.0}
    assert depths(["L00"]) == {"L00": 1.0}
