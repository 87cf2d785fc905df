"""The numbering of cloneofsimo's files."""

from __future__ import annotations

import pytest
from names import small

from bake.keys import unet
from bake.keys.numbered import text_encoder_order, unet_order
from bake.keys.places import split_parameter

PREFIX = "model.diffusion_model."
PATHS = list(
    unet.translate({split_parameter(n.removeprefix(PREFIX))[0] for n in small("sd1") if n.startswith(PREFIX)}).values()
)
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0."


def test_the_files_of_that_time_put_the_gate_between_the_attentions() -> None:
    order = unet_order(PATHS, 144, gate_is_fifth=True)
    assert order[:6] == [
        FIRST + leaf
        for leaf in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "attn2.to_q")
    ]
    assert len(set(order)) == 144


def test_up_blocks_come_before_the_middle() -> None:
    order = unet_order(PATHS, 144, gate_is_fifth=True)
    blocks = list(dict.fromkeys(path.split(".attentions")[0] for path in order))
    assert blocks == [
        *("down_blocks.0", "down_blocks.1", "down_blocks.2"),
        *("up_blocks.1", "up_blocks.2", "up_blocks.3", "mid_block"),
    ]


def test_files_without_the_gate_are_told_by_their_count() -> None:
    order = unet_order(PATHS, 128, gate_is_fifth=False)
    assert order[:5] == [
        FIRST + leaf for leaf in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q")
    ]


def test_the_extended_mode_adds_resnets_after_the_attentions_of_each_block() -> None:
    order = unet_order(PATHS, 224, gate_is_fifth=True)
    assert order[18:22] == [
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.resnets.0.time_emb_proj",
        "down_blocks.0.resnets.0.conv2",
        "down_blocks.0.resnets.1.conv1",
    ]


@pytest.mark.parametrize("count", [0, 1, 143, 145, 225])
def test_another_count_has_no_order(count: int) -> None:
    assert unet_order(PATHS, count, gate_is_fifth=True) == []


def test_a_text_encoder_is_numbered_k_v_q_out() -> None:
    paths = [
        f"text_model.encoder.layers.{n}.self_attn.{p}"
        for n in range(12)
        for p in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    order = text_encoder_order(paths, 48)
    assert [path.split(".")[-1] for path in order[:4]] == ["k_proj", "v_proj", "q_proj", "out_proj"]
    assert order[40].startswith("text_model.encoder.layers.10.")
    assert text_encoder_order(paths, 47) == []


def test_walking_a_diffusers_unet_gives_the_same_order() -> None:
    diffusers = pytest.importorskip("diffusers", reason="the diffusers oracle is not installed")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(block_out_channels=(32, 64, 128, 128))
    names = {id(module): name for name, module in model.named_modules()}
    for extended, count in ((False, 144), (True, 224)):
        parents = {"Attention", "GEGLU"} | ({"ResnetBlock2D"} if extended else set())
        kinds = (torch.nn.Linear, torch.nn.Conv2d) if extended else (torch.nn.Linear,)
        walked = [
            names[id(child)]
            for module in model.modules()
            if type(module).__name__ in parents
            for child in module.modules()
            if isinstance(child, kinds)
        ]
        assert unet_order(names.values(), count, gate_is_fifth=False) == walked
