"""Wan 2.1 and 2.2: the original names (also ComfyUI's) <-> diffusers names. Nothing is fused."""

from __future__ import annotations

from bake.keys.tables import Table, same, within

_BLOCK = (
    same("self_attn.q", "attn1.to_q"),
    same("self_attn.k", "attn1.to_k"),
    same("self_attn.v", "attn1.to_v"),
    same("self_attn.o", "attn1.to_out.0"),
    same("self_attn.norm_q", "attn1.norm_q"),
    same("self_attn.norm_k", "attn1.norm_k"),
    same("cross_attn.q", "attn2.to_q"),
    same("cross_attn.k", "attn2.to_k"),
    same("cross_attn.v", "attn2.to_v"),
    same("cross_attn.o", "attn2.to_out.0"),
    same("cross_attn.norm_q", "attn2.norm_q"),
    same("cross_attn.norm_k", "attn2.norm_k"),
    same("cross_attn.k_img", "attn2.add_k_proj"),  # image to video
    same("cross_attn.v_img", "attn2.add_v_proj"),
    same("cross_attn.norm_k_img", "attn2.norm_added_k"),
    same("ffn.0", "ffn.net.0.proj"),
    same("ffn.2", "ffn.net.2"),
    same("modulation", "scale_shift_table"),
    # The order of the norms was exchanged with their names. The other one has no weight in either layout.
    same("norm3", "norm2"),
)

WAN = Table(
    *within("blocks.#", "blocks.#", *_BLOCK),
    *within("vace_blocks.#", "vace_blocks.#", *_BLOCK, same("before_proj", "proj_in"), same("after_proj", "proj_out")),
    same("patch_embedding"),
    same("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    same("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    same("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    same("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    same("time_projection.1", "condition_embedder.time_proj"),
    same("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    same("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    same("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    same("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    same("head.head", "proj_out"),
    same("head.modulation", "scale_shift_table"),
)
