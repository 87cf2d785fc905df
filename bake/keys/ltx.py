"""LTX-Video: Lightricks' names (also ComfyUI's) <-> diffusers names."""

from __future__ import annotations

from bake.keys.tables import Table, same, within

LTX_VIDEO = Table(
    *within(
        *("transformer_blocks.#", "transformer_blocks.#"),
        same("attn1.q_norm", "attn1.norm_q"),
        same("attn1.k_norm", "attn1.norm_k"),
        same("attn2.q_norm", "attn2.norm_q"),
        same("attn2.k_norm", "attn2.norm_k"),
        *(
            same(f"{attention}.{leaf}")
            for attention in ("attn1", "attn2")
            for leaf in ("to_q", "to_k", "to_v", "to_out.0")
        ),
        same("ff.net.0.proj"),
        same("ff.net.2"),
    ),
    same("patchify_proj", "proj_in"),
    same("proj_out"),
    same("caption_projection.linear_1"),
    same("caption_projection.linear_2"),
    same("adaln_single.linear", "time_embed.linear"),
    same("adaln_single.emb.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_1"),
    same("adaln_single.emb.timestep_embedder.linear_2", "time_embed.emb.timestep_embedder.linear_2"),
)
