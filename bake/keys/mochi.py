"""Mochi 1: Genmo's names (also ComfyUI's) <-> diffusers names."""

from __future__ import annotations

from bake.keys.tables import Table, fused, same, swapped, within

MOCHI = Table(
    *within(
        *("blocks.#", "transformer_blocks.#"),
        fused("attn.qkv_x", "attn1.to_q", "attn1.to_k", "attn1.to_v"),
        fused("attn.qkv_y", "attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
        same("attn.proj_x", "attn1.to_out.0"),
        same("attn.proj_y", "attn1.to_add_out"),
        same("attn.q_norm_x", "attn1.norm_q"),
        same("attn.k_norm_x", "attn1.norm_k"),
        same("attn.q_norm_y", "attn1.norm_added_q"),
        same("attn.k_norm_y", "attn1.norm_added_k"),
        same("mod_x", "norm1.linear"),
        same("mod_y", "norm1_context.linear norm1_context.linear_1"),  # the second in the last block
        # (gate, up) in the original, (up, gate) in diffusers
        swapped("mlp_x.w1", "ff.net.0.proj"),
        swapped("mlp_y.w1", "ff_context.net.0.proj"),
        same("mlp_x.w2", "ff.net.2"),
        same("mlp_y.w2", "ff_context.net.2"),
    ),
    same("x_embedder.proj", "patch_embed.proj"),
    same("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
    same("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
    same("t5_y_embedder.to_kv", "time_embed.pooler.to_kv"),
    same("t5_y_embedder.to_q", "time_embed.pooler.to_q"),
    same("t5_y_embedder.to_out", "time_embed.pooler.to_out"),
    same("t5_yproj", "time_embed.caption_proj"),
    same("final_layer.linear", "proj_out"),
    swapped("final_layer.mod", "norm_out.linear"),
)
