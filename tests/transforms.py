"""What the tests of the transforms share: layers of every kind, and what a trainer's forward pass does to them."""

from __future__ import annotations

from typing import Any

import torch
from support import random
from torch import Tensor, nn

KERNELS = {"linear": (), "conv 1x1": (1, 1), "conv 3x3": (3, 3)}


def layer(kind: str, channels: int, out: int, dtype: torch.dtype = torch.float32) -> Any:
    """A layer with a bias and reproducible values."""
    kernel = KERNELS[kind]
    made = nn.Conv2d(channels, out, kernel, dtype=dtype) if kernel else nn.Linear(channels, out, dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(random(11, *made.weight.shape)))
        made.bias.copy_(torch.from_numpy(random(12, out)))
    return made


def effective(made: Any, forward: Any = None) -> tuple[Tensor, Tensor]:
    """(weight, bias) that a layer's forward pass has, found by giving it nothing and then unit impulses."""
    forward = forward or made
    out, channels, *kernel = made.weight.shape
    shape = (channels, channels, *(2 * size - 1 for size in kernel))
    impulses = torch.zeros(shape, dtype=made.weight.dtype)
    impulses[(range(channels), range(channels), *(size - 1 for size in kernel))] = 1
    with torch.no_grad():
        nothing = forward(torch.zeros_like(impulses))
        found = (forward(impulses) - nothing).transpose(0, 1).flip(tuple(range(2, 2 + len(kernel))))
    return found, nothing[0].reshape(out, -1)[:, 0]


def randomise(module: nn.Module, spread: float = 0.3) -> None:
    """Give every trained parameter of an adapter a reproducible value away from its initial one."""
    for seed, (_, parameter) in enumerate(sorted(module.named_parameters())):
        with torch.no_grad():
            parameter.add_(torch.from_numpy(random(seed, *parameter.shape, spread=spread)))


def matrix(weight: Any) -> Tensor:
    """A weight as (out, in * kernel), float64."""
    return torch.as_tensor(weight).detach().double().flatten(1)


def whole(transform: Any, weight: Tensor) -> Tensor:
    """The new weight, all rows in one step."""
    return applied(transform, weight, range(len(weight)))


def applied(transform: Any, weight: Tensor, rows: range) -> Tensor:
    """The new values of `rows` beside their old ones, which the transform overwrites."""
    new = weight.clone()
    transform.apply(new, rows)
    return new


def assert_pieces_make_the_whole(transform: Any, weight: Tensor) -> None:
    """As few rows at a time as the transform allows give what all rows at once give, in the dtype of the weight."""
    step = transform.block
    pieces = [applied(transform, weight[at : at + step], range(at, at + step)) for at in range(0, len(weight), step)]
    new = whole(transform, weight)
    assert new.dtype == weight.dtype
    torch.testing.assert_close(torch.cat(pieces), new, rtol=0, atol=1e-12 if weight.dtype == torch.float64 else 1e-5)
