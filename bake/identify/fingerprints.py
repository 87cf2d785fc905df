"""Which family an adapter was made for: from the blocks its modules name, widths only as a hint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from bake.keys.dialects import flatten

Shape = tuple[int, ...]

_UNETS = frozenset({"sd1", "sd2", "sdxl", "sdxl-refiner"})

# Module names, dots written "_", that occur in one family only.    seen in
_OTHER_FAMILIES = (
    ("flux", r"(^|_)(double|single)_blocks_\d+_|(^|_)single_transformer_blocks_\d+_attn"),
    ("auraflow", r"(^|_)(joint|single)_transformer_blocks_\d+_(attn|ff)|double_layers_\d+"),
    ("sd3", r"(^|_)joint_blocks_\d+_"),
    ("qwen-image", r"(^|_)transformer_blocks_\d+_(img|txt)_(mlp|mod)"),
    ("wan", r"(^|_)blocks_\d+_(self_attn_[qkvo]$|cross_attn_[qkvo]$|ffn_\d)"),
    ("lumina", r"(^|_)(layers|noise_refiner|context_refiner)_\d+_attention_(qkv|out|to_[qkv]|to_out)(_|$)"),
    ("language-model", r"(^|_)(model|language_model|transformer|decoder)_(layers|h)_\d+_(self_attn|mlp|attn)_"),
)
_FAMILIES = tuple((family, re.compile(pattern)) for family, pattern in _OTHER_FAMILIES)

# What the blocks named rule in, among the UNets.
_UNET_EVIDENCE = (
    (r"transformer_blocks_[1-9]", {"sdxl", "sdxl-refiner"}),  # deeper than one
    (r"input_blocks_[12]_1_", {"sd1", "sd2"}),
    (r"input_blocks_(9|1\d)_|output_blocks_(9|1\d)_|(down|up)_blocks_3_", {"sd1", "sd2", "sdxl-refiner"}),
    (r"down_blocks_0_attentions|up_blocks_3_attentions", {"sd1", "sd2"}),
    (r"up_blocks_0_attentions", {"sdxl"}),
    (r"add_embedding|label_emb", {"sdxl", "sdxl-refiner"}),
)
_EVIDENCE = tuple((re.compile(pattern), frozenset(families)) for pattern, families in _UNET_EVIDENCE)
_IS_UNET = re.compile(r"(^|_)(down_blocks|up_blocks|input_blocks|output_blocks|mid_block|middle_block)_")

# The projections around a transformer are 1x1 convolutions in SD1, Linear layers in its successors.
_PROJECTION = re.compile(r"_proj_(in|out)$")

_CROSS_ATTENTION = re.compile(r"attn2_to_[kv]$")
_CONTEXT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}

# ss_base_model_version of kohya's metadata
_KOHYA_VERSIONS = (
    *(("sdxl_", "sdxl"), ("sd_v1", "sd1"), ("sd_v2", "sd2"), ("sd3", "sd3"), ("flux", "flux")),
    *(("lumina", "lumina"), ("wan", "wan")),
)


def families_by_names(modules: Iterable[str], has_second_text_encoder: bool = False) -> tuple[frozenset[str], str]:
    """(families whose blocks these module names are, the name that decided); empty set: no telling.

    modules: names of modules outside the text encoders.
    """
    flat = [flatten(module) for module in modules]
    for family, pattern in _FAMILIES:
        telling = next((name for name in flat if pattern.search(name)), None)
        if telling is not None:
            return frozenset({family}), telling
    telling = next((name for name in flat if _IS_UNET.search(name)), None)
    if telling is None:
        return frozenset(), ""
    possible = _UNETS
    if has_second_text_encoder:
        possible = possible & {"sdxl"}
    for pattern, families in _EVIDENCE:
        if possible & families != possible:
            found = next((name for name in flat if pattern.search(name)), None)
            if found is not None:
                possible, telling = possible & families, found
    return possible, telling


def family_by_shapes(down_shapes: Mapping[str, Shape]) -> str | None:
    """The family that these shapes of down factors, by module name, point to; a hint, not a proof.

    Cross-attention is as wide as the family's text encoder; SD1 alone projects by convolution.
    """
    for module, shape in down_shapes.items():
        name = flatten(module)
        if _CROSS_ATTENTION.search(name) and len(shape) > 1 and shape[1] in _CONTEXT_WIDTHS:
            return _CONTEXT_WIDTHS[shape[1]]
        if _PROJECTION.search(name) and len(shape) == 4:
            return "sd1"
    return None


def family_by_metadata(metadata: Mapping[str, str]) -> str | None:
    """The family a trainer wrote into the file: kohya's ss_base_model_version, or ModelSpec."""
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "")
    for prefix, family in _KOHYA_VERSIONS:
        if version.startswith(prefix):
            return family
    for start, family in (("stable-diffusion-xl", "sdxl"), ("stable-diffusion-v1", "sd1"), ("flux", "flux")):
        if architecture.startswith(start):
            return family
    return None
