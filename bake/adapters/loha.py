"""LoHa: the update is the elementwise product of two low-rank products (arXiv:2108.06098).

Plain:   scale * (w1_a @ w1_b) * (w2_a @ w2_b), on flattened factors; w1_b and w2_b have the kernel
Tucker:  the same with sum_ij t[i, j] w_a[i, :] w_b[j, :] for each product; t1 and t2 have the kernel

LyCORIS trains with alpha / rank once (`forward`); its own merge squares it and is not followed.
"""

from __future__ import annotations

from torch import Tensor

from bake.adapters.rows import factored, part


class Update:
    """The update of one weight; any rows."""

    def __init__(
        self,
        w1_a: Tensor,
        w1_b: Tensor,
        w2_a: Tensor,
        w2_b: Tensor,
        t1: Tensor | None = None,
        t2: Tensor | None = None,
        *,
        scale: float,
        transposed: bool = False,
    ) -> None:
        """Prepare the factors, in their dtype.

        Plain: w1_a and w2_a (out, rank[, 1, 1]); w1_b and w2_b (rank, in * kernel) or (rank, in, kh, kw).
        Tucker: w1_a and w2_a (rank, out); w1_b and w2_b (rank, in); t1 and t2 (rank, rank, kh, kw).
        scale: alpha / rank * weight, rank = the rows of w1_b. transposed: the update is for a tensor stored
        (in, out). Source: LyCORIS modules/loha.py, PEFT tuners/loha/layer.py.
        """
        products = factored(w1_a * scale, w1_b, t1), factored(w2_a, w2_b, t2)
        self._products = [(right.T, left.T) if transposed else (left, right) for left, right in products]

    def add_to(self, block: Tensor, rows: range) -> None:
        """Add the rows `rows` of the update to `block`, (len(rows), in * kernel) in the dtype of the factors."""
        first, second = (part(left, rows) @ right for left, right in self._products)
        block.addcmul_(first, second)
