"""The UNet of Stable Diffusion 1, 2 and XL: original (LDM) names <-> diffusers names.

Which block is which follows from the names present, not from a fixed count: distilled and pruned
models have fewer blocks and the same rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from bake.keys.places import Parameters

# Outside the blocks.      LDM                 diffusers
_FIXED = (
    ("input_blocks.0.0", "conv_in"),
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),  # SDXL
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
    ("middle_block.0", "mid_block.resnets.0"),
    ("middle_block.1", "mid_block.attentions.0"),
    ("middle_block.2", "mid_block.resnets.1"),
)
# Inside a resnet. Attention blocks are spelled alike in both.
_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)

_SAMPLERS = {"op", "conv"}  # the convolution of an LDM downsampler, of an upsampler

_LDM_BLOCK = re.compile(r"(input|output)_blocks\.(\d{1,4})\.(\d{1,4})\.(\w+)")
_DIFFUSERS_BLOCK = re.compile(r"(down|up)_blocks\.(\d{1,4})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,4})")
# Attention projections had a processor of their own, and "to_out" no index, in diffusers before 0.18.
_PROJECTION = re.compile(r"(.+\.attn\d)\.(to_[qkv]|to_out\.0)")


def aliases(modules: Mapping[str, Parameters], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameters]:
    """The other spellings of a UNet's modules, whichever of the two layouts `modules` are in."""
    renamed = translate(modules)
    found = {other: modules[module] for module, other in renamed.items() if other != module}
    for path, parameters in [*modules.items(), *found.items()]:
        projection = _PROJECTION.fullmatch(path)
        if projection is not None:
            attention, leaf = projection[1], projection[2].removesuffix(".0")
            found[f"{attention}.{leaf}"] = parameters
            found[f"{attention}.processor.{leaf}"] = parameters
    return {alias: parameters for alias, parameters in found.items() if alias not in modules}


def translate(modules: Iterable[str]) -> dict[str, str]:
    """module -> its name in the other layout, for every module that has one."""
    modules = list(modules)
    blocks = _blocks_of_ldm(modules) if is_ldm(modules) else _blocks_of_diffusers(modules)
    to_diffusers = is_ldm(modules)
    resnet = dict(_RESNET) if to_diffusers else {diffusers: ldm for ldm, diffusers in _RESNET}
    fixed = dict(_FIXED) if to_diffusers else {diffusers: ldm for ldm, diffusers in _FIXED}
    renamed = {}
    for module in modules:
        if module in fixed:
            renamed[module] = fixed[module]
            continue
        block, rest = _split_block(module, blocks, fixed)
        if block is not None:
            renamed[module] = f"{block}.{resnet.get(rest, rest)}" if rest else block
    return renamed


class _Structure(NamedTuple):
    """What decides the names of a family's UNet."""

    depths: tuple[int, ...]  # transformer blocks per attention, level by level; 0: no attention
    middle: int


_STRUCTURES = {
    "sd1": _Structure((1, 1, 1, 0), 1),
    "sd2": _Structure((1, 1, 1, 0), 1),
    "sdxl": _Structure((0, 2, 10), 10),
    "sdxl-refiner": _Structure((0, 4, 4, 0), 4),
}
_LAYERS = ("proj_in", "proj_out", "norm")
_BLOCK_LAYERS = (
    *(f"attn{number}.to_{leaf}" for number in (1, 2) for leaf in ("q", "k", "v", "out.0")),
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
)


def published_modules(family: str) -> tuple[str, ...]:
    """The modules of the published UNet of `family`, in LDM names; () for what is no UNet.

    Smaller models of the family leave blocks out and call the others the same.
    """
    if family not in _STRUCTURES:
        return ()
    depths, middle = _STRUCTURES[family]
    blocks = [("middle_block.0", None), ("middle_block.1", middle), ("middle_block.2", None)]
    number = 0
    samplers = []
    for level, depth in enumerate(depths):
        for _ in range(2):
            number += 1
            blocks += [(f"input_blocks.{number}.0", None), (f"input_blocks.{number}.1", depth)]
        if level < len(depths) - 1:
            number += 1
            samplers.append(f"input_blocks.{number}.0.op")
    for place, depth in enumerate(reversed(depths)):
        for each in range(3):
            blocks += [(f"output_blocks.{3 * place + each}.0", None), (f"output_blocks.{3 * place + each}.1", depth)]
        if place < len(depths) - 1:
            samplers.append(f"output_blocks.{3 * place + 2}.{2 if depth else 1}.conv")
    outside = tuple(ldm for ldm, _ in _FIXED if not ldm.startswith("middle_block"))
    return (*outside, *samplers, *(module for block, depth in blocks for module in _inside(block, depth)))


def _inside(block: str, depth: int | None) -> Iterable[str]:
    """The modules of a resnet (depth None) or of an attention with `depth` transformer blocks, in LDM names."""
    if depth is None:
        yield from (f"{block}.{ldm}" for ldm, _ in _RESNET)
    elif depth:
        yield from (f"{block}.{layer}" for layer in _LAYERS)
        for number in range(depth):
            yield from (f"{block}.transformer_blocks.{number}.{layer}" for layer in _BLOCK_LAYERS)


def is_ldm(modules: Iterable[str]) -> bool:
    """True if these are a UNet's modules in LDM names."""
    return any(module.startswith(("input_blocks.", "middle_block.")) for module in modules)


def _split_block(module: str, blocks: Mapping[str, str], fixed: Mapping[str, str]) -> tuple[str | None, str]:
    """(translated block, rest of the name) for the block that `module` lies in."""
    parts = module.split(".")
    for count in range(len(parts), 1, -1):
        head = ".".join(parts[:count])
        block = blocks.get(head) or fixed.get(head)
        if block is not None:
            return block, ".".join(parts[count:])
    return None, ""


def _blocks_of_ldm(modules: list[str]) -> dict[str, str]:
    """LDM block -> diffusers block, by walking the numbered blocks in order."""
    inside: dict[tuple[str, int], dict[int, set[str]]] = {}
    for module in modules:
        found = _LDM_BLOCK.match(module)
        if found is not None:
            slots = inside.setdefault((found[1], int(found[2])), {})
            slots.setdefault(int(found[3]), set()).add(found[4])
    blocks = {}
    for side, theirs in (("input", "down"), ("output", "up")):
        level = resnet = 0
        for number in sorted(number for section, number in inside if section == side):
            ended = False
            for slot, children in sorted(inside[side, number].items()):
                here = f"{side}_blocks.{number}.{slot}"
                if "in_layers" in children:
                    blocks[here] = f"{theirs}_blocks.{level}.resnets.{resnet}"
                elif "proj_in" in children:
                    blocks[here] = f"{theirs}_blocks.{level}.attentions.{resnet}"
                elif children & _SAMPLERS:
                    (leaf,) = children
                    blocks[f"{here}.{leaf}"] = f"{theirs}_blocks.{level}.{theirs}samplers.0.conv"
                    ended = True
            resnet += 1
            if ended:
                level, resnet = level + 1, 0
    return blocks


def _blocks_of_diffusers(modules: list[str]) -> dict[str, str]:
    """diffusers block -> LDM block: the same walk from the other side."""
    inside: dict[tuple[str, int], dict[str, set[int]]] = {}
    for module in modules:
        found = _DIFFUSERS_BLOCK.match(module)
        if found is not None:
            inside.setdefault((found[1], int(found[2])), {}).setdefault(found[3], set()).add(int(found[4]))
    blocks = {}
    number = 1  # input_blocks.0 is conv_in
    for level in sorted(level for side, level in inside if side == "down"):
        parts = inside["down", level]
        for resnet in sorted(parts.get("resnets", ())):
            blocks[f"down_blocks.{level}.resnets.{resnet}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{level}.attentions.{resnet}"] = f"input_blocks.{number}.1"
            number += 1
        if "downsamplers" in parts:
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for level in sorted(level for side, level in inside if side == "up"):
        parts = inside["up", level]
        for resnet in sorted(parts.get("resnets", ())):
            blocks[f"up_blocks.{level}.resnets.{resnet}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{level}.attentions.{resnet}"] = f"output_blocks.{number}.1"
            number += 1
        if "upsamplers" in parts:
            slot = 2 if "attentions" in parts else 1
            blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{slot}.conv"
    return blocks
