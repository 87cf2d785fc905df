"""Small bases and adapters on disk, with independent float64 answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from layouts import stored_dtype
from names import small
from numpy.typing import NDArray
from support import Arrays, lora_delta, random, save

UNET = "model.diffusion_model."
# Pairs written down by hand: what kohya calls a module, and where it is in an SD1 checkpoint.
SD1_MODULES = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (
        UNET + "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    ),
    "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj": (
        UNET + "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight"
    ),
    "lora_unet_mid_block_attentions_0_proj_in": UNET + "middle_block.1.proj_in.weight",
    "lora_unet_down_blocks_0_resnets_0_conv1": UNET + "input_blocks.1.0.in_layers.2.weight",
    "lora_unet_up_blocks_0_upsamplers_0_conv": UNET + "output_blocks.2.1.conv.weight",
    "lora_te_text_model_encoder_layers_11_mlp_fc2": (
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight"
    ),
}


def random_arrays(shapes: Mapping[str, tuple[int, ...]], dtype: Any = np.float16) -> Arrays:
    """Values for every tensor; integers where a checkpoint has integers."""
    arrays: Arrays = {}
    for place, (name, shape) in enumerate(shapes.items()):
        kind = {"I64": np.int64, "I32": np.int32}.get(stored_dtype(name), dtype)
        values = random(place, *shape, spread=0.05)
        arrays[name] = (
            np.arange(values.size).reshape(shape).astype(kind)
            if kind in (np.int64, np.int32)
            else (np.asarray(values).astype(kind))
        )
    return arrays


def save_base(path: Path, family: str = "sd1", dtype: Any = np.float16, **changed: NDArray[Any]) -> Path:
    """A checkpoint of `family` in the original layout."""
    return save(path, random_arrays(small(family), dtype) | changed, {"format": "pt"})


def lora_factors(
    shape: tuple[int, ...], rank: int = 2, seed: int = 0, dtype: Any = np.float16
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(up, down) for a tensor of `shape`, laid out as kohya does."""
    up = random(seed, shape[0], rank, *(1,) * (len(shape) - 2), spread=0.2).astype(dtype)
    down = random(seed + 1, rank, *shape[1:], spread=0.2).astype(dtype)
    return up, down


def kohya_lora(
    shapes: Mapping[str, tuple[int, ...]],
    modules: Mapping[str, str] = SD1_MODULES,
    alpha: float | None = 1.0,
    rank: int = 2,
    seed: int = 0,
) -> tuple[Arrays, dict[str, NDArray[np.float64]]]:
    """(adapter, tensor name -> float64 update at weight 1) for modules given as kohya name -> tensor name."""
    arrays: Arrays = {}
    deltas: dict[str, NDArray[np.float64]] = {}
    for place, (module, tensor) in enumerate(modules.items()):
        up, down = lora_factors(shapes[tensor], rank, seed + 10 * place)
        arrays[f"{module}.lora_up.weight"], arrays[f"{module}.lora_down.weight"] = up, down
        scale = 1.0
        if alpha is not None:
            arrays[f"{module}.alpha"] = np.array(alpha, np.float16)
            scale = alpha / rank
        deltas[tensor] = scale * lora_delta(up, down).reshape(shapes[tensor])
    return arrays, deltas


def sd1_pair(folder: Path, **options: Any) -> tuple[Path, Path, dict[str, NDArray[np.float64]]]:
    """(base, kohya LoRA, updates by tensor name)."""
    base = save_base(folder / "base.safetensors")
    arrays, deltas = kohya_lora(small("sd1"), **options)
    return base, save(folder / "style.safetensors", arrays), deltas


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> Path:
    """A checkpoint of any size, written tensor by tensor: the values of one pool, over and over."""
    from bake.io.header import build_header, lay_out

    special = {name: stored_dtype(name) for name in shapes if stored_dtype(name) != "F16"}
    placed = lay_out((name, special.get(name, dtype), shape) for name, shape in shapes.items())
    pool = random(0, 4_194_301, spread=0.02).astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()
    with path.open("wb") as file:
        file.write(build_header(placed, {"format": "pt"}))
        for name, info in placed.items():
            if name in special:
                file.write(
                    np.arange(info.nbytes // (8 if info.dtype == "I64" else 4))
                    .astype(np.int64 if info.dtype == "I64" else np.int32)
                    .tobytes()
                )
                continue
            left = info.nbytes
            while left:
                left -= file.write(pool[:left])
    return path


def llama(layers: int = 2, width: int = 8) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small Llama."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16, width), "lm_head.weight": (16, width)}
    for layer in range(layers):
        for projection, height in (("q", width), ("k", width // 2), ("v", width // 2), ("o", width)):
            shapes[f"model.layers.{layer}.self_attn.{projection}_proj.weight"] = (height, width)
        for projection, shape in (("gate", (20, width)), ("up", (20, width)), ("down", (width, 20))):
            shapes[f"model.layers.{layer}.mlp.{projection}_proj.weight"] = shape
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (width,)
    return shapes | {"model.norm.weight": (width,)}


def peft_lora(
    shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[str], rank: int = 2, prefix: str = "base_model.model."
) -> Arrays:
    """LoRA factors in PEFT's names, without a scale of their own."""
    arrays: Arrays = {}
    for place, tensor in enumerate(tensors):
        up, down = lora_factors(shapes[tensor], rank, 100 * place, np.float32)
        module = prefix + tensor.removesuffix(".weight")
        arrays[f"{module}.lora_A.weight"], arrays[f"{module}.lora_B.weight"] = down, up
    return arrays
