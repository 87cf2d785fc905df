"""PixArt alpha and sigma, and Sana: the original names <-> diffusers names."""

from __future__ import annotations

from bake.keys.tables import Table, fused, same, within

_ATTENTION = within(
    *("blocks.#", "transformer_blocks.#"),
    fused("attn.qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"),
    same("attn.proj", "attn1.to_out.0"),
    same("cross_attn.q_linear", "attn2.to_q"),
    fused("cross_attn.kv_linear", "attn2.to_k", "attn2.to_v"),
    same("cross_attn.proj", "attn2.to_out.0"),
    same("scale_shift_table"),
)
_ENDS = (
    same("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    same("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    same("final_layer.linear", "proj_out"),
    same("final_layer.scale_shift_table", "scale_shift_table"),
)

PIXART = Table(
    *_ATTENTION,
    *within(
        *("blocks.#", "transformer_blocks.#"),
        same("mlp.fc1", "ff.net.0.proj"),
        same("mlp.fc2", "ff.net.2"),
    ),
    *_ENDS,
    same("x_embedder.proj", "pos_embed.proj"),
    same("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
    same("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"),
    same("t_block.1", "adaln_single.linear"),
    # alpha at 1024 pixels
    same("csize_embedder.mlp.0", "adaln_single.emb.resolution_embedder.linear_1"),
    same("csize_embedder.mlp.2", "adaln_single.emb.resolution_embedder.linear_2"),
    same("ar_embedder.mlp.0", "adaln_single.emb.aspect_ratio_embedder.linear_1"),
    same("ar_embedder.mlp.2", "adaln_single.emb.aspect_ratio_embedder.linear_2"),
)

SANA = Table(
    *_ATTENTION,
    *within(
        *("blocks.#", "transformer_blocks.#"),
        same("mlp.inverted_conv.conv", "ff.conv_inverted"),
        same("mlp.depth_conv.conv", "ff.conv_depth"),
        same("mlp.point_conv.conv", "ff.conv_point"),
    ),
    *_ENDS,
    same("x_embedder.proj", "patch_embed.proj"),
    same("attention_y_norm", "caption_norm"),
    same("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
    same("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
    same("t_block.1", "time_embed.linear"),
)
