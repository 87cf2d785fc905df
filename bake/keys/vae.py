"""The autoencoder of Stable Diffusion, SDXL, SD3 and Flux: original (LDM) names <-> diffusers names.

The two number the levels of the decoder from opposite ends. Projections of the attention block are convolutions of
one element in the original and Linear layers in diffusers: the same rows of the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from bake.keys import tables
from bake.keys.places import Parameters
from bake.keys.tables import Layout, Row, Table, same, within

_RESNET = (same("norm1"), same("conv1"), same("norm2"), same("conv2"), same("nin_shortcut", "conv_shortcut"))
_ATTENTION = (  # the second name: diffusers before 0.17
    same("norm", "group_norm"),
    same("q", "to_q query"),
    same("k", "to_k key"),
    same("v", "to_v value"),
    same("proj_out", "to_out.0 proj_attn"),
)


def _half(name: str, side: str) -> tuple[Row, ...]:
    """The encoder or the decoder, whose levels go `side`, down or up."""
    return within(
        *(name, name),
        *within(f"{side}.#.block.#", f"{side}_blocks.#.resnets.#", *_RESNET),
        same(f"{side}.#.{side}sample.conv", f"{side}_blocks.#.{side}samplers.0.conv"),
        *within("mid.block_1", "mid_block.resnets.0", *_RESNET),
        *within("mid.attn_1", "mid_block.attentions.0", *_ATTENTION),
        *within("mid.block_2", "mid_block.resnets.1", *_RESNET),
        same("norm_out", "conv_norm_out"),
    )


_VAE = Table(*_half("encoder", "down"), *_half("decoder", "up"))
_LEVEL = re.compile(r"decoder\.up\.(\d+)\.")
_PROJECTION = re.compile(
    r".*\.(attn_1|attentions\.0)\.(q|k|v|proj_out|to_[qkv]|to_out\.0|to_out|query|key|value|proj_attn)"
)
_ANY_LEVEL = re.compile(r"decoder\.up(?:_blocks)?\.(\d+)\.")


def aliases(modules: Mapping[str, Parameters], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameters]:
    """The other spellings of an autoencoder's modules, whichever of the two layouts `modules` are in."""
    last = _last_level(modules)
    found = tables.aliases(_VAE, {_turned(path, last): each for path, each in modules.items()}, shapes)
    others = {_turned(path, last): parameters for path, parameters in found.items()}
    return {path: parameters for path, parameters in others.items() if path not in modules}


def in_layout(
    modules: Mapping[str, Parameters], shapes: Mapping[str, tuple[int, ...]], layout: Layout
) -> dict[str, Parameters]:
    """An autoencoder's modules by their names in one layout, whichever of the two they are in."""
    last = _last_level(modules)
    found = tables.in_layout(_VAE, {_turned(path, last): each for path, each in modules.items()}, shapes, layout)
    return {_turned(path, last): parameters for path, parameters in found.items()}


def is_projection(path: str) -> bool:
    """True for a projection of an attention block, by any of its names."""
    return _PROJECTION.fullmatch(path) is not None


def _last_level(modules: Iterable[str]) -> int:
    return max((int(found[1]) for found in map(_ANY_LEVEL.match, modules) if found is not None), default=0)


def _turned(path: str, last: int) -> str:
    """An original name with the decoder's levels counted from the other end."""
    found = _LEVEL.match(path)
    return path if found is None else f"decoder.up.{last - int(found[1])}.{path[found.end() :]}"
