"""Components and blocks, by names alone."""

from __future__ import annotations

import pytest

from bake.identify.adapter import Module
from bake.identify.parts import block_of, in_order
from bake.keys.dialects import addresses


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "down_blocks_1"),
        ("lora_unet_mid_block_attentions_0_proj_in", "mid_block"),
        ("unet.mid_block.attentions.0.proj_in", "mid_block"),
        ("lora_unet_middle_block_1_proj_in", "middle_block_1"),
        ("lora_unet_input_blocks_4_1_proj_in", "input_blocks_4"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "text_model_encoder_layers_11"),
        ("base_model.model.model.layers.31.mlp.up_proj", "model.layers.31"),
        ("transformer.single_transformer_blocks.7.attn.to_q", "single_transformer_blocks.7"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "double_blocks_0"),
        ("lora_unet_conv_in", "conv_in"),
        ("base_model.model.lm_head", "lm_head"),
    ],
)
def test_a_block_is_everything_up_to_its_number(name: str, block: str) -> None:
    assert block_of(Module(name, addresses(name), ())) == block


def test_blocks_are_in_the_order_of_their_numbers_and_text_encoders_last() -> None:
    names = ["te1", "double_blocks_10", "single_blocks_1", "unet", "double_blocks_2", "te2"]
    ordered = ["double_blocks_2", "double_blocks_10", "single_blocks_1", "unet", "te1", "te2"]
    assert sorted(names, key=in_order) == ordered
