"""Where in a model an adapter's module belongs, by its name alone: for summaries, never for matching."""

from __future__ import annotations

import re

from bake.identify.adapter import Adapter, Module

_TEXT_ENCODER = re.compile(r"te\d*")
_WITH_UNET = {"sd1", "sd2", "sdxl", "sdxl-refiner"}
# Everything up to the first number: input_blocks.4, text_model_encoder_layers_11, double_blocks.0, model.layers.3.
# Middle blocks of UNets have no number of their own.
_BLOCK = re.compile(r"mid_block(?=[._])|.*?[._]\d+(?=[._]|$)|\d+(?=[._]|$)")


def component_of(module: Module, adapter: Adapter) -> str:
    """The component that `module` names: te1, te2, te3, unet, transformer; "model" where it names none."""
    wanted = module.readings[0].components
    families = {adapter.family} if adapter.family is not None else adapter.families
    if not wanted:
        return "unet" if families & _WITH_UNET else "model"
    if "unet" in wanted:  # the dialects say unet of every denoiser
        return "unet" if not families or families & _WITH_UNET else "transformer"
    return wanted[0]


def block_of(module: Module) -> str:
    """The block of its component that `module` is in; its whole path where that has no number."""
    path = module.readings[0].path
    found = _BLOCK.match(path)
    return path if found is None else found[0]


def in_order(name: str) -> tuple[bool, tuple[tuple[bool, int, str], ...]]:
    """Sort key for components and blocks: text encoders last, numbers by their size."""
    pieces = re.split(r"(\d{1,9})", name)
    numbers = ((True, int(piece), "") if piece.isdecimal() else (False, 0, piece) for piece in pieces)
    return bool(_TEXT_ENCODER.fullmatch(name)), tuple(numbers)
