"""Golden cases by LyCORIS: its own modules on the layers of a small SD 1, judged by their forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import golden_layers as layers
import numpy as np
import torch
from golden_case import Case, Outcome, expected_of, interpolated
from safetensors.torch import save
from torch import Tensor

_BLOCK = "down_blocks.0.attentions.0."
CONV, POINT = "conv_in", _BLOCK + "proj_in"
QUERY, KEY, VALUE = (_BLOCK + "transformer_blocks.0." + name for name in ("attn1.to_q", "attn2.to_k", "attn2.to_v"))
OUT = _BLOCK + "transformer_blocks.0.attn1.to_out.0"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
NORMS = ("down_blocks.0.resnets.0.norm1", _BLOCK + "norm", _BLOCK + "transformer_blocks.0.norm1")
_CLASSES = {
    "locon": "LoConModule",
    "loha": "LohaModule",
    "lokr": "LokrModule",
    "glora": "GLoRAModule",
    "ia3": "IA3Module",
    "diag_oft": "DiagOFTModule",
    "boft": "ButterflyOFTModule",
    "full": "FullModule",
    "norms": "NormModule",
}

Settings = dict[str, Any]


class Row(NamedTuple):
    """One case: the modules of one network."""

    name: str
    kind: str  # key of _CLASSES
    modules: Mapping[str, Settings]  # path -> settings of its own
    settings: Mapping[str, Any] = MappingProxyType({})
    interpolated: bool = False  # the library has another rule for weights other than 1


_LORA = {"lora_dim": 2, "alpha": 1.0}
ROWS = (
    Row("lycoris-lora", "locon", {QUERY: {}, KEY: {"lora_dim": 4, "rs_lora": True}, POINT: {}, TEXT: {}}, _LORA),
    Row("lycoris-locon", "locon", {CONV: {}, OUT: {}}, {"lora_dim": 3, "alpha": 2.0}),
    Row("lycoris-locon-tucker", "locon", {CONV: {}, QUERY: {}}, {**_LORA, "use_tucker": True}),
    Row("lycoris-loha", "loha", {QUERY: {}, KEY: {}, POINT: {}}, _LORA),
    Row("lycoris-loha-tucker", "loha", {CONV: {}}, {**_LORA, "use_tucker": True}),
    Row(
        *("lycoris-lokr", "lokr"),
        {
            QUERY: {"lora_dim": 1, "factor": 2},
            KEY: {"lora_dim": 1, "factor": 2},
            VALUE: {"full_matrix": True, "factor": 2},
            TEXT: {"lora_dim": 1, "factor": 4, "decompose_both": True, "unbalanced_factorization": True},
            POINT: {"lora_dim": 2, "factor": 2},
        },
        {"alpha": 0.5},
    ),
    Row("lycoris-lokr-conv", "lokr", {CONV: {}}, {"lora_dim": 1, "alpha": 0.5, "factor": 1}),
    Row("lycoris-lokr-tucker", "lokr", {CONV: {}}, {"lora_dim": 1, "alpha": 0.5, "factor": 1, "use_tucker": True}),
    Row("lycoris-ia3", "ia3", {KEY: {}, VALUE: {"train_on_input": True}, POINT: {}, OUT: {"train_on_input": True}}),
    Row("lycoris-glora", "glora", {QUERY: {}, KEY: {}, CONV: {}}, _LORA),
    Row("lycoris-glora-tucker", "glora", {CONV: {}}, {**_LORA, "use_tucker": True}),
    Row("lycoris-diag-oft", "diag_oft", {QUERY: {}, KEY: {}, POINT: {}}, {"lora_dim": 4}),
    Row(
        *("lycoris-diag-oft-constraint", "diag_oft", {QUERY: {}, CONV: {}}),
        {"lora_dim": 2, "constraint": 0.0625, "rescaled": True},
    ),
    Row("lycoris-boft", "boft", {QUERY: {}, KEY: {}}, {"lora_dim": 2}),
    Row("lycoris-boft-constraint", "boft", {POINT: {}}, {"lora_dim": 2, "constraint": 0.0625, "rescaled": True}),
    Row("lycoris-full", "full", {KEY: {}, OUT: {}, POINT: {}}, interpolated=True),
    Row("lycoris-norm", "norms", {path: {} for path in NORMS}),
    Row(
        *("lycoris-dora-out", "locon", {QUERY: {}, KEY: {}, CONV: {}}),
        {**_LORA, "weight_decompose": True, "wd_on_out": True},
        interpolated=True,
    ),
    Row(
        *("lycoris-dora-in", "locon", {QUERY: {}, KEY: {}, CONV: {}}),
        {**_LORA, "weight_decompose": True, "wd_on_out": False},
        interpolated=True,
    ),
    Row("lycoris-dora-loha", "loha", {KEY: {}, TEXT: {}}, {**_LORA, "weight_decompose": True}, interpolated=True),
    Row(
        *("lycoris-dora-lokr", "lokr", {KEY: {}, TEXT: {"wd_on_out": False}}),
        {"lora_dim": 1, "alpha": 0.5, "factor": 2, "weight_decompose": True},
        interpolated=True,
    ),
)


def cases() -> Iterator[Case]:
    """Every case by LyCORIS. Raises ImportError if it is not installed."""
    import_module("lycoris.modules.locon")
    for row in ROWS:
        yield _case(row)


def _case(row: Row) -> Case:
    def at(weight: float) -> dict[tuple[str, str], Any]:
        return {key: values for path in row.modules for key, values in _applied(row, path, weight)}

    outcome: Outcome = interpolated(at, "sd1") if row.interpolated else at
    state = {f"{_flat(path)}.{name}": value for path in row.modules for name, value in _stored(row, path).items()}
    metadata = {"ss_network_module": "lycoris.kohya", "ss_base_model_version": "sd_v1"}
    return Case(
        name=row.name,
        base="sd1",
        tool=f"lycoris-lora {version('lycoris-lora')}, {_CLASSES[row.kind]}",
        expected_from="forward pass of the modules in float64 on unit inputs"
        + (
            ", at weight 1; at the others base + weight * (that - base)"
            if row.interpolated
            else ", the weight as multiplier"
        ),
        settings={"shared": dict(row.settings), "modules": {_flat(path): own for path, own in row.modules.items()}},
        modules=len(row.modules),
        adapter=save(state, metadata),
        expected=expected_of("sd1", outcome),
    )


def _flat(path: str) -> str:
    return ("lora_te_" if path.startswith("text_model") else "lora_unet_") + path.replace(".", "_")


def _stored(row: Row, path: str) -> dict[str, Tensor]:
    """The state as kohya saves it: in half precision, or single where that would round; flags as they are."""
    _, module = _module(row, path, 1.0)
    module.apply_to()  # before that, a full difference is none
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value = value.half() if torch.equal(value.half().double(), value) else value.float()
        state[name] = value.contiguous()
    return state


def _module(row: Row, path: str, weight: float) -> tuple[Any, Any]:
    """(layer, LyCORIS module on it) in float64, its parameters exact in float16."""
    layers.seed(f"{row.name} {path}")
    layer = layers.layer("sd1", path)
    kind = getattr(import_module(f"lycoris.modules.{row.kind}"), _CLASSES[row.kind])
    module = kind(_flat(path), layer, multiplier=weight, **{**row.settings, **row.modules[path]}).double()
    layers.randomise(f"{row.name} {path}", module, np.float16)
    return layer, module


def _applied(row: Row, path: str, weight: float) -> Iterator[tuple[tuple[str, str], Any]]:
    layer, module = _module(row, path, weight)
    shape = layer.weight.shape
    if row.kind == "norms":
        new_weight, new_bias = module.make_weight(weight)
        yield (path, "weight"), layers.as_array(new_weight)
        yield (path, "bias"), layers.as_array(new_bias)
        return
    has_bias = layer.bias is not None
    module.apply_to()
    # The rotations are inverted after a .float(); everything here is float64.
    with torch.no_grad(), patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield (path, "weight"), layers.as_array(_effective_weight(layer, shape))
        if has_bias:
            yield (path, "bias"), layers.as_array(layer(torch.zeros(1, *shape[1:], dtype=torch.float64)).flatten())


def _effective_weight(layer: Callable[[Tensor], Tensor], shape: torch.Size) -> Tensor:
    """The weight that a layer without padding acts with, from what it does to every unit input."""
    units = torch.eye(math.prod(shape[1:]), dtype=torch.float64).reshape(-1, *shape[1:])
    answer = layer(units) - layer(torch.zeros(1, *shape[1:], dtype=torch.float64))
    return answer.flatten(1).T.reshape(shape)
