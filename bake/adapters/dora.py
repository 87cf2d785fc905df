"""DoRA: an additive update, after which rows (or input channels) are given stored lengths.

V = W + update at strength 1,  n = the length of each row (or channel) of V
W1 = V * magnitude / n,  W' = s W1 + (1 - s) W

The update may be of any additive algorithm. Where n is 0 there is no direction and W stays. The trainers
disagree about strengths other than 1; bake interpolates, as A1111 and ComfyUI do.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What LyCORIS and OneTrainer add to n, for `dora_scale`; PEFT (`lora_magnitude_vector`) adds nothing.
EPSILON = torch.finfo(torch.float32).eps


def shares(magnitude: Tensor, norms: Tensor, *, strength: float, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return how much of V and how much of W is in W', for each row or channel, in the shape and dtype of `norms`.

    magnitude: as many numbers, of any shape. norms: n. epsilon: added to norms that are not 0. NaN where n is infinite.
    Source: arXiv:2402.09353, eq. 5; LyCORIS functional/general.py, PEFT tuners/lora/dora.py.
    """
    shapeless = norms == 0  # a NaN has to show
    gain = strength * (magnitude.reshape(norms.shape).to(norms.dtype) / (norms + epsilon))
    gain.masked_fill_(norms.isinf(), torch.nan)  # what is too long to be measured must not become 0
    return gain.masked_fill_(shapeless, 0.0), torch.full_like(gain, 1 - strength).masked_fill_(shapeless, 1.0)


def blend(weight: Tensor, updated: Tensor, gain: Tensor, rest: Tensor) -> None:
    """Overwrite `weight` with gain * updated + rest * weight: W' from W and V, (rows, in * kernel).

    gain, rest: the `shares`, of shapes that broadcast to theirs, (rows, 1) or (in * kernel).
    """
    weight.mul_(rest).addcmul_(updated, gain)


def row_norms(updated: Tensor) -> Tensor:
    """Return the length of each row: (rows, 1). updated: (rows, in * kernel), V."""
    norms: Tensor = torch.linalg.vector_norm(updated, dim=1, keepdim=True)
    return norms


def column_squares(updated: Tensor, channels: int) -> Tensor:
    """Return each input channel's sum of squares over these rows and all kernel taps: (channels,).

    updated: (rows, channels * kernel), some rows of V; overwritten. Sums over all blocks of rows, in one
    fixed order, make the squares of the channels' lengths.
    """
    return updated.square_().sum(0).reshape(channels, -1).sum(1)
