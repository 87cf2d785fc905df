"""The order in which cloneofsimo/lora numbers modules: the original LoRA work for Stable Diffusion.

Its files name no modules, they count them: for each block that holds attention, the Linear layers
below it in the order in which diffusers registered them then (0.16 and before). In a UNet that is
all down blocks, all up blocks, the mid block last; inside a block the attentions, then, in the
extended mode, the resnets. Checked against the shapes of two published files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_TRANSFORMER = re.compile(
    r"(?P<block>(?P<side>down|up|mid)_block(?:s\.(?P<level>\d{1,4}))?)"
    r"\.attentions\.(?P<attention>\d{1,4})\.transformer_blocks\.(?P<depth>\d{1,4})\.attn1\.to_q"
)
_RESNET = re.compile(
    r"(?P<block>(?P<side>down|up|mid)_block(?:s\.(?P<level>\d{1,4}))?)\.resnets\.(?P<resnet>\d{1,4})"
    r"\.(?P<leaf>conv1|time_emb_proj|conv2|conv_shortcut)"
)
_LAYER = re.compile(r"(?P<layer>(?:text_model\.)?encoder\.layers\.(?P<number>\d{1,4}))\.self_attn\.k_proj")
_SIDES = {"down": 0, "up": 1, "mid": 2}
_RESNET_ORDER = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")

_FIRST = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
_SECOND = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
_GATE = ("ff.net.0.proj",)


def unet_order(paths: Iterable[str], count: int, gate_is_fifth: bool) -> list[str]:
    """The dotted diffusers paths of modules 0 .. count - 1 of a UNet; [] if no known order has that many.

    paths: all module paths of the UNet, diffusers spelling among them.
    gate_is_fifth: item 4 is the wide feed-forward projection, as its shape shows; newer diffusers
    registered it after both attentions.
    """
    paths = list(paths)
    blocks: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    for path in paths:
        found = _TRANSFORMER.fullmatch(path)
        if found is not None:
            stem = path.removesuffix(".attn1.to_q")
            place = (_SIDES[found["side"]], int(found["level"] or 0))
            blocks.setdefault(place, []).append((int(found["attention"]), int(found["depth"]), stem))
    with_gate = (*_FIRST, *_GATE, *_SECOND) if gate_is_fifth else (*_FIRST, *_SECOND, *_GATE)
    resnets = _resnets(paths)
    for leaves, extended in (((*_FIRST, *_SECOND), False), (with_gate, False), (with_gate, True)):
        order: list[str] = []
        for place in sorted(blocks.keys() | (resnets.keys() if extended else set())):
            for _, _, stem in sorted(blocks.get(place, [])):
                order += [f"{stem}.{leaf}" for leaf in leaves]
            order += resnets.get(place, []) if extended else []
        if len(order) == count:
            return order
    return []


def _resnets(paths: list[str]) -> dict[tuple[int, int], list[str]]:
    found: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    for path in paths:
        match = _RESNET.fullmatch(path)
        if match is not None:
            place = (_SIDES[match["side"]], int(match["level"] or 0))
            entry = (int(match["resnet"]), _RESNET_ORDER.index(match["leaf"]), path)
            found.setdefault(place, []).append(entry)
    return {place: [path for _, _, path in sorted(entries)] for place, entries in found.items()}


def text_encoder_order(paths: Iterable[str], count: int) -> list[str]:
    """The dotted paths of modules 0 .. count - 1 of a CLIP text encoder; [] if there are not that many."""
    layers: dict[int, str] = {}
    for path in paths:
        found = _LAYER.fullmatch(path)
        if found is not None:
            layers[int(found["number"])] = found["layer"]
    order = [
        f"{layers[number]}.self_attn.{projection}"
        for number in sorted(layers)
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    return order if len(order) == count else []
