"""AdaLoRA: a low-rank product with a number for each rank, zero where training pruned it (arXiv:2303.10512).

scale * up @ (lora_e * down)
"""

from __future__ import annotations

from torch import Tensor


def low_rank(up: Tensor, down: Tensor, lora_e: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Return (left, right) with `left @ right` = the update: (out, rank) and (rank, in * kernel).

    up: (out, rank). down: (rank, in * kernel). lora_e: (rank, 1). scale: lora_alpha / (initial rank + 1e-5) * weight,
    with the initial rank for lora_alpha where that is not positive; it goes into `left`. In the dtype and on the
    device of the factors. Source: PEFT tuners/adalora/layer.py, get_delta_weight.
    """
    return up.flatten(1) * scale, down.flatten(1) * lora_e.reshape(-1, 1)
