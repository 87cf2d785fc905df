"""The trainers' own layers, with random factors, and the weights that their forward pass shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

WEIGHTS = [1.0, 0.7, -0.5]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 8),
    "square": lambda: nn.Linear(8, 8),
    "conv 1x1": lambda: nn.Conv2d(6, 8, 1),
    "conv 3x3": lambda: nn.Conv2d(6, 8, 3),
    "conv 1d": lambda: nn.Conv1d(6, 8, 3),
    "square conv 3x3": lambda: nn.Conv2d(8, 8, 3),
}


class Trained(NamedTuple):
    """A layer with an adapter on it."""

    base: Tensor  # (out, in, *kernel), before
    expected: Tensor  # the same, as the forward pass shows it
    factors: dict[str, Tensor]  # what the trainer saves, by its own names
    alpha: float = 1.0


def as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1)


def in_pieces(count: int, size: int = 3) -> list[range]:
    """All of `count` rows, a few at a time."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def rows_of(update: Any, rows: range, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The rows `rows` of an additive update, on their own."""
    block = torch.zeros(len(rows), columns, dtype=dtype)
    update.add_to(block, rows)
    return block


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Fill every parameter that training would change: fresh adapters start as no change at all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def effective_weight(layer: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """The weight that a layer without padding acts with, from what it does to every unit input."""
    shape = weight.shape[1:]
    with torch.no_grad():
        units = torch.eye(math.prod(shape), dtype=weight.dtype).reshape(-1, *shape)
        answer = layer(units) - layer(torch.zeros(1, *shape, dtype=weight.dtype))
    return answer.flatten(1).T.reshape(weight.shape)


def lycoris(module: str, kind: str, layer: nn.Module, multiplier: float, **settings: Any) -> Trained:
    """A LyCORIS module `lycoris.modules.<module>.<kind>` in float64, random, judged by its forward pass.

    Its get_merged_weight squares the scale of LoHa and LoKr, so the forward pass, which trains, is the oracle.
    """
    classes = pytest.importorskip(f"lycoris.modules.{module}", reason="the LyCORIS oracle is not installed")
    torch.manual_seed(0)
    layer = layer.double()
    adapter = getattr(classes, kind)("x", layer, multiplier=multiplier, **settings).double()
    randomise(adapter)
    base = layer.weight.detach().clone()
    state = {name: value.detach().clone() for name, value in adapter.state_dict().items()}
    adapter.apply_to()
    return Trained(base, effective_weight(layer, base), state, float(state.pop("alpha", torch.tensor(1.0))))


def peft(config: str, layer: nn.Module, multiplier: float | None = None, **settings: Any) -> tuple[Trained, nn.Module]:
    """A PEFT layer in float64, random, merged; and the merged layer, for its bias.

    multiplier: through the layer's set_scale; None for types that have no such thing.
    """
    library = pytest.importorskip("peft", reason="the PEFT oracle is not installed")
    torch.manual_seed(0)
    base = layer.weight.detach().double().clone()
    model = library.get_peft_model(
        nn.Sequential(layer), getattr(library, config)(target_modules=["0"], **settings)
    ).double()
    randomise(model, seed=1)
    state = {
        name.removeprefix("base_model.model.0.").removeprefix("base_model."): value.detach().clone()
        for name, value in library.get_peft_model_state_dict(model).items()
    }
    if multiplier is not None:
        model.base_model.model[0].set_scale("default", multiplier)
    merged = model.merge_and_unload()[0]
    return Trained(base, merged.weight.detach(), state), merged
