"""Where an adapter's module names point: the prefixes of every dialect, and the tables' shared types."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Style = Literal["dotted", "flat", "number"]

# What a file calls a UNet or a transformer says nothing about what the base calls it. "model" is the only
# component of a file whose architecture bake does not know.
UNET_LIKE = ("unet", "transformer", "prior", "model")
SECOND = ("transformer_2",)  # Wan 2.2 has two transformers


class Address(NamedTuple):
    """One reading of a module name."""

    components: tuple[str, ...]  # where to look, the likeliest first; empty: in every component
    path: str  # the module below the component, as the dialect spells it
    style: Style  # "flat": dots are written "_"; "number": a position, see bake.keys.numbered
    dialect: str


class Prefix(NamedTuple):
    """One row of PREFIXES."""

    text: str
    components: tuple[str, ...]
    style: Style
    dialect: str


PREFIXES = (
    #      text                          components style    dialect               seen in
    Prefix("lora_unet_", UNET_LIKE, "flat", "kohya"),  #                        kohya sd-scripts, musubi, LyCORIS
    Prefix("lora_unet_unet_", UNET_LIKE, "flat", "kohya"),  #                   scripts that convert PEFT models
    Prefix("lora_unet__", UNET_LIKE, "flat", "kohya"),  #                       Wan-Fun
    Prefix("oft_unet_", UNET_LIKE, "flat", "kohya"),  #                         kohya networks/oft.py
    Prefix("lora_te1_", ("te1",), "flat", "kohya"),  #                          SDXL, SD3, Flux: CLIP-L
    Prefix("lora_te2_", ("te2",), "flat", "kohya"),  #                          SDXL, SD3: OpenCLIP bigG
    Prefix("lora_te3_", ("te3",), "flat", "kohya"),  #                          SD3, Flux: T5
    Prefix("lora_te4_", ("te4",), "flat", "kohya"),  #                          HiDream: Llama
    Prefix("lora_te_", ("te1",), "flat", "kohya"),  #                           the only text encoder: SD1, SD2, Lumina
    Prefix("oft_te_", ("te1",), "flat", "kohya"),
    Prefix("lora_transformer_", UNET_LIKE, "flat", "onetrainer"),  #            OneTrainer, legacy form
    Prefix("lora_transformer_2_", SECOND, "flat", "onetrainer"),
    Prefix("lora_prior_unet_", UNET_LIKE, "flat", "onetrainer"),  #             Stable Cascade
    Prefix("lora_prior_te_", ("te1", "te2"), "flat", "onetrainer"),  #          Stable Cascade: CLIP-G
    Prefix("lycoris_", UNET_LIKE, "flat", "lycoris"),  #                        LyCORIS wrapper, SimpleTuner
    Prefix("unet.", UNET_LIKE, "dotted", "diffusers"),  #                       diffusers pipelines
    Prefix("transformer.", UNET_LIKE, "dotted", "diffusers"),
    Prefix("transformer_2.", SECOND, "dotted", "diffusers"),
    Prefix("prior.", UNET_LIKE, "dotted", "diffusers"),
    Prefix("text_encoder.", ("te1",), "dotted", "diffusers"),
    Prefix("text_encoder_2.", ("te2",), "dotted", "diffusers"),
    Prefix("text_encoder_3.", ("te3",), "dotted", "diffusers"),
    Prefix("text_encoder_4.", ("te4",), "dotted", "diffusers"),
    Prefix("diffusion_model.", UNET_LIKE, "dotted", "comfy"),  #                ComfyUI, ai-toolkit, diffusion-pipe
    Prefix("model.diffusion_model.", UNET_LIKE, "dotted", "comfy"),  #          the whole name in a single file
    Prefix("diffusion_model_2.", SECOND, "dotted", "comfy"),  #                 OneTrainer, Wan 2.2
    Prefix("text_encoders.clip_l.", ("te1",), "dotted", "comfy"),
    Prefix("text_encoders.clip_g.", ("te2",), "dotted", "comfy"),
    Prefix("text_encoders.t5xxl.", ("te3",), "dotted", "comfy"),
    Prefix("text_encoders.", ("te1",), "dotted", "comfy"),  #                   a language model: qwen3_4b
    Prefix("clip_l.transformer.", ("te1",), "dotted", "comfy"),
    Prefix("clip_g.transformer.", ("te2",), "dotted", "comfy"),
    Prefix("t5xxl.transformer.", ("te3",), "dotted", "comfy"),
    Prefix("clip_l.", ("te1",), "dotted", "omi"),  #                            OneTrainer, Open Model Initiative names
    Prefix("clip_g.", ("te2",), "dotted", "omi"),
    Prefix("t5.", ("te3",), "dotted", "omi"),
    Prefix("llama.", ("te4",), "dotted", "omi"),
    Prefix("pipe.dit.", UNET_LIKE, "dotted", "diffsynth"),  #                   DiffSynth-Studio
    Prefix("base_model.model.", (), "dotted", "peft"),  #                       PEFT, save_pretrained
)
_BY_TEXT = {row.text: row for row in PREFIXES}
_LONGEST_PREFIX = re.compile("|".join(map(re.escape, sorted(_BY_TEXT, key=len, reverse=True))))

_WRAPPER = "base_model.model."
# Levels that training wrapped around a module, and that no base has.
_LEVELS = re.compile(r"(?<![^.])(?:modules_to_save\.[^.]+|base_layer|_orig_mod|_fsdp_wrapped_module)(?:\.|$)")
# `transformer.` is also the first level of GPT-2 and its kin, and then no prefix.
_OWN_TRANSFORMER = re.compile(r"transformer\.(h|wte|wpe|ln_f|word_embeddings|word_embeddings_layernorm)(\.|$)")
# The names that only image models have behind `base_model.model.transformer.`
_IMAGE_TRANSFORMER = re.compile(r"transformer\.(\w*transformer_blocks|double_blocks|single_blocks|diffusion_model)\.")
# Names inside a T5 or a language model. No other encoder has them, so they may be looked up in every slot.
_NOT_CLIP = re.compile(
    r"shared$|encoder[._]block[._]|encoder[._]embed_tokens$|(model[._])?(layers[._]\d|embed_tokens$)"
)
_TEXT_SLOTS = ("te3", "te2", "te1", "te4")

# Spellings of one dialect, whatever the prefix, in the base's own. Anchored; the first that fits is taken.
_RESPELLED = tuple(
    (re.compile(pattern), path)
    for pattern, path in (
        (r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1", r"\1.img_attn.\2"),  #  XLabs
        (r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2", r"\1.txt_attn.\2"),
        (r"(single_blocks\.\d+)\.processor\.qkv", r"\1.processor.qkv_lora"),  # rows of linear1, see bake.keys.flux
        (r"(single_blocks\.\d+)\.processor\.proj", r"\1.linear2"),  #         its first columns
        (r"(.+\.attn\d?)\.processor\.to_out", r"\1.to_out.0"),  #             diffusers before 0.18
        (r"(.+)\.processor\.(\w+)", r"\1.\2"),
        (r"(.+\.attention)\.to\.([qkv])", r"\1.to_\2"),  #                  some trainers of Z-Image
        (r"(.+\.(?:img|txt)_mlp)\.fc0", r"\1.fc1"),  #                        OneTrainer, HunyuanVideo
    )
)

_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
# A projection of several parts -> where each part is on its own, as diffusers spells it. "_" stands for "." or "_".
_PARTS = tuple(
    (re.compile(pattern.replace("_", "[._]")), begin, parts)
    for pattern, begin, parts in (
        (r"double_blocks_(\d+)_img_attn_qkv", "transformer_blocks.{}.attn.", _QKV),  #   Flux, HunyuanVideo
        (r"double_blocks_(\d+)_txt_attn_qkv", "transformer_blocks.{}.attn.", _ADDED),
        (
            r"single_blocks_(\d+)_linear1",
            "single_transformer_blocks.{}.",
            (*(f"attn.{leaf}" for leaf in _QKV), "proj_mlp"),
        ),
        (
            r"txt_in_individual_token_refiner_blocks_(\d+)_self_attn_qkv",
            "context_embedder.token_refiner.refiner_blocks.{}.attn.",
            _QKV,
        ),
        (r"joint_blocks_(\d+)_x_block_attn_qkv", "transformer_blocks.{}.attn.", _QKV),  # SD3
        (r"joint_blocks_(\d+)_x_block_attn2_qkv", "transformer_blocks.{}.attn2.", _QKV),
        (r"joint_blocks_(\d+)_context_block_attn_qkv", "transformer_blocks.{}.attn.", _ADDED),
        (r"blocks_(\d+)_attn_qkv", "transformer_blocks.{}.attn1.", _QKV),  #             PixArt
        (r"blocks_(\d+)_cross_attn_kv_linear", "transformer_blocks.{}.attn2.", _QKV[1:]),
        (r"(.+)_attention_attn_in_proj", "{}.attention.attn.", _QKV),  #                 Stable Cascade
    )
)
_NUMBERED_PART = re.compile(r"(?P<whole>.+(?:qkv|linear1|kv_linear|in_proj))\.(?P<part>\d)")

_XLABS = re.compile(r"(double|single)_blocks\.\d+\.processor\.")
_BFL = re.compile(r"((double|single)_blocks|(img|txt|time|vector|guidance)_in|final_layer)(\.|$)")


def addresses(module: str) -> tuple[Address, ...]:
    """Every reading of an adapter's module name, the most telling first.

    The last one takes the name as it stands: bare diffusers names of old files, and adapters whose
    module names are simply the base's tensor names. A T5's or a language model's modules are looked
    for in every text encoder: Flux keeps its T5 in te2 or in te3, PixArt in te1, and no other
    encoder has modules of those names.
    """
    module = _LEVELS.sub("", module).rstrip(".")
    bare = dict.fromkeys((_respelled(module), module))
    return (*_below_prefixes(module), *(Address((), path, "dotted", _bare_dialect(module)) for path in bare))


def part_addresses(module: str, part: int, count: int) -> tuple[Address, ...]:
    """The readings of one of the `count` projections that a trainer split a fused module into.

    A module in one piece (count 1) is read as it stands. Empty if bake knows no such split.
    Source: kohya sd-scripts networks/lora_flux.py and oft_flux.py, where the parts are q, k, v and,
    in single blocks, the MLP's first layer.
    """
    if count == 1:
        return addresses(module)
    return tuple(
        reading._replace(path=flatten(path) if reading.style == "flat" else path)
        for reading in addresses(module)
        for path in _part_paths(reading.path, count)[part : part + 1]
    )


def flatten(path: str) -> str:
    """A dotted module path as the flat dialects write it. Never undone: "_" is ambiguous."""
    return path.replace(".", "_")


def _below_prefixes(module: str) -> list[Address]:
    """The readings that take prefixes off `module`: one prefix first, then those that stand behind it."""
    begin = None if _OWN_TRANSFORMER.match(module) else _LONGEST_PREFIX.match(module)
    if begin is None:
        return []
    row = _BY_TEXT[begin[0]]
    rest = module[len(row.text) :]
    if row.style == "flat":
        while rest.startswith(row.text):
            rest = rest[len(row.text) :]
        path = rest.strip("_")
        return [Address(_slots(row.components, path), path, "flat", row.dialect)]
    if row.text == "text_encoders.":  # the name of the encoder is free
        rest = rest.partition(".")[2]
    if row.text.startswith("text_encoders."):
        rest = rest.removeprefix("transformer.")
    while rest.startswith(_WRAPPER):
        rest = rest[len(_WRAPPER) :]
    path = _respelled(rest)
    own = Address(_slots(row.components, path), path, "dotted", "xlabs" if _XLABS.match(rest) else row.dialect)
    behind = _below_prefixes(rest)
    if row.text == _WRAPPER and (not rest.startswith("transformer.") or _IMAGE_TRANSFORMER.match(rest)):
        return [*(reading._replace(dialect=row.dialect) for reading in behind), own]
    return [own, *behind]


def _slots(components: tuple[str, ...], path: str) -> tuple[str, ...]:
    """The components a module may be in: those its prefix names, and for a T5 or a language model every slot."""
    if components and components[0].startswith("te") and _NOT_CLIP.match(path):
        return (*components, *(slot for slot in _TEXT_SLOTS if slot not in components))
    return components


def _respelled(path: str) -> str:
    """A dotted path without the spellings that no base has."""
    for pattern, spelling in _RESPELLED:
        found = pattern.fullmatch(path)
        if found is not None:
            return found.expand(spelling)
    numbered = _NUMBERED_PART.fullmatch(path)  # OneTrainer: img_attn.qkv.0
    if numbered is not None:
        parts, part = _part_paths(numbered["whole"]), int(numbered["part"])
        return parts[part] if part < len(parts) else path
    return path


def _part_paths(path: str, count: int | None = None) -> tuple[str, ...]:
    """The dotted paths of the parts of a fused projection; () if it is none, or not one of `count` parts."""
    for pattern, begin, leaves in _PARTS:
        found = pattern.fullmatch(path)
        if found is not None and count in (None, len(leaves)):
            return tuple(begin.format(found[1]) + leaf for leaf in leaves)
    return ()


def _bare_dialect(module: str) -> str:
    if _XLABS.match(module):
        return "xlabs"
    if ".processor." in module:
        return "attention processors"
    return "bfl" if _BFL.match(module) else "plain names"
