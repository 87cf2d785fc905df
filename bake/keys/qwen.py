"""Qwen-Image: one set of names in all layouts."""

from __future__ import annotations

from bake.keys.tables import Table, same, within

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_STREAM = ("mlp.net.0.proj", "mlp.net.2", "mod.1")

# to_out.0 is also written without the index.
QWEN_IMAGE = Table(
    *within(
        *("transformer_blocks.#", "transformer_blocks.#"),
        *(same(f"attn.{leaf}") for leaf in _ATTENTION),
        *(same(f"{stream}_{leaf}") for stream in ("img", "txt") for leaf in _STREAM),
    ),
    *(same(path) for path in ("img_in", "txt_in", "norm_out.linear", "proj_out")),
    same("time_text_embed.timestep_embedder.linear_1"),
    same("time_text_embed.timestep_embedder.linear_2"),
)
