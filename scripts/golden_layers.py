"""Layers with the weights of a golden base, and the random values of adapters on them. Needs torch."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from golden_bases import random, values_of
from torch import Tensor, nn

_EMBEDDINGS = ("embed_tokens", "wte", "token_embedding")
# What training moves away from a value that is not 0.
_AROUND = ("dora_scale", "magnitude", "rescale", "boft_s", "ia3_l", "ln_tuning", "modules_to_save", "original_module")


def layer(base: str, path: str, *, in_out: bool = False) -> nn.Module:
    """The layer that trainers call `path`, with the base's weights, in float64; in_out: a Conv1D of GPT-2."""
    weight = values_of(base, path)
    assert weight is not None, path
    bias = values_of(base, path, "bias")
    made = _made(path, weight.shape, bias is not None, in_out).double()
    with torch.no_grad():
        made.get_parameter("weight").copy_(torch.from_numpy(weight))
        if bias is not None:
            made.get_parameter("bias").copy_(torch.from_numpy(bias))
    return made


def _made(path: str, shape: tuple[int, ...], has_bias: bool, in_out: bool) -> nn.Module:
    if in_out:
        conv1d = import_module("transformers.pytorch_utils").Conv1D
        made: nn.Module = conv1d(shape[1], shape[0])
        return made
    if len(shape) == 4:
        return nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), bias=has_bias)
    if len(shape) == 2:
        if path.endswith(_EMBEDDINGS):
            return nn.Embedding(*shape)
        return nn.Linear(shape[1], shape[0], bias=has_bias)
    if path.endswith((".0.norm", ".resnets.0.norm1")):
        return nn.GroupNorm(2, shape[0])
    return nn.LayerNorm(shape[0], bias=has_bias)


class Skeleton(nn.Module):
    """A model of nothing but named layers: enough for libraries that wrap and merge layers."""

    def __init__(self, base: str, paths: Iterable[str], *, in_out: bool = False) -> None:
        super().__init__()
        for path in paths:
            place(self, path, layer(base, path, in_out=in_out and not path.endswith("wte")))


class LanguageModel(Skeleton):
    """The same with what PEFT asks a language model for."""

    def get_input_embeddings(self) -> Any:
        """The only embedding."""
        return next(module for name, module in self.named_modules() if name.endswith(_EMBEDDINGS))

    def get_output_embeddings(self) -> Any:
        """The head, if there is one."""
        return dict(self.named_modules()).get("lm_head")


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path below `root`."""
    *parents, leaf = path.split(".")
    here = root
    for name in parents:
        if name not in here._modules:
            here.add_module(name, nn.Module())
        here = here.get_submodule(name)
    here.add_module(leaf, module)


def randomise(case: str, module: nn.Module, dtype: type[np.floating[Any]]) -> None:
    """Give every parameter that is trained a value that depends on the names alone and is exact in `dtype`."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:  # of AdaLoRA: a count
                noise = random(f"{case} {name}", *parameter.shape)
                around = any(word in name for word in _AROUND)
                values = parameter.detach().double().numpy() * (1 + 0.2 * noise) if around else 0.4 * noise
                parameter.copy_(torch.from_numpy(values.astype(dtype).astype(np.float64)))


def seed(case: str) -> None:
    """Make what a library draws for itself depend on the case alone."""
    torch.manual_seed(zlib.crc32(case.encode()))


def as_array(tensor: Tensor) -> Any:
    """The values in float64."""
    return tensor.detach().double().numpy().copy()
