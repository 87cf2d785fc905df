"""Powers, logarithms and their like, in NumPy: torch's give other last bits at the end of a buffer than in its middle,
and other ones on a GPU. All take and return float64 tensors and stay on the device of what they are given.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Array = NDArray[np.float64]


def power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """base ** exponent. base: not negative."""
    if isinstance(exponent, Tensor):
        return _by_numpy(np.power, base, exponent)
    return _by_numpy(lambda values: np.power(values, exponent), base)


def exponential(values: Tensor) -> Tensor:
    return _by_numpy(np.exp, values)


def logarithm(values: Tensor) -> Tensor:
    """The natural logarithm; -inf of 0."""
    return _by_numpy(np.log, values)


def cosine(values: Tensor) -> Tensor:
    return _by_numpy(np.cos, values)


def _by_numpy(function: Callable[..., _Array], *tensors: Tensor) -> Tensor:
    with np.errstate(all="ignore"):  # what is not finite shows in the result
        values = function(*(tensor.cpu().numpy() for tensor in tensors))
    return torch.from_numpy(values).to(tensors[0].device)
