"""Where an adapter's module names point: the prefixes of every dialect, and the tables' shared types."""

from __future__ import annotations

from typing import Literal, NamedTuple

Style = Literal["dotted", "flat", "number"]

UNET_LIKE = ("unet", "transformer")


class Address(NamedTuple):
    """One reading of a module name."""

    components: tuple[str, ...]  # where to look; empty: in every component
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
    #      text                    components    style     dialect         seen in
    Prefix("lora_unet_", UNET_LIKE, "flat", "kohya"),  #                  kohya sd-scripts, OneTrainer, LyCORIS
    Prefix("lora_te1_", ("te1",), "flat", "kohya"),  #                    SDXL: CLIP-L
    Prefix("lora_te2_", ("te2",), "flat", "kohya"),  #                    SDXL: OpenCLIP bigG
    Prefix("lora_te3_", ("te3",), "flat", "kohya"),  #                    SD3, Flux: T5
    Prefix("lora_te_", ("te1",), "flat", "kohya"),  #                     SD1, SD2: the only text encoder
    Prefix("base_model.model.", (), "dotted", "peft"),  #                 PEFT, save_pretrained
    Prefix("unet.", UNET_LIKE, "dotted", "diffusers"),  #                 diffusers pipelines
    Prefix("transformer.", UNET_LIKE, "dotted", "diffusers"),
    Prefix("text_encoder.", ("te1",), "dotted", "diffusers"),
    Prefix("text_encoder_2.", ("te2",), "dotted", "diffusers"),
    Prefix("text_encoder_3.", ("te3",), "dotted", "diffusers"),
    Prefix("diffusion_model.", UNET_LIKE, "dotted", "comfy"),  #          ComfyUI, ai-toolkit
)


def addresses(module: str) -> tuple[Address, ...]:
    """Every reading of an adapter's module name, the most telling first.

    The last one takes the name as it stands: bare diffusers names of old files, and adapters whose
    module names are simply the base's tensor names.
    """
    readings = [
        Address(prefix.components, module[len(prefix.text) :], prefix.style, prefix.dialect)
        for prefix in PREFIXES
        if module.startswith(prefix.text)
    ]
    dialect = "attention processors" if ".processor." in module else "plain names"
    return (*readings, Address((), module, "dotted", dialect))


def flatten(path: str) -> str:
    """A dotted module path as the flat dialects write it. Never undone: "_" is ambiguous."""
    return path.replace(".", "_")
