"""LoKr: the update is a Kronecker product of a small matrix and a larger one (arXiv:2309.14859, section 3).

    scale * kron(w1, w2), w1 and w2 stored whole or as products of two factors

The element (i * height + j, a * width + c) of kron(w1, w2) is w1[i, a] * w2[j, c], with w2 flattened to
(height, width). Where w2 has the kernel that is the order of a convolution's weight; where an early LyCORIS
has split the kernel between the columns of w1 and of w2, its own reshape to the weight is the same order too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bake.adapters.rows import indices, product


def delta(
    kron_w1: Tensor | None = None,
    kron_w1_a: Tensor | None = None,
    kron_w1_b: Tensor | None = None,
    kron_w2: Tensor | None = None,
    kron_w2_a: Tensor | None = None,
    kron_w2_b: Tensor | None = None,
    kron_t2: Tensor | None = None,
    *,
    rows: range,
    scale: float,
    swapped: bool = False,
) -> Tensor:
    """Return the rows `rows` of the update as (len(rows), in * kernel), in the dtype and on the device of the factors.

    w1: kron_w1 (p, q), or kron_w1_a (p, rank) @ kron_w1_b (rank, q).
    w2: kron_w2 (out / p, in / q[, kh, kw]), or kron_w2_a (out / p, rank) @ kron_w2_b (rank, in / q * kernel) or
    (rank, in / q, kh, kw); Tucker: kron_t2 (rank, rank, kh, kw), kron_w2_a (rank, out / p), kron_w2_b (rank, in / q).
    scale: alpha / rank * weight; for LyCORIS the weight alone if w1 and w2 are both stored whole, because their
    alpha says nothing then. swapped: kron(w2, w1) for every place of the kernel, which is what PEFT trains on a
    Conv1d whose w2 is whole (out / p, in / q, k): torch.kron takes the axes of such factors from behind.
    Raises ValueError if w1 or w2 is missing.
    Source: LyCORIS modules/lokr.py, PEFT tuners/lokr/layer.py.
    """
    tall = kron_w2 if kron_w2 is not None else kron_w2_a
    if tall is None:
        raise ValueError("LoKr needs w2, whole or as two factors")
    height = tall.shape[1] if kron_w2 is None and kron_t2 is not None else tall.shape[0]
    wanted = indices(rows, tall)
    if swapped and kron_w2 is not None:
        count = len(kron_w1 if kron_w1 is not None else kron_w1_a if kron_w1_a is not None else ())
        left = _rows("w1", kron_w1, kron_w1_a, kron_w1_b, None, wanted % count) * scale
        return torch.einsum("rj,rct->rcjt", left, kron_w2[wanted // count]).flatten(1)
    left = _rows("w1", kron_w1, kron_w1_a, kron_w1_b, None, wanted // height) * scale
    right = _rows("w2", kron_w2, kron_w2_a, kron_w2_b, kron_t2, wanted % height)
    return (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)


def _rows(
    name: str, whole: Tensor | None, a: Tensor | None, b: Tensor | None, t: Tensor | None, rows: Tensor
) -> Tensor:
    """The rows `rows`, in any order and repeated, of one side of the product; each is computed once."""
    if whole is not None:
        return whole.flatten(1)[rows]
    if a is None or b is None:
        raise ValueError(f"LoKr needs {name}, whole or as two factors")
    distinct, place = torch.unique(rows, return_inverse=True)
    return product(a, b, t, rows=distinct)[place]
