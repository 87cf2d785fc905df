"""LoHa: the update is the elementwise product of two low-rank products (arXiv:2108.06098).

Plain:   scale * (w1_a @ w1_b) * (w2_a @ w2_b), on flattened factors; w1_b and w2_b have the kernel
Tucker:  the same with sum_ij t[i, j] w_a[i, :] w_b[j, :] for each product; t1 and t2 have the kernel

LyCORIS trains with alpha / rank once (`forward`); its own merge squares it and is not followed.
"""

from __future__ import annotations

from torch import Tensor

from bake.adapters.rows import indices, product


def delta(
    w1_a: Tensor,
    w1_b: Tensor,
    w2_a: Tensor,
    w2_b: Tensor,
    t1: Tensor | None = None,
    t2: Tensor | None = None,
    *,
    rows: range,
    scale: float,
) -> Tensor:
    """Return the rows `rows` of the update as (len(rows), in * kernel), in the dtype and on the device of the factors.

    Plain: w1_a and w2_a (out, rank[, 1, 1]); w1_b and w2_b (rank, in * kernel) or (rank, in, kh, kw).
    Tucker: w1_a and w2_a (rank, out); w1_b and w2_b (rank, in); t1 and t2 (rank, rank, kh, kw).
    scale: alpha / rank * weight, rank = the rows of w1_b. Source: LyCORIS modules/loha.py, PEFT tuners/loha/layer.py.
    """
    wanted = indices(rows, w1_a)
    return product(w1_a * scale, w1_b, t1, rows=wanted).mul_(product(w2_a, w2_b, t2, rows=wanted))
