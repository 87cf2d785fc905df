"""LoRA and LoCon: the update is a product of two thin matrices.

Linear (arXiv:2106.09685, section 4.1):     scale * up @ down
Convolution (LoCon, as kohya and LyCORIS):  the same on flattened factors; `down` has the kernel
Tucker (LyCORIS "mid"):                     scale * sum_ab mid[a, b] up[:, a] down[b, :]
Experts (PEFT target_parameters):           one LoRA for each of a stack of matrices, in the same two factors
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(
    up: Tensor, down: Tensor, mid: Tensor | None = None, *, scale: float, expert: int = 0, experts: int = 1
) -> tuple[Tensor, Tensor]:
    """Return (left, right) with `left @ right` = the update: (out, rank) and (rank, in * kernel).

    up: (out, rank[, 1, 1]). down: (rank, in) or (rank, in, kh, kw); with `mid` (rank, in[, 1, 1]).
    mid: (rank, rank, kh, kw). scale: alpha / rank * weight; it goes into `left`. expert: which of the
    `experts` LoRAs is meant, whose rows of `down` follow each other and whose columns of `up` take turns
    (PEFT tuners/lora/layer.py, ParamWrapper). In the dtype and on the device of `up`.
    """
    rank = down.shape[0] // experts
    left = up.flatten(1)[:, expert::experts] * scale
    if mid is None:
        return left, down.flatten(1)[expert * rank : (expert + 1) * rank]
    right = torch.einsum("abk,bi->aik", mid.flatten(2), down.flatten(1))
    return left, right.flatten(1)
