"""Lumina 2 and Z-Image, which grew out of it: the original names (also ComfyUI's) <-> diffusers names."""

from __future__ import annotations

from collections.abc import Sequence

from bake.keys.tables import Row, Table, fused, same, within


def _grouped_queries(rows: int, columns: int) -> Sequence[int] | None:
    """q is as tall as the input is wide; k and v have fewer heads and share the rest."""
    rest = rows - columns
    return [columns, rest // 2, rest // 2] if rest > 0 and rest % 2 == 0 else None


_LUMINA2_BLOCK = (
    fused("attention.qkv", "attn.to_q", "attn.to_k", "attn.to_v", rule=_grouped_queries),
    same("attention.out", "attn.to_out.0"),
    same("attention.q_norm", "attn.norm_q"),
    same("attention.k_norm", "attn.norm_k"),
    same("attention_norm2", "norm2"),
    same("feed_forward.w1", "feed_forward.linear_1"),
    same("feed_forward.w2", "feed_forward.linear_2"),
    same("feed_forward.w3", "feed_forward.linear_3"),
)
# A block that is modulated has its first norm beside the modulation; the context refiner's are not.
_MODULATED = (same("attention_norm1", "norm1.norm"), same("adaLN_modulation.1", "norm1.linear"))


def _within_all(stacks: Sequence[str], *rows: Row) -> tuple[Row, ...]:
    return tuple(row for stack in stacks for row in within(f"{stack}.#", f"{stack}.#", *rows))


LUMINA2 = Table(
    *_within_all(("layers", "noise_refiner", "context_refiner"), *_LUMINA2_BLOCK),
    *_within_all(("layers", "noise_refiner"), *_MODULATED),
    *_within_all(("context_refiner",), same("attention_norm1", "norm1")),
    same("x_embedder"),
    same("cap_embedder.0", "time_caption_embed.caption_embedder.0"),
    same("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
    same("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
    same("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
    same("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    same("final_layer.linear", "norm_out.linear_2"),
)

Z_IMAGE = Table(
    *_within_all(
        ("layers", "noise_refiner", "context_refiner"),
        fused("attention.qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
        same("attention.out", "attention.to_out.0"),
        same("attention.q_norm", "attention.norm_q"),
        same("attention.k_norm", "attention.norm_k"),
        *(same(f"feed_forward.w{number}") for number in (1, 2, 3)),
    ),
    *_within_all(("layers", "noise_refiner"), same("adaLN_modulation.0")),
    *(same(path) for path in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")),
    # "2-1": diffusers keeps these by patch size, in pixels and in frames.
    same("x_embedder", "all_x_embedder.2-1"),
    same("final_layer.linear", "all_final_layer.2-1.linear"),
    same("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
)
