"""Golden cases by PEFT: adapters that save_pretrained wrote, judged by merge_and_unload in float64."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import golden_layers as layers
import numpy as np
import torch
from golden_bases import BASES, random, values_of
from golden_case import Case, Outcome, expected_of, interpolated
from torch import nn

_LAYER = "model.layers.0."
EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", _LAYER + "input_layernorm"
QUERY, KEY, VALUE, OUT = (_LAYER + f"self_attn.{name}_proj" for name in "qkvo")
UP, DOWN = _LAYER + "mlp.up_proj", _LAYER + "mlp.down_proj"
LLM = (EMBEDDING, QUERY, KEY, VALUE, OUT, UP, DOWN, NORM, HEAD)
_BLOCK = "down_blocks.0.attentions.0."
UNET = (
    "conv_in",
    _BLOCK + "proj_in",
    *(_BLOCK + f"transformer_blocks.0.{name}" for name in ("attn1.to_q", "attn2.to_k")),
)
GPT2 = ("transformer.wte", "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj")
_PATHS = {"qwen2": LLM, "sd1": UNET, "gpt2": GPT2, "mixtral": (EMBEDDING, QUERY, HEAD)}
_EXPERTS = _LAYER + "mlp.experts"

_SETS = {"target_modules", "modules_to_save", "feedforward_modules"}  # which PEFT saves in the order of their hashes

MERGED = "merge_and_unload in float64, the weight through set_scale of every layer"
LINE = "merge_and_unload in float64 at weight 1; at the others base + weight * (that - base)"

Settings = dict[str, Any]


class Row(NamedTuple):
    """One case: one configuration."""

    name: str
    kind: str  # the configuration's class
    modules: int
    settings: Settings
    base: str = "qwen2"
    interpolated: bool = False  # PEFT knows no weight here, or another rule


_LORA = {"r": 2, "lora_alpha": 3}
_QV = ["q_proj", "v_proj"]
_CONVS = ["conv_in", "proj_in", "to_q", "to_k"]
ROWS = (
    Row("peft-lora", "LoraConfig", 3, {**_LORA, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    Row(
        *("peft-lora-rs-patterns", "LoraConfig", 3),
        {
            **{"r": 2, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
            **{"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
        },
    ),
    Row("peft-lora-embedding", "LoraConfig", 2, {**_LORA, "target_modules": ["embed_tokens", "o_proj"]}),
    Row("peft-lora-bias", "LoraConfig", 2, {**_LORA, "lora_bias": True, "target_modules": _QV}),
    Row("peft-bias-lora-only", "LoraConfig", 2, {**_LORA, "bias": "lora_only", "target_modules": _QV}),
    Row(
        "peft-modules-to-save", "LoraConfig", 2, {**_LORA, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    ),
    Row(
        *("peft-tokens", "LoraConfig", 2),
        {**_LORA, "trainable_token_indices": {"embed_tokens": [1, 5]}, "target_modules": ["q_proj"]},
    ),
    Row(
        "peft-trainable-tokens",
        "TrainableTokensConfig",
        1,
        {"token_indices": [7, 2], "target_modules": ["embed_tokens"]},
    ),
    Row(
        *("peft-target-parameters", "LoraConfig", 3),
        {
            **{"r": 1, "lora_alpha": 3, "target_modules": ["q_proj"]},
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        base="mixtral",
    ),
    Row("peft-loha", "LoHaConfig", 2, {"r": 2, "alpha": 3, "target_modules": ["q_proj", "down_proj"]}),
    Row("peft-lokr", "LoKrConfig", 2, {"r": 1, "alpha": 3, "target_modules": ["q_proj", "down_proj"]}),
    Row("peft-lokr-full", "LoKrConfig", 1, {"r": 16, "alpha": 8, "target_modules": ["q_proj"]}),
    Row(
        *("peft-adalora", "AdaLoraConfig", 2),
        {**{"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 10}, "target_modules": _QV},
        interpolated=True,  # set_scale would divide by the rank once more
    ),
    Row(
        *("peft-oft", "OFTConfig", 2, {"r": 0, "oft_block_size": 4, "target_modules": ["q_proj", "down_proj"]}),
        interpolated=True,
    ),
    Row(
        *("peft-oft-exact", "OFTConfig", 2),
        {**{"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}, "target_modules": ["q_proj", "down_proj"]},
        interpolated=True,
    ),
    Row(
        *("peft-boft", "BOFTConfig", 2),
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "target_modules": ["q_proj", "down_proj"]},
        interpolated=True,
    ),
    Row("peft-hra", "HRAConfig", 2, {"r": 2, "target_modules": ["q_proj", "down_proj"]}, interpolated=True),
    Row(
        *("peft-ia3", "IA3Config", 3),
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        interpolated=True,
    ),
    Row("peft-vera", "VeraConfig", 2, {"r": 3, "save_projection": True, "target_modules": _QV}, interpolated=True),
    Row("peft-ln-tuning", "LNTuningConfig", 1, {"target_modules": ["input_layernorm"]}),
    Row(
        *("peft-dora", "LoraConfig", 3),
        {**_LORA, "use_dora": True, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
        interpolated=True,
    ),
    Row("peft-lora-conv", "LoraConfig", 4, {**_LORA, "target_modules": _CONVS}, base="sd1"),
    Row(
        *("peft-dora-conv", "LoraConfig", 4, {**_LORA, "use_dora": True, "target_modules": _CONVS}),
        base="sd1",
        interpolated=True,
    ),
    Row(
        *("peft-oft-conv", "OFTConfig", 2, {"r": 0, "oft_block_size": 4, "target_modules": ["conv_in", "to_q"]}),
        base="sd1",
        interpolated=True,
    ),
    Row(
        *("peft-lora-conv1d", "LoraConfig", 2),
        {**_LORA, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]},
        base="gpt2",
    ),
    Row(
        *("peft-dora-conv1d", "LoraConfig", 2),
        {**_LORA, "fan_in_fan_out": True, "use_dora": True, "target_modules": ["c_attn", "c_proj"]},
        base="gpt2",
        interpolated=True,
    ),
)


def cases() -> Iterator[Case]:
    """Every case by PEFT. Raises ImportError if it is not installed."""
    import_module("peft")
    for row in ROWS:
        yield _case(row)


def _case(row: Row) -> Case:
    model = wrapped(row.name, row.base, _PATHS[row.base], row.kind, row.settings)
    adapter, config = saved(model)

    def at(weight: float) -> dict[tuple[str, str], Any]:
        merged = at_weight(model, weight).merge_and_unload()
        found = {(path, name): values for path, name, values in parameters(merged) if _EXPERTS not in path}
        return found | (_experts(merged) if row.base == "mixtral" else {})

    outcome: Outcome = interpolated(at, row.base) if row.interpolated else at
    return Case(
        name=row.name,
        base=row.base,
        tool=f"peft {version('peft')}, {row.kind}",
        expected_from=LINE if row.interpolated else MERGED,
        settings=row.settings,
        modules=row.modules,
        adapter=adapter,
        expected=expected_of(row.base, outcome),
        config=config,
    )


def wrapped(
    case: str, base: str, paths: tuple[str, ...], kind: str, settings: Settings, dtype: Any = np.float32
) -> Any:
    """The layers `paths` of a base with an adapter on them, in float64; its values are exact in `dtype`."""
    peft = import_module("peft")
    layers.seed(case)
    model = (layers.LanguageModel if BASES[base].config else layers.Skeleton)(base, paths, in_out=base == "gpt2")
    if base == "mixtral":
        layers.place(model, _EXPERTS, _fused_experts())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peft.get_peft_model(model, getattr(peft, kind)(**settings)).double()
    layers.randomise(case, found, dtype)
    for name, buffer in found.named_buffers():
        if "vera_" in name:  # its projections
            buffer.copy_(torch.from_numpy(random(f"{case} {name}", *buffer.shape).astype(np.float32)))
    return found


def saved(model: Any) -> tuple[bytes, Settings]:
    """(adapter_model.safetensors, adapter_config.json) as PEFT writes them, in float32."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy.deepcopy(model).float().save_pretrained(folder)
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        for name in _SETS & {name for name, value in config.items() if value is not None}:
            config[name] = sorted(config[name])
        return (Path(folder) / "adapter_model.safetensors").read_bytes(), config


def at_weight(model: Any, weight: float) -> Any:
    """A copy of `model` whose layers are scaled by `weight`, where they can be."""
    scaled = copy.deepcopy(model)
    for module in scaled.modules():
        if weight != 1 and hasattr(module, "set_scale"):
            module.set_scale("default", weight)
    return scaled


def parameters(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(module, parameter, values) of all layers."""
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        yield path, leaf, layers.as_array(parameter)


def _fused_experts() -> nn.Module:
    """Mixtral's experts as transformers 5 holds them: one parameter for all, w1 above w3."""

    def stack(*leaves: str) -> nn.Parameter:
        experts = [[_expert(expert, leaf) for leaf in leaves] for expert in range(2)]
        return nn.Parameter(torch.from_numpy(np.stack([np.concatenate(parts) for parts in experts])))

    module = nn.Module()
    module.gate_up_proj, module.down_proj = stack("w1", "w3"), stack("w2")
    return module


def _expert(number: int, leaf: str) -> Any:
    return values_of("mixtral", f"{_LAYER}block_sparse_moe.experts.{number}.{leaf}")


def _experts(merged: nn.Module) -> dict[tuple[str, str], Any]:
    """The merged experts under the names of published files."""
    fused, down = (
        layers.as_array(merged.get_parameter(f"{_EXPERTS}.{name}")) for name in ("gate_up_proj", "down_proj")
    )
    height = fused.shape[1] // 2
    found = {"w1": fused[:, :height], "w3": fused[:, height:], "w2": down}
    return {
        (f"{_LAYER}block_sparse_moe.experts.{number}.{leaf}", "weight"): values[number]
        for leaf, values in found.items()
        for number in range(2)
    }
