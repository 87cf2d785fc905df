"""What a selection means for a base: the ratio of every tensor."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from listed import checkpoint_of, shapes_of
from models import llama
from names import small

from bake.errors import UsageError
from bake.identify.checkpoint import identify_checkpoint
from bake.io.checkpoint import Checkpoint
from bake.keys.blocks import LISTS, SCHEMES
from bake.plan.ratios import Ratios
from bake.plan.selection import Gradient, Selection

UNET = "model.diffusion_model."
ATTENTION = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
RESNET = f"{UNET}input_blocks.4.0.in_layers.2.weight"
DOWN = f"{UNET}input_blocks.3.0.op.weight"
TIME, OUT = f"{UNET}time_embed.0.weight", f"{UNET}out.2.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
VAE = "first_stage_model.quant_conv.weight"
COUNTER = "cond_stage_model.transformer.text_model.embeddings.position_ids"
FLUX = {
    "img_in.weight": (8, 4),
    "vector_in.in_layer.weight": (8, 4),
    "final_layer.linear.weight": (4, 8),
    **{f"double_blocks.{number}.img_attn.norm.key_norm.scale": (8,) for number in range(19)},
    **{f"single_blocks.{number}.linear1.weight": (56, 8) for number in range(38)},
}


def base_of(family: str) -> Checkpoint:
    return checkpoint_of({"": {"llama": llama(5), "flux": FLUX}.get(family) or small(family)})


def ratios(selection: Selection, family: str = "sd1") -> Ratios:
    checkpoint = base_of(family)
    return Ratios(selection, identify_checkpoint(checkpoint), shapes_of(checkpoint), "style.safetensors")


def numbered(count: int) -> tuple[float, ...]:
    """A list whose values tell their places."""
    return tuple(float(place + 1) for place in range(count))


def test_one_number_is_for_everything() -> None:
    found = ratios(Selection(number=0.3))
    assert {found.ratio(name) for name in small("sd1")} == {0.3}


@pytest.mark.parametrize(("family", "length"), [(f, n) for f, lists in LISTS.items() for n in lists if n != 110])
def test_every_block_of_a_list_gets_its_value(family: str, length: int) -> None:
    found = ratios(Selection(values=numbered(length)), family)
    for place, block in enumerate(LISTS[family][length]):
        side = re.fullmatch(r"(IN|OUT|D|S)(\d\d)", block)
        if family == "flux":
            stack = {"D": "double_blocks", "S": "single_blocks"}.get(block[0], "")
            stack = {"IN": "img_in", "OUT": "final_layer"}.get(block, f"{stack}.{int(side[2])}" if side else "")
            about = [name for name in FLUX if stack and name.startswith(f"{stack}.")]
        else:
            inside = "middle_block." if side is None else f"{side[1].lower()}put_blocks.{int(side[2])}."
            inside = UNET + inside if block not in ("BASE", "VAE") else "conditioner." if "xl" in family else "cond_"
            inside = "first_stage_model." if block == "VAE" else inside
            about = [name for name in small(family) if name.startswith(inside)]
        assert {found.ratio(name) for name in about} <= {float(place + 1)}, block


@pytest.mark.parametrize(
    ("scheme", "time", "out", "down", "vae"),
    [
        # 17 values have none for IN00, IN03: 0, but 1 for kohya
        ("bake", 0.0, 17.0, 0.0, 0.0),
        ("supermerger", 0.0, 17.0, 0.0, 1.0),
        ("mecha", 1.0, 17.0, 0.0, 1.0),
        ("webui", 1.0, 1.0, 0.0, 0.0),
        ("kohya", 1.0, 1.0, 1.0, 0.0),
    ],
)
def test_what_a_short_list_cannot_name(scheme: str, time: float, out: float, down: float, vae: float) -> None:
    found = ratios(Selection(values=numbered(17), scheme=scheme))
    assert (found.ratio(TIME), found.ratio(OUT), found.ratio(DOWN), found.ratio(VAE)) == (time, out, down, vae)
    assert (found.ratio(TEXT), found.ratio(ATTENTION)) == (1.0, 4.0)


def test_a_number_beside_a_list_is_for_what_it_cannot_name() -> None:
    found = ratios(Selection(number=0.25, values=numbered(17)))
    assert (found.ratio(DOWN), found.ratio(VAE), found.ratio(TEXT)) == (0.25, 0.25, 1.0)
    found = ratios(Selection(number=0.25, values=numbered(25)))
    assert (found.ratio(TEXT), found.ratio(TIME), found.ratio(ATTENTION)) == (0.25, 1.0, 5.0)


def test_a_list_without_base_leaves_text_encoders_as_they_are() -> None:
    found = ratios(Selection(values=(0.0,) * 25))
    assert (found.ratio(TEXT), found.ratio(ATTENTION), found.ratio(VAE)) == (1, 0, 0)


def test_a_component_of_its_own_number_keeps_it_beside_a_list_that_cannot_name_it() -> None:
    found = ratios(Selection(values=numbered(17), components=(("vae", 0.5), ("te", 9.0), ("unet", 9.0))))
    assert (found.ratio(VAE), found.ratio(TEXT), found.ratio(ATTENTION), found.ratio(DOWN)) == (0.5, 1, 4, 0)


def test_the_extended_list_of_sdxl_reaches_single_transformer_blocks() -> None:
    found = ratios(Selection(values=numbered(110)), "sdxl")
    names = LISTS["sdxl"][110]
    assert found.ratio(ATTENTION) == names.index("IN410") + 1
    assert found.ratio(RESNET) == names.index("IN40") + 1
    assert found.ratio("conditioner.embedders.1.model.text_projection") == 2
    assert found.ratio(VAE) == 110


def test_26_values_on_sdxl_leave_out_what_it_has_not() -> None:
    """supermerger weighttoxl: [0:9] + [12:22] of the values behind BASE."""
    values = numbered(26)
    short = (values[0], *values[1:][0:9], *values[1:][12:22])
    long, converted = ratios(Selection(values=values), "sdxl"), ratios(Selection(values=short), "sdxl")
    assert all(long.ratio(name) == converted.ratio(name) for name in small("sdxl"))


def test_components_have_numbers_of_their_own() -> None:
    found = ratios(Selection(number=0.5, components=(("te1", 3.0), ("te", 2.0), ("vae", 0.0))), "sdxl")
    assert found.ratio("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight") == 3
    assert found.ratio("conditioner.embedders.1.model.text_projection") == 2
    assert (found.ratio(VAE), found.ratio(ATTENTION)) == (0, 0.5)


@pytest.mark.parametrize(
    ("rules", "attention", "resnet", "text"),
    [
        ("IN04:attn1:0.5", 0.5, 1, 1),
        ("IN04::0.5", 0.5, 0.5, 1),
        (":attn1:0.5", 0.5, 1, 1),
        ("::0.5", 0.5, 0.5, 0.5),
        ("IN03-IN05:attn1.to_q:0.5", 0.5, 1, 1),
        ("IN05-IN03:attn1_to_q:0.5", 0.5, 1, 1),
        ("IN01 IN04:attn1 in_layers:0.5", 0.5, 0.5, 1),
        ("NOT IN04::0.5", 1, 1, 0.5),
        ("NOT IN03-IN05 BASE::0.5", 1, 1, 1),
        ("IN04:NOT attn1:0.5", 1, 0.5, 1),
        ("NOT BASE:NOT attn1 proj:0.5", 1, 0.5, 1),
        ("IN04::0.5,IN04:attn:0.25", 0.25, 0.5, 1),  # later entries win
        ("IN04:attn:0.25\nIN04::0.5", 0.5, 0.5, 1),
        ("ATTNDEEPOFF", 1, 1, 1),  # from IN05 on
        ("ATTNDEEPOFF,IN04:attn:-2", -2, 1, 1),
        ("MID-BASE::0", 0, 0, 0),
    ],
)
def test_elemental_rules(rules: str, attention: float, resnet: float, text: float) -> None:
    found = ratios(Selection.parse(rules=rules))
    assert (found.ratio(ATTENTION), found.ratio(RESNET), found.ratio(TEXT)) == (attention, resnet, text)


@pytest.mark.parametrize(
    ("rules", "attention", "projection"),
    [("ATTNDEEPON", 1, 0.5), ("ATTNDEEPOFF", 0, 0.5), ("PROJDEEPOFF", 0.5, 0)],
)
def test_rules_of_web_uis_by_name(rules: str, attention: float, projection: float) -> None:
    found = ratios(dataclasses.replace(Selection.parse(rules=rules), number=0.5))
    deep = ATTENTION.replace("input_blocks.4.", "input_blocks.5.")
    block = "model.diffusion_model.input_blocks.5.1"
    assert deep.startswith(block)
    assert (found.ratio(deep), found.ratio(f"{block}.proj_in.weight")) == (attention, projection)
    assert (found.ratio(ATTENTION), found.ratio(RESNET)) == (0.5, 0.5)


def test_a_rule_for_a_block_is_for_what_is_counted_to_it() -> None:
    found = ratios(Selection.parse(rules="IN00::0.5"))
    assert found.ratio("model.diffusion_model.time_embed.0.weight") == 0.5
    assert found.ratio("model.diffusion_model.out.2.weight") == 1


def test_rules_mean_the_same_in_a_diffusers_unet() -> None:
    """Here time_emb_proj is emb_layers, which PROJDEEPOFF and its like do not mean; patterns may be either's."""
    leaves = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2")
    resnet = {f"down_blocks.1.resnets.0.{leaf}.weight": (4,) for leaf in leaves}
    names = {"conv_in.weight": (4, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (4,), **resnet}
    names["down_blocks.0.attentions.0.proj_in.weight"] = (4, 4, 1, 1)
    names["down_blocks.0.downsamplers.0.conv.weight"] = (4,)
    checkpoint = checkpoint_of({"unet/": names}, "diffusers")
    selection = Selection.parse(rules="IN03:in_layers:0.5,:proj:0", names="*.0.out_layers.3.weight=2,*.norm2.*=3")
    found = Ratios(selection, identify_checkpoint(checkpoint), shapes_of(checkpoint), "style.safetensors")
    assert [found.ratio(f"unet/{name}") for name in resnet] == [0.5, 0.5, 1, 3, 2]


def test_a_rule_replaces_the_value_of_a_list() -> None:
    found = ratios(Selection.parse("NONE", "IN04:attn:0.5,TIME::0.25"))
    assert (found.ratio(ATTENTION), found.ratio(RESNET), found.ratio(TIME)) == (0.5, 0, 0.25)


def test_name_patterns_come_last_and_fit_whole_names() -> None:
    found = ratios(Selection.parse(rules="IN04::0.5", names="*.attn1.to_[qk].weight=2,*cond_stage_model.*=3"))
    assert (found.ratio(ATTENTION), found.ratio(RESNET), found.ratio(TEXT)) == (2, 0.5, 3)
    with pytest.raises(UsageError, match="pattern 'attn1' is about"):
        ratios(Selection.parse(names="attn1=2"))


def test_a_gradient_goes_over_the_layers_as_mergekit_has_it() -> None:
    found = ratios(Selection(gradients=(Gradient((0.0, 1.0, 0.0)),)), "llama")
    layers = [found.ratio(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(5)]
    np.testing.assert_allclose(layers, [0, 0.5, 1, 0.5, 0])
    found = ratios(Selection.parse(gradient="0.25,1"), "llama")
    # mergekit plan_module: t is 0 for what is outside the layers, before and behind them
    assert found.ratio("model.embed_tokens.weight") == found.ratio("lm_head.weight") == 0.25


def test_the_first_gradient_whose_filter_fits_counts() -> None:
    found = ratios(Selection.parse(gradient="self_attn=0,1;mlp=1,0;*=0.5"), "llama")
    layer = "model.layers.1."
    names = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
    assert [found.ratio(layer + name) for name in names] == [0.25, 0.75, 0.5]


def test_a_gradient_over_a_unet_leaves_text_encoders_alone() -> None:
    found = ratios(Selection.parse(gradient="0,1"))
    assert (found.ratio(f"{UNET}output_blocks.11.0.in_layers.2.weight"), found.ratio(TEXT)) == (1, 1)
    assert found.ratio(f"{UNET}middle_block.0.in_layers.2.weight") == 0.5


@pytest.mark.parametrize(
    ("selection", "family", "says"),
    [
        (
            Selection.parse("1,2,3"),
            "sd1",
            r"style.safetensors: 3 block values; for Stable Diffusion 1 .* 17 \(BASE to OUT11\)",
        ),
        (Selection(values=numbered(20)), "sd1", "20 block values; .* 17 .* 25 .* 26"),
        (
            Selection.parse("MIDD"),
            "sdxl",
            r"17 block values \(MIDD\); for Stable Diffusion XL .* 12 \(BASE to OUT05\), .* 20 ",
        ),
        (Selection(values=numbered(12)), "sd2", "12 block values"),
        (Selection(values=numbered(26)), "llama", "Name its blocks in rules, such as 'IN-OUT:attn:0.5', or give"),
        (Selection.parse(rules="IN12::1"), "sd1", "no block 'IN12'; it has BASE, TIME, IN00"),
        (Selection.parse(rules="IN01-IN02-IN03::1"), "sd1", "no block, nor a range"),
        (Selection.parse(rules="IN04:nose:1"), "sd1", "rule 'IN04:nose:1' is about"),
        (Selection.parse(rules="L09::1"), "llama", "no block 'L09'; it has IN, L00, L01"),
        (Selection.parse(gradient="nose=1"), "llama", "gradient 'nose=1' is about"),
        (Selection.parse(gradient="1;mlp=0"), "llama", "gradient 'mlp=0' is about"),
        (Selection(components=(("nose", 1.0),)), "sd1", "nose= is no component of the base; it has unet, te1, vae"),
    ],
)
def test_what_the_base_has_no_place_for_is_a_usage_error(selection: Selection, family: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ratios(selection, family)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_tensor_has_a_ratio_under_every_scheme(scheme: str) -> None:
    for family in ("sd1", "sdxl"):
        found = ratios(Selection(values=numbered(26), scheme=scheme), family)
        assert all(0 <= found.ratio(name) <= 26 for name in small(family))
