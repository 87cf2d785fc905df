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


def decomposed(
    weight: Tensor, updated: Tensor, magnitude: Tensor, norms: Tensor, *, strength: float, epsilon: float = 0.0
) -> Tensor:
    """Return the new values of some rows, in the dtype of `weight`; exactly `weight` at strength 0.

    weight, updated: (rows, in * kernel), W and V. magnitude, norms: of shapes that broadcast to theirs,
    (rows, 1) or (1, in * kernel). epsilon: added to norms that are not 0.
    Source: arXiv:2402.09353, eq. 5; LyCORIS functional/general.py, PEFT tuners/lora/dora.py.
    """
    if strength == 0:
        return weight
    new = updated * (magnitude / (norms + epsilon)).to(weight.dtype)
    return torch.where(norms == 0, weight, strength * new + (1 - strength) * weight)  # a NaN has to show


def by_row(weight: Tensor, updated: Tensor, magnitude: Tensor, *, strength: float, epsilon: float = 0.0) -> Tensor:
    """Return the new values of some rows, each given its length (the output axis).

    weight, updated: (rows, in * kernel). magnitude: one number for each of these rows, of any shape.
    """
    norms = updated.norm(dim=1, keepdim=True)
    return decomposed(weight, updated, magnitude.reshape(-1, 1), norms, strength=strength, epsilon=epsilon)


def by_column(
    weight: Tensor, updated: Tensor, magnitude: Tensor, norms: Tensor, *, strength: float, epsilon: float = 0.0
) -> Tensor:
    """Return the new values of some rows, each input channel given its length (the input axis).

    weight, updated: (rows, in * kernel). magnitude: one number for each channel, of any shape.
    norms: (in,), the lengths of the channels over ALL rows: the root of the sum of their `column_squares`.
    """
    taps = weight.shape[1] // norms.numel()
    return decomposed(
        weight,
        updated,
        magnitude.reshape(1, -1).repeat_interleave(taps, 1),
        norms.reshape(1, -1).repeat_interleave(taps, 1),
        strength=strength,
        epsilon=epsilon,
    )


def column_squares(updated: Tensor, channels: int) -> Tensor:
    """Return each input channel's sum of squares over these rows and all kernel taps: (channels,).

    updated: (rows, channels * kernel), some rows of V. Sums over all blocks of rows, in one fixed order,
    make the squared lengths that `by_column` needs.
    """
    return updated.square().sum(0).reshape(channels, -1).sum(1)
