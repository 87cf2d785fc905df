"""VeRA: one pair of random matrices for all layers, scaled per layer by two vectors (arXiv:2310.11454).

scale * (lambda_b[:, None] * B[:out]) @ (lambda_d[:, None] * A[:, :in])
"""

from __future__ import annotations

from torch import Tensor


def low_rank(
    vera_lambda_b: Tensor, vera_lambda_d: Tensor, vera_a: Tensor, vera_b: Tensor, *, in_features: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (left, right) with `left @ right` = the update: (out, rank) and (rank, in).

    vera_lambda_b: (out). vera_lambda_d: (rank). vera_a: (rank, widest in), shared. vera_b: (widest out, rank),
    shared. in_features: of this layer. scale: the user's weight; VeRA knows no alpha; it goes into `left`. In the
    dtype and on the device of the factors. Source: PEFT tuners/vera/layer.py, get_delta_weight.
    """
    out = vera_lambda_b.numel()
    left = vera_b[:out] * (vera_lambda_b.reshape(-1, 1) * scale)
    return left, vera_a[:, :in_features] * vera_lambda_d.reshape(-1, 1)
