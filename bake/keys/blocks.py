"""Which block of its model a tensor belongs to, in the names that block weights are written with.

A UNet has the blocks that A1111's users know: IN00 to IN11, M00, OUT00 to OUT11, whichever layout it is
stored in. Other models have numbered blocks: D and S for the double and single streams of Flux and its kin,
L wherever there is one stack of layers. docs/blocks.md has the whole table. Sources: supermerger
scripts/mergers/mergers.py blockfromkey, meh sd_meh/merge.py, sd-mecha convert_sd*_blocks.py, kohya
networks/svd_merge_lora.py get_lbw_block_index, sd-webui-lora-block-weight scripts/lora_block_weight.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from bake.keys import unet
from bake.keys.modules import Component, split_by_component
from bake.keys.places import split_parameter


class Block(NamedTuple):
    """Where in its model a tensor lies."""

    name: str  # IN04, M00, OUT11, D07, L31; TIME, LABEL, OUT, IN, BASE, CLIP, T5, TE, VAE, OTHER
    fine: str  # supermerger's extended name inside SDXL, IN410; elsewhere the same as `name`


# Stacks of numbered blocks by naming: (what their names begin with, letters of the block). Both layouts of a family
# number alike; their names differ.
_TWO_STREAMS = (
    ("double_blocks", "D"),
    ("transformer_blocks", "D"),
    ("single_blocks", "S"),
    ("single_transformer_blocks", "S"),
)
_REFINED = (("layers", "L"), ("noise_refiner", "NOISE"), ("context_refiner", "CONT"))
_STACKS: dict[str, tuple[tuple[str, str], ...]] = {
    "flux": _TWO_STREAMS,
    "flux2": _TWO_STREAMS,
    "chroma": _TWO_STREAMS,
    "hunyuan-video": _TWO_STREAMS,
    "auraflow": (
        *(("double_layers", "D"), ("joint_transformer_blocks", "D")),
        *(("single_layers", "S"), ("single_transformer_blocks", "S")),
    ),
    "sd3": (("joint_blocks", "L"), ("transformer_blocks", "L")),
    "pixart": (("blocks", "L"), ("transformer_blocks", "L")),
    "sana": (("blocks", "L"), ("transformer_blocks", "L")),
    "mochi": (("blocks", "L"), ("transformer_blocks", "L")),
    "wan": (("blocks", "L"), ("vace_blocks", "VACE")),
    "lumina2": _REFINED,
    "z-image": _REFINED,
    "qwen-image": (("transformer_blocks", "L"),),
    "ltxv": (("transformer_blocks", "L"),),
}
# What comes after the last block, in any of these families; everything else outside the blocks comes before them.
_ENDS = (
    *("final_layer", "all_final_layer", "final_linear", "norm_final", "norm_out", "proj_out"),
    *("head", "modF", "scale_shift_table", "clf"),
)
# The same for language models: the last part of a module's name.
_LAST_LEAVES = {
    *("norm", "norm_f", "ln_f", "layer_norm", "final_layer_norm", "final_layernorm"),
    *("lm_head", "embed_out", "output", "score", "classifier", "pooler"),
}
_LDM = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.|(middle_block|time_embed|label_emb|out)\.")
_LDM_NAMES = {"middle_block": "M00", "time_embed": "TIME", "label_emb": "LABEL", "out": "OUT"}
_SIDES = {"input_blocks": "IN", "output_blocks": "OUT"}
_INSIDE = re.compile(r"(?:input_blocks|output_blocks|middle_block)\.(\d+)(?:\.(\d+))?")
_TRANSFORMER = re.compile(r"\.transformer_blocks\.(\d+)\.")
_CASCADE = re.compile(r"(down|up)_\w+\.(\d+)\.")
_LAYER = re.compile(r"(?:(.*?)\.)?(?:layers?|h|blocks?|transformer_blocks|resblocks)\.(\d+)(?:\.|$)")
_TOWERS = (("vis", "V"), ("audio", "A"))  # what the name of a further stack says -> its letter
_NUMBERED = re.compile(r"([A-Z]+?)(\d{2,})")
_IN_SEQUENCE = (("IN", "M", "OUT"), ("D", "S"), ("NOISE", "CONT", "L"))  # data goes through one after the other

_UNETS = {"ldm unet", "diffusers unet"}
_MODELS = {"unet", "transformer", "model"}  # components that have blocks of their own in models bake does not know


def blocks_of(components: Sequence[Component], names: Iterable[str]) -> dict[str, Block]:
    """full tensor name -> its block, for all tensors of a base that has `components`."""
    has_unet = any(component.naming in _UNETS for component in components)
    found = dict.fromkeys(names, _plain("OTHER"))
    for component, owned in split_by_component(components, found):
        paths = {name: name[len(component.prefix) :] for name in owned}
        block_of = _rule_for(component, has_unet, paths.values())
        found.update((name, block_of(path)) for name, path in paths.items())
    return found


def _rule_for(component: Component, has_unet: bool, paths: Iterable[str]) -> Callable[[str], Block]:
    """What tells the block of a tensor of `component` by its name below the component's prefix."""
    if component.name.startswith("te"):
        return _always(_text_encoder(component, has_unet))
    if component.naming in _UNETS:
        return _unet_rule(paths)
    if component.naming in _STACKS:
        return lambda path: _plain(_in_stack(path, _STACKS[component.naming]))
    if component.naming == "stable-cascade":
        return lambda path: _plain(_in_cascade(path))
    if component.name in _MODELS:
        return _layer_rule(paths)
    return _always(_plain("VAE" if component.name == "vae" else "OTHER"))


def _plain(name: str) -> Block:
    return Block(name, name)


def _always(block: Block) -> Callable[[str], Block]:
    return lambda path: block


def _text_encoder(component: Component, has_unet: bool) -> Block:
    if has_unet:
        return Block("BASE", "CLIPG" if component.name == "te2" else "CLIPL")
    return _plain({"hf clip": "CLIP", "openclip": "CLIP", "t5": "T5"}.get(component.naming, "TE"))


def _unet_rule(paths: Iterable[str]) -> Callable[[str], Block]:
    """The rule of one UNet: which diffusers block is which original one follows from all of its names."""
    original = original_names(paths)

    def block_of(path: str) -> Block:
        ldm = original.get(path, path)
        found = _LDM.match(ldm)
        if found is None:
            return _plain("OTHER")
        name = _LDM_NAMES[found[3]] if found[3] else f"{_SIDES[found[1]]}{int(found[2]):02d}"
        return Block(name, _fine(name, ldm))

    return block_of


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """path of a tensor of a UNet in diffusers names -> its path in the original names; {} if it has those already."""
    modules = {path: split_parameter(path)[0] for path in paths}
    if any(module.startswith("input_blocks.") for module in modules.values()):
        return {}
    other = unet.translate(dict.fromkeys(modules.values()))
    return {
        path: other[module] + path[len(module) :] for path, module in modules.items() if other.get(module, "") != ""
    }


def _fine(name: str, ldm: str) -> str:
    """supermerger's extended name: block, place in it, and number of the transformer block: IN4 1 0."""
    if name == "OUT":
        return "OUT9"
    inside = _INSIDE.match(ldm)
    if inside is None:
        return name
    transformer = _TRANSFORMER.search(ldm)
    depth = transformer[1] if transformer is not None else ""
    if name == "M00":
        return f"MID{inside[1]}0{depth}"
    return f"{name.rstrip('0123456789')}{inside[1]}{inside[2] or ''}{depth}"


def _in_stack(path: str, stacks: Iterable[tuple[str, str]]) -> str:
    """The block of a tensor of a diffusion transformer."""
    first, _, rest = path.partition(".")
    number = rest.partition(".")[0]
    for stack, letters in stacks:
        if first == stack and number.isdecimal():
            return f"{letters}{int(number):02d}"
    return "OUT" if first in _ENDS else "IN"


def _in_cascade(path: str) -> str:
    """The block of a tensor of Stable Cascade: one for each resolution, on the way down and up."""
    found = _CASCADE.match(path)
    if found is not None:
        return f"{'IN' if found[1] == 'down' else 'OUT'}{int(found[2]):02d}"
    return "OUT" if path.partition(".")[0] in _ENDS else "IN"


def _layer_rule(paths: Iterable[str]) -> Callable[[str], Block]:
    """The rule of a language model, or of anything else that numbers its layers."""
    stacks = {found[1] or "" for found in map(_LAYER.match, paths) if found is not None}
    has_both = any("encoder" in stack for stack in stacks) and any("decoder" in stack for stack in stacks)

    def block_of(path: str) -> Block:
        found = _LAYER.match(path)
        if found is None:
            parts = split_parameter(path)[0].split(".")
            return _plain("OUT" if _LAST_LEAVES & {parts[-1], *parts[-2:-1]} else "IN")
        stack = found[1] or ""
        letter = next((letter for word, letter in _TOWERS if word in stack), None)
        if letter is None:
            letter = ("E" if "encoder" in stack else "D") if has_both else "L"
        return _plain(f"{letter}{int(found[2]):02d}")

    return block_of


def order_of(blocks: Iterable[str]) -> list[str]:
    """Block names in the order of the data: text encoders, what comes before the blocks, the blocks, what follows."""
    return sorted(dict.fromkeys(blocks), key=_place)


_ORDER = (
    *("BASE", "CLIP", "T5", "TE", "TIME", "LABEL", "V", "A", "IN", "NOISE", "CONT", "VACE"),
    *("E", "D", "S", "L", "M", "OUT", "VAE", "OTHER"),
)


def _place(block: str) -> tuple[int, int]:
    """Sort key of `order_of`."""
    stack, number = split_number(block)
    # "IN" alone comes before IN00, "OUT" alone after OUT11
    last = -1 if stack == "IN" else 1 << 30
    return _ORDER.index(stack), last if number is None else number


def split_number(block: str) -> tuple[str, int | None]:
    """(letters, number) of a block; the number is None where it has none."""
    found = _NUMBERED.fullmatch(block)
    return (block, None) if found is None else (found[1], int(found[2]))


def depths(blocks: Iterable[str]) -> dict[str, float]:
    """Numbered block -> how deep it lies in its model, from 0 for the first to 1 for the last.

    Source: mergekit plan.py plan_slice; the two streams of Flux, the sides of a UNet, and
    refiners with the layers behind them count as one depth.
    """
    sequences: dict[tuple[str, ...], list[str]] = {}
    for block in order_of(blocks):
        stack, number = split_number(block)
        if number is not None:
            sequence = next((several for several in _IN_SEQUENCE if stack in several), (stack,))
            sequences.setdefault(sequence, []).append(block)
    return dict(_spread(sequences.values()))


def _spread(sequences: Iterable[Sequence[str]]) -> Iterator[tuple[str, float]]:
    for sequence in sequences:
        for place, block in enumerate(sequence):
            yield block, place / (len(sequence) - 1) if len(sequence) > 1 else 1.0


def _numbered(letters: str, count: int) -> tuple[str, ...]:
    return tuple(f"{letters}{number:02d}" for number in range(count))


# Lists of values that people write: how many, for which blocks in order.
_FULL = ("BASE", *_numbered("IN", 12), "M00", *_numbered("OUT", 12))
_FULL_XL = ("BASE", *_numbered("IN", 9), "M00", *_numbered("OUT", 9))
_LORA = ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *_numbered("OUT", 12)[3:])
_LORA_XL = ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *_numbered("OUT", 6))
_FLUX = ("CLIP", "T5", "IN", *_numbered("D", 19), *_numbered("S", 38), "OUT")


def _extended() -> Iterator[str]:
    """The names of supermerger's 110 values for SDXL. IN0 is a place in the list that no tensor has."""
    yield from ("CLIPL", "CLIPG", "IN0")
    inside = {"IN4": 2, "IN5": 2, "IN7": 10, "IN8": 10, "OUT0": 10, "OUT1": 10, "OUT2": 10, "OUT3": 2, "OUT4": 2}
    inside["OUT5"] = 2
    for side in ("IN", "MID", "OUT"):
        for number in range(9 if side != "MID" else 3):
            block = f"{side}{number}"
            if side == "MID":
                yield f"{block}0"
                yield from (f"{block}0{depth}" for depth in range(10) if number == 1)
                continue
            yield f"{block}0"
            if block in inside:
                yield f"{block}1"
                yield from (f"{block}1{depth}" for depth in range(inside[block]))
            if block in ("OUT2", "OUT5"):  # the upsamplers
                yield f"{block}2"
    yield from ("OUT9", "TIME", "LABEL", "VAE")


_SD = {17: _LORA, 25: _FULL[1:], 26: _FULL}
LISTS: dict[str, dict[int, tuple[str, ...]]] = {
    "sd1": _SD,
    "sd2": _SD,
    "sdxl": {
        **{12: _LORA_XL, 19: _FULL_XL[1:], 20: _FULL_XL, 21: (*_FULL_XL, "VAE")},
        # Values for SD1 leave out what SDXL has not; supermerger weighttoxl.
        **{25: _FULL[1:], 26: _FULL, 110: tuple(_extended())},
    },
    "sdxl-refiner": {25: _FULL[1:], 26: _FULL},  # four levels, as SD1, but attention elsewhere
    "flux": {61: _FLUX},
}
EXTENDED = 110  # values that are for `Block.fine`

FULL = "full"  # in a scheme: at full ratio, whatever a list says


class Scheme(NamedTuple):
    """Whose reading of a list: what becomes of tensors that are in none of the blocks the list names."""

    homes: Mapping[str, str]  # block -> the one whose value counts for it, or FULL
    unnamed: float  # ratio of blocks that a list has no value for


_LAST = "last OUT"  # the last of the OUT blocks
_SUPERMERGER = {"TIME": "IN00", "LABEL": "IN00", "OUT": _LAST}
_SCHEMES: dict[str, Scheme] = {
    "bake": Scheme(_SUPERMERGER, 0.0),
    "supermerger": Scheme({**_SUPERMERGER, "VAE": "BASE", "OTHER": "BASE"}, 0.0),
    "mecha": Scheme({"TIME": "BASE", "LABEL": "BASE", "OUT": _LAST, "VAE": "BASE", "OTHER": "BASE"}, 0.0),
    "webui": Scheme({"TIME": FULL, "LABEL": FULL, "OUT": FULL}, 0.0),
    "kohya": Scheme({"TIME": FULL, "LABEL": FULL, "OUT": FULL, "IN00": FULL}, 1.0),
}
_OF_SDXL = {  # where the same tool does it differently
    "mecha": {"TIME": "BASE", "LABEL": "BASE", "OUT": _LAST, "OTHER": "BASE"},
    "kohya": {"TIME": "IN00", "LABEL": "IN00", "OUT": FULL},
}
SCHEMES = tuple(_SCHEMES)


def scheme_for(name: str, family: str) -> Scheme:
    """The scheme `name`, one of SCHEMES, as it is for a family of UNets; for other families it says nothing."""
    if family not in LISTS or family == "flux":
        return Scheme({}, _SCHEMES[name].unnamed)
    scheme = _SCHEMES[name]
    homes = _OF_SDXL.get(name, scheme.homes) if family == "sdxl" else scheme.homes
    last = "OUT08" if family == "sdxl" else "OUT11"
    return Scheme({block: last if home == _LAST else home for block, home in homes.items()}, scheme.unnamed)
