"""AuraFlow: the original names (also ComfyUI's) <-> diffusers names."""

from __future__ import annotations

from bake.keys.tables import Table, same, swapped, within

AURAFLOW = Table(
    *within(
        *("double_layers.#", "joint_transformer_blocks.#"),
        same("attn.w2q", "attn.to_q"),
        same("attn.w2k", "attn.to_k"),
        same("attn.w2v", "attn.to_v"),
        same("attn.w2o", "attn.to_out.0"),
        same("attn.w1q", "attn.add_q_proj"),
        same("attn.w1k", "attn.add_k_proj"),
        same("attn.w1v", "attn.add_v_proj"),
        same("attn.w1o", "attn.to_add_out"),
        same("modX.1", "norm1.linear"),
        same("modC.1", "norm1_context.linear"),
        same("mlpX.c_fc1", "ff.linear_1"),
        same("mlpX.c_fc2", "ff.linear_2"),
        same("mlpX.c_proj", "ff.out_projection"),
        same("mlpC.c_fc1", "ff_context.linear_1"),
        same("mlpC.c_fc2", "ff_context.linear_2"),
        same("mlpC.c_proj", "ff_context.out_projection"),
    ),
    *within(
        *("single_layers.#", "single_transformer_blocks.#"),
        same("attn.w1q", "attn.to_q"),
        same("attn.w1k", "attn.to_k"),
        same("attn.w1v", "attn.to_v"),
        same("attn.w1o", "attn.to_out.0"),
        same("modCX.1", "norm1.linear"),
        same("mlp.c_fc1", "ff.linear_1"),
        same("mlp.c_fc2", "ff.linear_2"),
        same("mlp.c_proj", "ff.out_projection"),
    ),
    same("init_x_linear", "pos_embed.proj"),
    same("positional_encoding", "pos_embed.pos_embed"),
    same("cond_seq_linear", "context_embedder"),
    same("t_embedder.mlp.0", "time_step_proj.linear_1"),
    same("t_embedder.mlp.2", "time_step_proj.linear_2"),
    same("final_linear", "proj_out"),
    swapped("modF.1", "norm_out.linear"),
)
