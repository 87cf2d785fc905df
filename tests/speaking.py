"""Adapters for every layer of a model, in the words of every dialect that trainers write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from headers import Shapes, factors, union

KOHYA = ("lora_down.weight", "lora_up.weight", True)
PEFT = ("lora_A.weight", "lora_B.weight", False)
NAMED = ("lora_A.default.weight", "lora_B.default.weight", False)  # PEFT, saved without its own saver
DOTTED = ("lora.down.weight", "lora.up.weight", False)  # diffusers before 0.22
SCALED = ("lora_A.weight", "lora_B.weight", True)


class Dialect(NamedTuple):
    """How a trainer writes the names of modules; a prefix that ends in "_" is followed by a flat path."""

    name: str
    title: str  # what bake calls the dialect
    layout: str  # whose names follow the prefix: "original" or "diffusers"
    prefix: str
    suffixes: tuple[str, str, bool] = KOHYA
    encoders: Mapping[str, str] | None = None  # kind or place of a text encoder -> prefix; None: never trained


_KOHYA_ENCODERS = {"clip": "lora_te_", "clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5": "lora_te3_"}
_NUMBERED = {"1": "lora_te1_", "2": "lora_te2_", "3": "lora_te3_"}
_FOLDERS = {"1": "text_encoder.", "2": "text_encoder_2.", "3": "text_encoder_3."}
_COMFY = {
    **{kind: f"text_encoders.{kind}.transformer." for kind in ("clip_l", "clip_g")},
    **{"t5": "text_encoders.t5xxl.transformer.", "clip": "text_encoders.clip_l.transformer."},
}
_OMI = {"clip": "clip_l.", "clip_l": "clip_l.", "clip_g": "clip_g.", "t5": "t5."}

# What is trained on the original names, and what on diffusers'.
DIALECTS = (
    Dialect("kohya", "kohya", "original", "lora_unet_", KOHYA, _KOHYA_ENCODERS),
    Dialect("Wan-Fun", "kohya", "original", "lora_unet__"),
    Dialect("ComfyUI", "comfy", "original", "diffusion_model.", SCALED, _COMFY),
    Dialect("bare original", "bare", "original", "", PEFT),
    Dialect("PEFT on the original", "peft", "original", "base_model.model.", PEFT),
    Dialect("DiffSynth", "diffsynth", "original", "pipe.dit.", NAMED),
    Dialect("OMI", "diffusers", "original", "transformer.", KOHYA, _OMI),
    Dialect("kohya on diffusers", "kohya", "diffusers", "lora_unet_", KOHYA, _KOHYA_ENCODERS),
    Dialect("LyCORIS", "lycoris", "diffusers", "lycoris_"),
    Dialect("OneTrainer", "onetrainer", "diffusers", "lora_transformer_", KOHYA, _NUMBERED),
    Dialect("diffusers", "diffusers", "diffusers", "transformer.", PEFT, _FOLDERS),
    Dialect("diffusers with alpha", "diffusers", "diffusers", "unet.", SCALED, _FOLDERS),
    Dialect("diffusers before 0.22", "diffusers", "diffusers", "unet.", DOTTED, _FOLDERS),
    Dialect("bare diffusers", "bare", "diffusers", "", KOHYA),
    Dialect("PEFT", "peft", "diffusers", "base_model.model.", PEFT),
    Dialect("DiffSynth on diffusers", "plain names", "diffusers", "", NAMED),
)
CASCADE = Dialect(
    *("OneTrainer for Cascade", "onetrainer", "diffusers", "lora_prior_unet_", KOHYA, {"1": "lora_prior_te_"})
)


@dataclass(frozen=True)
class Layers:
    """The Linear and convolution layers of a model: module -> shape of its weight."""

    original: Shapes
    diffusers: Shapes
    encoders: Mapping[str, Shapes] = field(default_factory=dict)  # clip, clip_l, clip_g, t5 -> Hugging Face names

    def speaks(self, dialect: Dialect) -> bool:
        return bool(self.original if dialect.layout == "original" else self.diffusers)


def spoken(dialect: Dialect, layers: Layers) -> Shapes:
    """The LoRA for all `layers` in `dialect`: tensor name -> shape."""
    down, up, alpha = dialect.suffixes
    model = layers.original if dialect.layout == "original" else layers.diffusers
    parts = [(dialect.prefix, model)]
    for place, (kind, modules) in enumerate(layers.encoders.items(), 1):
        prefix = (dialect.encoders or {}).get(kind) or (dialect.encoders or {}).get(str(place))
        if prefix is not None:
            parts.append((prefix, modules))
    return union(
        factors(prefix + (name.replace(".", "_") if prefix.endswith("_") else name), shape, down, up, alpha)
        for prefix, modules in parts
        for name, shape in modules.items()
    )
