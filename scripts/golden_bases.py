"""The bases of the golden cases: real tensor names of a few blocks, at widths of 4 to 16, in float16.

Only what recognises a family and what an adapter of the cases updates is there, and something of
every other kind (a VAE, an integer) that has to come through untouched.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shapes = dict[str, tuple[int, ...]]
Arrays = dict[str, "NDArray[Any]"]

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer."
_BLOCK = "input_blocks.1.1."
_INTEGERS = ("position_ids", "num_updates")


@dataclass(frozen=True)
class Part:
    """One module as a trainer sees it: rows of a module of the base."""

    module: str
    rows: tuple[int, int] | None = None  # None: all


@dataclass(frozen=True)
class Base:
    """One small checkpoint."""

    shapes: Shapes
    config: dict[str, Any] = field(default_factory=dict)  # config.json; a base without one is a single file
    paths: Mapping[str, Part] = field(default_factory=dict)  # what diffusers calls a module -> where it is

    def part(self, path: str) -> Part:
        """Where the module is that trainers call `path`."""
        return self.paths.get(path, Part(path))


def _layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _sd1() -> Base:
    block = _BLOCK + "transformer_blocks.0."
    unet: Shapes = {
        **_layer("input_blocks.0.0", 4, 4, 3, 3),
        **_layer("input_blocks.1.0.in_layers.0", 8),
        **_layer(_BLOCK + "norm", 8),
        **_layer(_BLOCK + "proj_in", 8, 8, 1, 1),
        **{f"{block}attn1.{leaf}.weight": (8, 8) for leaf in ("to_q", "to_k", "to_v")},
        **_layer(block + "attn1.to_out.0", 8, 8),
        **{f"{block}attn2.{leaf}.weight": (8, 6) for leaf in ("to_k", "to_v")},
        **_layer(block + "norm1", 8),
        **_layer(block + "ff.net.2", 8, 16),
    }
    text: Shapes = {
        "text_model.embeddings.position_ids": (1, 4),
        "text_model.embeddings.token_embedding.weight": (6, 8),
        **_layer("text_model.encoder.layers.0.self_attn.q_proj", 8, 8),
        **_layer("text_model.encoder.layers.0.mlp.fc1", 12, 8),
    }
    shapes = {
        **_under(UNET, unet),
        **_under(TEXT, text),
        "first_stage_model.encoder.down.0.block.0.conv1.weight": (2, 2, 3, 3),
        "model_ema.num_updates": (),
    }
    inside = [name.rpartition(".")[0].removeprefix(_BLOCK) for name in unet if name.startswith(_BLOCK)]
    paths = {f"down_blocks.0.attentions.0.{module}": Part(UNET + _BLOCK + module) for module in inside}
    paths["conv_in"] = Part(UNET + "input_blocks.0.0")
    paths["down_blocks.0.resnets.0.norm1"] = Part(UNET + "input_blocks.1.0.in_layers.0")
    paths |= {name.rpartition(".")[0]: Part(TEXT + name.rpartition(".")[0]) for name in text}
    return Base(shapes, paths=paths)


def _flux() -> Base:
    shapes = {
        **_layer("img_in", 4, 4),
        **_layer("vector_in.in_layer", 4, 6),
        "double_blocks.0.img_attn.norm.key_norm.scale": (2,),
        "double_blocks.0.img_attn.norm.query_norm.scale": (2,),
        **_layer("double_blocks.0.img_attn.qkv", 12, 4),
        **_layer("double_blocks.0.img_attn.proj", 4, 4),
        **_layer("double_blocks.0.txt_attn.qkv", 12, 4),
        **_layer("single_blocks.0.linear1", 20, 4),
        **_layer("single_blocks.0.linear2", 4, 12),
    }
    paths = {
        f"{block}.attn.{leaf}": Part(module, (first, first + 4))
        for block, module in (
            ("transformer_blocks.0", "double_blocks.0.img_attn.qkv"),
            ("single_transformer_blocks.0", "single_blocks.0.linear1"),
        )
        for leaf, first in (("to_q", 0), ("to_k", 4), ("to_v", 8))
    }
    paths["transformer_blocks.0.attn.add_v_proj"] = Part("double_blocks.0.txt_attn.qkv", (8, 12))
    paths["transformer_blocks.0.attn.to_out.0"] = Part("double_blocks.0.img_attn.proj")
    paths["single_transformer_blocks.0.proj_mlp"] = Part("single_blocks.0.linear1", (12, 20))
    paths["single_transformer_blocks.0.proj_out"] = Part("single_blocks.0.linear2")
    return Base(shapes, paths=paths)


def _wan() -> Base:
    return Base(
        {
            "head.modulation": (1, 2, 8),
            "blocks.0.modulation": (1, 6, 8),
            **_layer("blocks.0.self_attn.q", 8, 8),
            "blocks.0.self_attn.norm_q.weight": (8,),
        }
    )


def _qwen2() -> Base:
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (10, 8),
        **_layer(layer + "self_attn.q_proj", 8, 8),
        **_layer(layer + "self_attn.k_proj", 4, 8),
        **_layer(layer + "self_attn.v_proj", 4, 8),
        layer + "self_attn.o_proj.weight": (8, 8),
        layer + "mlp.up_proj.weight": (12, 8),
        layer + "mlp.down_proj.weight": (8, 12),
        layer + "input_layernorm.weight": (8,),
        "model.norm.weight": (8,),
        "lm_head.weight": (10, 8),
    }
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False}
    return Base(shapes, config)


def _gpt2() -> Base:
    shapes = {
        "transformer.wte.weight": (6, 4),
        "transformer.h.0.attn.c_attn.weight": (4, 12),  # Conv1D: (in, out)
        "transformer.h.0.attn.c_attn.bias": (12,),
        "transformer.h.0.attn.c_proj.weight": (4, 4),
        "transformer.h.0.attn.c_proj.bias": (4,),
        **_layer("transformer.ln_f", 4),
    }
    return Base(shapes, {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "tie_word_embeddings": True})


def _mixtral() -> Base:
    experts = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{leaf}.weight": shape
        for expert in range(2)
        for leaf, shape in (("w1", (6, 8)), ("w2", (8, 6)), ("w3", (6, 8)))
    }
    shapes: Shapes = {
        "model.embed_tokens.weight": (6, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.block_sparse_moe.gate.weight": (2, 8),
        **experts,
        "lm_head.weight": (6, 8),
    }
    config = {
        **{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "tie_word_embeddings": False},
        **{"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 2, "num_hidden_layers": 1},
    }
    return Base(shapes, config)


BASES = {"sd1": _sd1(), "flux": _flux(), "wan": _wan(), "qwen2": _qwen2(), "gpt2": _gpt2(), "mixtral": _mixtral()}


def random(name: str, *shape: int) -> NDArray[np.float64]:
    """Normal values that depend on the name alone."""
    return np.asarray(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape))


def base_arrays(name: str) -> Arrays:
    """The tensors of the base `name`: float16, integers where checkpoints have integers."""
    arrays: Arrays = {}
    for tensor, shape in BASES[name].shapes.items():
        if tensor.endswith(_INTEGERS):
            arrays[tensor] = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
        else:
            middle = 1.0 if "norm" in tensor and not tensor.endswith("bias") else 0.0
            arrays[tensor] = (middle + 0.3 * random(f"{name} {tensor}", *shape)).astype(np.float16)
    return arrays


def values_of(base: str, path: str, parameter: str = "weight") -> NDArray[np.float64] | None:
    """The values of a module's parameter as the trainer sees them, in float64; None if it has no such parameter."""
    part = BASES[base].part(path)
    found = base_arrays(base).get(f"{part.module}.{parameter}")
    if found is None:
        return None
    return np.asarray((found if part.rows is None else found[slice(*part.rows)]).astype(np.float64))
