"""Small models with scaled fp8 layers, as ComfyUI reads them, made with torch alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support import save_torch
from torch import Tensor

SHAPES = {
    "blocks.0.attn.q.weight": (8, 16),
    "blocks.1.mlp.weight": (16, 8),
    "blocks.2.mlp.weight": (8, 8),
}
PLAIN = {
    "img_in.weight": (8, 4),
    "blocks.0.norm.weight": (8,),
    "blocks.0.attn.q.bias": (8,),
    "blocks.0.conv.weight": (4, 4, 3, 3),
}
TOUCHED = ("blocks.0.attn.q.weight", "blocks.1.mlp.weight")
FP8 = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def values(seed: int, *shape: int, spread: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * spread


def plain_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {name: values(place, *shape).to(dtype) for place, (name, shape) in enumerate({**SHAPES, **PLAIN}.items())}


def quantised(weight: Tensor, kind: str = "e4m3fn", by_row: bool = False) -> tuple[Tensor, Tensor]:
    """(elements, scale), as ComfyUI's converters make them."""
    largest = torch.finfo(FP8[kind]).max
    size = weight.float().abs().amax(1, keepdim=True) if by_row else weight.float().abs().amax()
    scale = size / largest
    return (weight.float() / scale).clamp(-largest, largest).to(FP8[kind]), scale


def scaled_base(
    path: Path, new: bool, kind: str = "e4m3fn", by_row: bool = False, in_metadata: bool = False, prefix: str = ""
) -> Path:
    """A base whose blocks are scaled fp8, of either generation."""
    tensors = plain_tensors()
    layers: dict[str, Any] = {}
    for name in SHAPES:
        layer = name.removesuffix(".weight")
        tensors[name], scale = quantised(tensors[name], kind, by_row)
        tensors[f"{layer}.{'weight_scale' if new else 'scale_weight'}"] = scale
        tensors[f"{layer}.{'input_scale' if new else 'scale_input'}"] = torch.tensor(0.5)
        settings = {"format": f"float8_{kind}"}
        if new and not in_metadata:
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
        layers[prefix + layer] = settings
    if not new:
        tensors["scaled_fp8"] = torch.zeros(2).to(FP8[kind])
    listed = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if in_metadata else {}
    return save_torch(path, {prefix + name: tensor for name, tensor in tensors.items()}, {"format": "pt", **listed})


def weights(path: Path) -> dict[str, Tensor]:
    """The weights of a model as ComfyUI would use them, in float64, with nothing left beside them.

    Old files are first renamed to new ones, as its convert_old_quants does.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((".weight_scale", ".scale_weight", ".input_scale", ".scale_input", ".comfy_quant")):
            continue
        if name.rpartition(".")[2] == "scaled_fp8":
            continue
        layer = name.removesuffix(".weight")
        scale = tensors.get(f"{layer}.weight_scale", tensors.get(f"{layer}.scale_weight"))
        found[name] = tensor.double() if scale is None or name == layer else tensor.double() * scale.double()
    return found
