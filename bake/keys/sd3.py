"""Stable Diffusion 3 and 3.5: Stability's names (also ComfyUI's) <-> diffusers names."""

from __future__ import annotations

from collections.abc import Sequence

from bake.keys.tables import Table, fused, same, swapped, within


def _shift_and_scale(rows: int, columns: int) -> Sequence[int] | None:
    """The last block does not go on with its context: two modulations there, not six."""
    return [columns, columns] if rows == 2 * columns else None


SD3 = Table(
    *within(
        *("joint_blocks.#", "transformer_blocks.#"),
        fused("x_block.attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
        fused("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),  # 3.5 medium
        fused("context_block.attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        same("x_block.attn.proj", "attn.to_out.0"),
        same("x_block.attn2.proj", "attn2.to_out.0"),
        same("context_block.attn.proj", "attn.to_add_out"),
        same("x_block.attn.ln_q", "attn.norm_q"),
        same("x_block.attn.ln_k", "attn.norm_k"),
        same("x_block.attn2.ln_q", "attn2.norm_q"),
        same("x_block.attn2.ln_k", "attn2.norm_k"),
        same("context_block.attn.ln_q", "attn.norm_added_q"),
        same("context_block.attn.ln_k", "attn.norm_added_k"),
        same("x_block.adaLN_modulation.1", "norm1.linear"),
        swapped("context_block.adaLN_modulation.1", "norm1_context.linear", rule=_shift_and_scale),
        same("context_block.adaLN_modulation.1", "norm1_context.linear"),
        same("x_block.mlp.fc1", "ff.net.0.proj"),
        same("x_block.mlp.fc2", "ff.net.2"),
        same("context_block.mlp.fc1", "ff_context.net.0.proj"),
        same("context_block.mlp.fc2", "ff_context.net.2"),
    ),
    same("context_embedder"),
    same("x_embedder.proj", "pos_embed.proj"),
    same("pos_embed", "pos_embed.pos_embed"),
    same("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    same("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    same("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    same("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    same("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
