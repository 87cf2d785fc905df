"""Every dialect: from a tensor's name in the file to the component and the path that are looked up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bake.keys.dialects import PREFIXES, UNET_LIKE, Address, addresses, flatten, part_addresses
from bake.keys.factors import split_key

MODEL, TE1, TE2, TE3, ANY = UNET_LIKE, ("te1",), ("te2",), ("te3",), ()
LANGUAGE = ("te1", "te3", "te2", "te4")

# key, (module, factor), (components, path, dialect)
SPOKEN = [
    # kohya and what follows it
    (
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "up"),
        (MODEL, "down_blocks_0_attentions_0_proj_in", "kohya"),
    ),
    (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha",
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "alpha"),
        (MODEL, "input_blocks_4_1_transformer_blocks_0_attn1_to_q", "kohya"),
    ),
    (
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "down"),
        (TE1, "text_model_encoder_layers_0_mlp_fc1", "kohya"),
    ),
    (
        "lora_te1_encoder_layers_0_mlp_fc1.lora_down.weight",
        ("lora_te1_encoder_layers_0_mlp_fc1", "down"),
        (TE1, "encoder_layers_0_mlp_fc1", "kohya"),
    ),
    (
        "lora_te2_text_model_encoder_layers_31_mlp_fc1.hada_w1_a",
        ("lora_te2_text_model_encoder_layers_31_mlp_fc1", "w1_a"),
        (TE2, "text_model_encoder_layers_31_mlp_fc1", "kohya"),
    ),
    (
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight",
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "up"),
        (("te3", "te2", "te1", "te4"), "encoder_block_0_layer_0_SelfAttention_q", "kohya"),
    ),
    (
        "lora_te2_encoder_block_0_layer_1_DenseReluDense_wi_0.dora_scale",
        ("lora_te2_encoder_block_0_layer_1_DenseReluDense_wi_0", "magnitude"),
        (("te2", "te3", "te1", "te4"), "encoder_block_0_layer_1_DenseReluDense_wi_0", "kohya"),
    ),
    (
        "lora_te_layers_0_self_attn_q_proj.lora_up.weight",
        ("lora_te_layers_0_self_attn_q_proj", "up"),
        (LANGUAGE, "layers_0_self_attn_q_proj", "kohya"),
    ),
    (
        "oft_unet_down_blocks_0_attentions_0_proj_in.oft_blocks",
        ("oft_unet_down_blocks_0_attentions_0_proj_in", "oft_blocks"),
        (MODEL, "down_blocks_0_attentions_0_proj_in", "kohya"),
    ),
    (
        "lora_unet__blocks_0_cross_attn_k.lora_down.weight",
        ("lora_unet__blocks_0_cross_attn_k", "down"),
        (MODEL, "blocks_0_cross_attn_k", "kohya"),
    ),
    (
        "lora_unet_unet_mid_block_attentions_0_proj_in_lora_down.weight",
        ("lora_unet_unet_mid_block_attentions_0_proj_in", "down"),
        (MODEL, "mid_block_attentions_0_proj_in", "kohya"),
    ),
    (
        "lora_unet_lora_unet_conv_in.lora_up.weight",
        ("lora_unet_lora_unet_conv_in", "up"),
        (MODEL, "conv_in", "kohya"),
    ),
    (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k_lora.down.weight",
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k", "down"),
        (MODEL, "mid_block_attentions_0_transformer_blocks_0_attn1_to_k", "kohya"),
    ),
    (
        "lora_unet_blocks_0_self_attn_q.lora_up.weight",
        ("lora_unet_blocks_0_self_attn_q", "up"),
        (MODEL, "blocks_0_self_attn_q", "kohya"),
    ),
    (
        "lycoris_single_transformer_blocks_0_attn_to_k.lokr_w1",
        ("lycoris_single_transformer_blocks_0_attn_to_k", "kron_w1"),
        (MODEL, "single_transformer_blocks_0_attn_to_k", "lycoris"),
    ),
    # OneTrainer
    (
        "lora_transformer_transformer_blocks_0_attn_to_k.dora_scale",
        ("lora_transformer_transformer_blocks_0_attn_to_k", "magnitude"),
        (MODEL, "transformer_blocks_0_attn_to_k", "onetrainer"),
    ),
    (
        "lora_transformer_2_blocks_0_attn1_to_q.alpha",
        ("lora_transformer_2_blocks_0_attn1_to_q", "alpha"),
        (("transformer_2",), "blocks_0_attn1_to_q", "onetrainer"),
    ),
    (
        "lora_prior_unet_down_blocks_0_2_attention_to_q.lora_up.weight",
        ("lora_prior_unet_down_blocks_0_2_attention_to_q", "up"),
        (MODEL, "down_blocks_0_2_attention_to_q", "onetrainer"),
    ),
    (
        "lora_prior_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        ("lora_prior_te_text_model_encoder_layers_0_mlp_fc1", "up"),
        (("te1", "te2"), "text_model_encoder_layers_0_mlp_fc1", "onetrainer"),
    ),
    (
        "transformer.double_blocks.3.txt_attn.qkv.1.lora_down.weight",
        ("transformer.double_blocks.3.txt_attn.qkv.1", "down"),
        (MODEL, "transformer_blocks.3.attn.add_k_proj", "diffusers"),
    ),
    (
        "transformer.single_blocks.3.linear1.3.lora_up.weight",
        ("transformer.single_blocks.3.linear1.3", "up"),
        (MODEL, "single_transformer_blocks.3.proj_mlp", "diffusers"),
    ),
    (
        "transformer.double_blocks.3.img_mlp.0.lora_up.weight",
        ("transformer.double_blocks.3.img_mlp.0", "up"),
        (MODEL, "double_blocks.3.img_mlp.0", "diffusers"),
    ),
    (
        "transformer.double_blocks.3.img_mlp.fc0.lora_up.weight",
        ("transformer.double_blocks.3.img_mlp.fc0", "up"),
        (MODEL, "double_blocks.3.img_mlp.fc1", "diffusers"),
    ),
    (
        "unet.down_blocks.0.3.attention.attn.in_proj.2.lora_up.weight",
        ("unet.down_blocks.0.3.attention.attn.in_proj.2", "up"),
        (MODEL, "down_blocks.0.3.attention.attn.to_v", "diffusers"),
    ),
    (
        "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
        ("clip_l.text_model.encoder.layers.0.mlp.fc1", "up"),
        (TE1, "text_model.encoder.layers.0.mlp.fc1", "omi"),
    ),
    (
        "clip_g.text_model.encoder.layers.0.mlp.fc1.oft_R.weight",
        ("clip_g.text_model.encoder.layers.0.mlp.fc1", "oft_r"),
        (TE2, "text_model.encoder.layers.0.mlp.fc1", "omi"),
    ),
    (
        "t5.encoder.block.0.layer.0.SelfAttention.q.alpha",
        ("t5.encoder.block.0.layer.0.SelfAttention.q", "alpha"),
        (("te3", "te2", "te1", "te4"), "encoder.block.0.layer.0.SelfAttention.q", "omi"),
    ),
    # ComfyUI, ai-toolkit, diffusion-pipe, DiffSynth
    (
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        ("diffusion_model.double_blocks.0.img_attn.qkv", "down"),
        (MODEL, "double_blocks.0.img_attn.qkv", "comfy"),
    ),
    (
        "diffusion_model.blocks.0.norm3.diff_b",
        ("diffusion_model.blocks.0.norm3", "diff"),
        (MODEL, "blocks.0.norm3", "comfy"),
    ),
    (
        "diffusion_model.blocks.0.diff_m",
        ("diffusion_model.blocks.0.modulation", "diff"),
        (MODEL, "blocks.0.modulation", "comfy"),
    ),
    (
        "transformer.diffusion_model.layers.0.attention.qkv.lora_A.weight",
        ("transformer.diffusion_model.layers.0.attention.qkv", "down"),
        (MODEL, "diffusion_model.layers.0.attention.qkv", "diffusers"),
    ),
    (
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", "up"),
        (TE1, "text_model.encoder.layers.0.mlp.fc1", "comfy"),
    ),
    (
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", "up"),
        (TE2, "text_model.encoder.layers.0.mlp.fc1", "comfy"),
    ),
    (
        "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.lora_up.weight",
        ("text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj", "up"),
        (LANGUAGE, "model.layers.0.mlp.up_proj", "comfy"),
    ),
    (
        "text_encoders.clip_g.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
        ("text_encoders.clip_g.text_model.encoder.layers.0.mlp.fc1", "up"),
        (TE2, "text_model.encoder.layers.0.mlp.fc1", "comfy"),
    ),
    (
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_up.weight",
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", "up"),
        (("te3", "te2", "te1", "te4"), "encoder.block.0.layer.0.SelfAttention.q", "comfy"),
    ),
    (
        "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.lora_A.weight",
        ("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1", "down"),
        (MODEL, "joint_blocks.0.x_block.mlp.fc1", "comfy"),
    ),
    (
        "pipe.dit.blocks.0.self_attn.q.lora_B.default.weight",
        ("pipe.dit.blocks.0.self_attn.q", "up"),
        (MODEL, "blocks.0.self_attn.q", "diffsynth"),
    ),
    (
        "blocks.0.self_attn.q.lora_A.default.weight",
        ("blocks.0.self_attn.q", "down"),
        (ANY, "blocks.0.self_attn.q", "plain names"),
    ),
    # diffusers and PEFT
    (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora.down.weight",
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k", "down"),
        (MODEL, "mid_block.attentions.0.transformer_blocks.0.attn1.to_k", "diffusers"),
    ),
    (
        "transformer.transformer_blocks.0.attn.to_k.lora_magnitude_vector.default.weight",
        ("transformer.transformer_blocks.0.attn.to_k", "magnitude"),
        (MODEL, "transformer_blocks.0.attn.to_k", "diffusers"),
    ),
    (
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight",
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_q", "up"),
        (TE1, "text_model.encoder.layers.0.self_attn.to_q", "diffusers"),
    ),
    (
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "down"),
        (("te2", "te3", "te1", "te4"), "encoder.block.0.layer.0.SelfAttention.q", "diffusers"),
    ),
    (
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", "down"),
        (("te3", "te2", "te1", "te4"), "encoder.block.0.layer.0.SelfAttention.q", "diffusers"),
    ),
    (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out", "up"),
        (MODEL, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", "diffusers"),
    ),
    (
        "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
        ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q", "down"),
        (ANY, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "attention processors"),
    ),
    (
        "unet.base_model.model.mid_block.attentions.0.proj_in.lora_A.weight",
        ("unet.base_model.model.mid_block.attentions.0.proj_in", "down"),
        (MODEL, "mid_block.attentions.0.proj_in", "diffusers"),
    ),
    (
        "text_encoder.base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        ("text_encoder.base_model.model.text_model.encoder.layers.0.mlp.fc1", "down"),
        (TE1, "text_model.encoder.layers.0.mlp.fc1", "diffusers"),
    ),
    (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.style.weight",
        ("base_model.model.model.layers.0.self_attn.q_proj", "down"),
        (ANY, "model.layers.0.self_attn.q_proj", "peft"),
    ),
    (
        "base_model.model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        ("base_model.model.base_model.model.model.layers.0.self_attn.q_proj", "down"),
        (ANY, "model.layers.0.self_attn.q_proj", "peft"),
    ),
    (
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
        ("base_model.model.transformer.h.0.attn.c_attn", "down"),
        (ANY, "transformer.h.0.attn.c_attn", "peft"),
    ),
    (
        "transformer.h.0.attn.c_attn.lora_A.weight",
        ("transformer.h.0.attn.c_attn", "down"),
        (ANY, "transformer.h.0.attn.c_attn", "plain names"),
    ),
    (
        "base_model.model.transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        ("base_model.model.transformer.transformer_blocks.0.attn.to_q", "down"),
        (MODEL, "transformer_blocks.0.attn.to_q", "peft"),
    ),
    (
        "base_model.model.text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        ("base_model.model.text_encoder.text_model.encoder.layers.0.mlp.fc1", "down"),
        (TE1, "text_model.encoder.layers.0.mlp.fc1", "peft"),
    ),
    (
        "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight",
        ("base_model.model.model.layers.0.mlp.experts.base_layer", "down"),
        (ANY, "model.layers.0.mlp.experts", "peft"),
    ),
    (
        "base_model.model.classifier.modules_to_save.default.dense.weight",
        ("base_model.model.classifier.modules_to_save.default.dense", "value"),
        (ANY, "classifier.dense", "peft"),
    ),
    # XLabs, Black Forest Labs, Mochi, MLX
    (
        "double_blocks.7.processor.qkv_lora1.down.weight",
        ("double_blocks.7.processor.qkv_lora1", "down"),
        (ANY, "double_blocks.7.img_attn.qkv", "xlabs"),
    ),
    (
        "diffusion_model.double_blocks.7.processor.proj_lora2.up.weight",
        ("diffusion_model.double_blocks.7.processor.proj_lora2", "up"),
        (MODEL, "double_blocks.7.txt_attn.proj", "xlabs"),
    ),
    (
        "single_blocks.7.processor.qkv_lora.up.weight",
        ("single_blocks.7.processor.qkv", "up"),
        (ANY, "single_blocks.7.processor.qkv_lora", "xlabs"),
    ),
    (
        "single_blocks.7.processor.proj_lora.down.weight",
        ("single_blocks.7.processor.proj", "down"),
        (ANY, "single_blocks.7.linear2", "xlabs"),
    ),
    ("img_in.lora_A.weight", ("img_in", "down"), (ANY, "img_in", "bfl")),
    (
        "double_blocks.0.img_attn.qkv.lora_B.bias",
        ("double_blocks.0.img_attn.qkv", "up_bias"),
        (ANY, "double_blocks.0.img_attn.qkv", "bfl"),
    ),
    (
        "transformer_blocks.0.attn1.to_q.lora_A",
        ("transformer_blocks.0.attn1.to_q", "down"),
        (ANY, "transformer_blocks.0.attn1.to_q", "plain names"),
    ),
    (
        "model.layers.22.self_attn.q_proj.lora_a",
        ("model.layers.22.self_attn.q_proj", "mlx_a"),
        (ANY, "model.layers.22.self_attn.q_proj", "plain names"),
    ),
]


@pytest.mark.parametrize(("key", "split", "reading"), SPOKEN, ids=[key for key, _, _ in SPOKEN])
def test_a_key_says_what_it_updates_and_where(key: str, split, reading) -> None:
    found = split_key(key)
    assert found is not None
    module, suffix = found
    assert (module, suffix.factor) == split
    first = addresses(module)[0]
    assert (first.components, first.path, first.dialect) == reading


@pytest.mark.parametrize(
    ("module", "other"),
    [
        ("transformer.diffusion_model.layers.0.attention.qkv", (MODEL, "layers.0.attention.qkv")),
        ("unet.unet.conv_in", (MODEL, "conv_in")),
        ("base_model.model.transformer.layers.0.attention.to_q", (MODEL, "layers.0.attention.to_q")),
        ("x.attn.processor.to_q", (ANY, "x.attn.processor.to_q")),
        ("model.diffusion_model.out.2", (ANY, "model.diffusion_model.out.2")),
    ],
)
def test_less_telling_readings_come_later(module: str, other) -> None:
    assert other in [(reading.components, reading.path) for reading in addresses(module)]


@pytest.mark.parametrize("module", ["transformer.h.0.attn.c_attn", "base_model.model.transformer.wte"])
def test_gpt2s_own_first_level_is_no_prefix(module: str) -> None:
    assert all(reading.path.startswith(("transformer.", "base_model.")) for reading in addresses(module))


@pytest.mark.parametrize("slot", ["lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2.", "clip_l.", "clip_g."])
@pytest.mark.parametrize("path", ["text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1", "text_projection"])
def test_a_clip_module_stays_in_its_own_text_encoder(slot: str, path: str) -> None:
    """CLIP-L and CLIP-G have the same names: nothing but the slot tells them apart."""
    module = slot + (flatten(path) if slot.endswith("_") else path)
    assert len(addresses(module)[0].components) == 1


@given(st.sampled_from(PREFIXES), st.from_regex(r"\A[bcdg]{1,8}(\.[a-g0-9]{1,6}){1,4}\Z"))
def test_what_stands_behind_a_prefix_is_read_whole(prefix, path: str) -> None:
    """No prefix is spelled with these letters alone."""
    encoder = "qwen3_4b." if prefix.text == "text_encoders." else ""
    written = flatten(path) if prefix.style == "flat" else path
    first = addresses(prefix.text + encoder + written)[0]
    assert (first.components, first.path, first.style) == (prefix.components, written, prefix.style)


@given(st.text("abc_.0", max_size=30))
def test_every_name_has_a_reading_as_it_stands(module: str) -> None:
    readings = addresses(module)
    assert any(reading.components == () for reading in readings)
    assert all(isinstance(reading, Address) for reading in readings)


class TestParts:
    """kohya trains q, k and v of a fused projection apart."""

    @pytest.mark.parametrize(
        ("module", "part", "count", "path"),
        [
            ("lora_unet_double_blocks_3_img_attn_qkv", 0, 3, "transformer_blocks_3_attn_to_q"),
            ("lora_unet_double_blocks_3_txt_attn_qkv", 2, 3, "transformer_blocks_3_attn_add_v_proj"),
            ("oft_unet_single_blocks_12_linear1", 1, 4, "single_transformer_blocks_12_attn_to_k"),
            ("oft_unet_single_blocks_12_linear1", 3, 4, "single_transformer_blocks_12_proj_mlp"),
            ("lora_unet_joint_blocks_3_x_block_attn_qkv", 1, 3, "transformer_blocks_3_attn_to_k"),
            ("diffusion_model.joint_blocks.3.context_block.attn.qkv", 1, 3, "transformer_blocks.3.attn.add_k_proj"),
        ],
    )
    def test_a_part_is_a_module_of_its_own(self, module: str, part: int, count: int, path: str) -> None:
        assert part_addresses(module, part, count)[0].path == path

    def test_a_module_in_one_piece_is_itself(self) -> None:
        assert part_addresses("oft_unet_single_blocks_0_linear2", 0, 1) == addresses("oft_unet_single_blocks_0_linear2")

    @pytest.mark.parametrize(("module", "count"), [("lora_unet_conv_in", 3), ("lora_unet_single_blocks_0_linear1", 3)])
    def test_an_unknown_split_has_no_place(self, module: str, count: int) -> None:
        assert part_addresses(module, 0, count) == ()
