"""By which tensor names a diffusion model's family and layout are known, prefixes stripped.

Names and structure alone: a model of reduced width, or with fewer blocks, is still what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Shape = tuple[int, ...]


class Sign(NamedTuple):
    """One row of SIGNS."""

    family: str
    layout: str  # "original", "diffusers"; "either" where both use the same names
    present: tuple[str, ...]  # all of these tensors are there; "*" at the beginning: some name ends like this
    absent: tuple[str, ...] = ()  # none of these


# The first row that fits wins.
SIGNS = (
    Sign("sd3", "original", ("joint_blocks.0.context_block.attn.qkv.weight",)),
    Sign(
        *("sd3", "diffusers"),
        (
            *("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"),
            "time_text_embed.text_embedder.linear_1.weight",
        ),
    ),
    Sign("stable-cascade", "original", ("clf.1.weight", "clip_mapper.weight")),  # stage B
    Sign("stable-cascade", "original", ("clf.1.weight", "clip_txt_mapper.weight", "*.attention.attn.in_proj_weight")),
    Sign("stable-cascade", "diffusers", ("clf.1.weight", "clip_txt_pooled_mapper.weight", "*.attention.to_q.weight")),
    Sign("auraflow", "original", ("double_layers.0.attn.w1q.weight",)),
    Sign("auraflow", "diffusers", ("joint_transformer_blocks.0.attn.add_q_proj.weight", "register_tokens")),
    Sign("hunyuan-video", "original", ("txt_in.individual_token_refiner.blocks.0.norm1.weight",)),
    Sign("hunyuan-video", "diffusers", ("context_embedder.token_refiner.refiner_blocks.0.norm1.weight",)),
    Sign("flux2", "original", ("double_stream_modulation_img.lin.weight",)),
    Sign("flux2", "diffusers", ("double_stream_modulation_img.linear.weight", "x_embedder.weight")),
    Sign("chroma", "original", ("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight")),
    Sign(
        *("chroma", "diffusers"),
        ("distilled_guidance_layer.in_proj.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    ),
    Sign(
        "flux",
        "original",
        ("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight", "vector_in.in_layer.weight"),
    ),
    Sign(
        *("flux", "diffusers"),
        (
            *("x_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"),
            *("transformer_blocks.0.norm1_context.linear.weight", "single_transformer_blocks.0.norm.linear.weight"),
        ),
    ),
    Sign("mochi", "original", ("t5_yproj.weight", "blocks.0.attn.qkv_x.weight")),
    Sign("mochi", "diffusers", ("time_embed.caption_proj.weight", "transformer_blocks.0.attn1.add_q_proj.weight")),
    Sign("ltxv", "original", ("patchify_proj.weight", "adaln_single.linear.weight"), ("audio_patchify_proj.weight",)),
    Sign(
        *("ltxv", "diffusers"),
        ("proj_in.weight", "time_embed.linear.weight", "transformer_blocks.0.attn1.norm_q.weight"),
        ("audio_proj_in.weight",),
    ),
    Sign("sana", "original", ("t_block.1.weight", "blocks.0.mlp.inverted_conv.conv.weight")),
    Sign("sana", "diffusers", ("time_embed.linear.weight", "transformer_blocks.0.ff.conv_inverted.weight")),
    Sign("pixart", "original", ("t_block.1.weight", "blocks.0.cross_attn.kv_linear.weight")),
    Sign(
        "pixart",
        "diffusers",
        ("adaln_single.linear.weight", "pos_embed.proj.weight", "caption_projection.linear_1.weight"),
    ),
    Sign(
        "z-image",
        "original",
        ("cap_embedder.1.weight", "layers.0.attention.qkv.weight", "layers.0.adaLN_modulation.0.weight"),
    ),
    Sign(
        "z-image",
        "diffusers",
        ("cap_embedder.1.weight", "layers.0.attention.to_q.weight", "layers.0.adaLN_modulation.0.weight"),
    ),
    Sign(
        "lumina2",
        "original",
        ("cap_embedder.1.weight", "layers.0.attention.qkv.weight", "layers.0.adaLN_modulation.1.weight"),
    ),
    Sign(
        *("lumina2", "diffusers"),
        ("time_caption_embed.caption_embedder.1.weight", "layers.0.attn.to_q.weight"),
        ("ref_image_patch_embedder.weight",),  # OmniGen 2
    ),
    Sign("wan", "original", ("head.modulation", "blocks.0.self_attn.q.weight")),
    Sign("wan", "diffusers", ("condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight")),
    Sign("qwen-image", "either", ("txt_norm.weight", "transformer_blocks.0.attn.add_q_proj.weight")),
)


def find_sign(names: Mapping[str, Shape]) -> Sign | None:
    """The row of SIGNS that these tensor names fit, or None."""
    return next((sign for sign in SIGNS if _fits(sign, names)), None)


def _fits(sign: Sign, names: Mapping[str, Shape]) -> bool:
    exact = [name for name in sign.present if not name.startswith("*")]
    endings = tuple(name[1:] for name in sign.present if name.startswith("*"))
    if not all(name in names for name in exact) or any(name in names for name in sign.absent):
        return False
    return all(any(name.endswith(ending) for name in names) for ending in endings)


def variant_of(family: str, names: Mapping[str, Shape]) -> str | None:
    """Which model of its family this is, where names or channels tell; None for the plain one."""
    if family == "flux":
        return _flux_variant(names)
    if family == "sd3":
        if any(".attn2." in name for name in names):
            return "3.5-medium"
        normed = ("joint_blocks.0.x_block.attn.ln_q.weight", "transformer_blocks.0.attn.norm_q.weight")
        return "3.5-large" if any(name in names for name in normed) else "medium"
    if family == "stable-cascade":
        return "stage-c" if "clip_txt_mapper.weight" in names else "stage-b"
    if family == "pixart":
        return "alpha" if any(name.startswith(("ar_embedder.", "adaln_single.emb.aspect")) for name in names) else None
    if family == "wan":
        if "vace_patch_embedding.weight" in names:
            return "vace"
        projected = _first(names, "head.head.weight", "proj_out.weight")
        return "image-to-video" if _extra_channels(_first(names, "patch_embedding.weight"), projected) else None
    if family == "hunyuan-video":
        patches = _first(names, "img_in.proj.weight", "x_embedder.proj.weight")
        if patches is not None and len(patches) == 4:
            return "image"
        projected = _first(names, "final_layer.linear.weight", "proj_out.weight")
        return "image-to-video" if _extra_channels(patches, projected) else None
    return None


def _flux_variant(names: Mapping[str, Shape]) -> str | None:
    """By input channels for each output channel: Fill reads image and mask too, Depth and Canny a second image."""
    read = _first(names, "img_in.weight", "x_embedder.weight")
    written = _first(names, "final_layer.linear.weight", "proj_out.weight")
    if read is not None and written is not None and len(read) == 2 and written:
        told = {6 * written[0]: "fill", 2 * written[0]: "depth-or-canny"}.get(read[1])
        if told is not None:
            return told
    guided = ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight")
    return None if any(name in names for name in guided) else "schnell"


def _extra_channels(patches: Shape | None, projected: Shape | None) -> bool:
    """True if a patch embedding reads more channels than the last layer writes: a first image beside the noise."""
    if patches is None or projected is None or len(patches) != 5 or not projected:
        return False
    in_patch = patches[2] * patches[3] * patches[4]
    return patches[1] * in_patch > projected[0]


def _first(names: Mapping[str, Shape], *wanted: str) -> Shape | None:
    return next((names[name] for name in wanted if name in names), None)
