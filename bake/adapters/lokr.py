"""LoKr: the update is a Kronecker product of a small matrix and a larger one (arXiv:2309.14859, section 3).

    scale * kron(w1, w2), w1 and w2 stored whole or as products of two factors

The element (i * height + j, a * width + c) of kron(w1, w2) is w1[i, a] * w2[j, c], with w2 flattened to
(height, width). Where w2 has the kernel that is the order of a convolution's weight; where an early LyCORIS
has split the kernel between the columns of w1 and of w2, its own reshape to the weight is the same order too.
"""

from __future__ import annotations

from torch import Tensor

from bake.adapters.rows import Matrix, factored


class Update:
    """The update of one weight; any rows.

    Rows come in bands, one for each row of the outer matrix, and in each come all rows of the inner one. The columns
    of both are spread over a grid, in which one stands still where the other goes on.
    """

    def __init__(
        self,
        kron_w1: Tensor | None = None,
        kron_w1_a: Tensor | None = None,
        kron_w1_b: Tensor | None = None,
        kron_w2: Tensor | None = None,
        kron_w2_a: Tensor | None = None,
        kron_w2_b: Tensor | None = None,
        kron_t2: Tensor | None = None,
        *,
        scale: float,
        swapped: bool = False,
        transposed: bool = False,
    ) -> None:
        """Prepare the factors, in their dtype.

        w1: kron_w1 (p, q), or kron_w1_a (p, rank) @ kron_w1_b (rank, q).
        w2: kron_w2 (out / p, in / q[, kh, kw]), or kron_w2_a (out / p, rank) @ kron_w2_b (rank, in / q * kernel) or
        (rank, in / q, kh, kw); Tucker: kron_t2 (rank, rank, kh, kw), kron_w2_a (rank, out / p), kron_w2_b
        (rank, in / q). scale: alpha / rank * weight; for LyCORIS the weight alone if w1 and w2 are both stored whole,
        because their alpha says nothing then. swapped: kron(w2, w1) for every place of the kernel, which is what PEFT
        trains on a Conv1d whose w2 is whole (out / p, in / q, k): torch.kron takes the axes of such factors from
        behind. transposed: the update is for a tensor stored (in, out). Raises ValueError if w1 or w2 is missing.
        Source: LyCORIS modules/lokr.py, PEFT tuners/lokr/layer.py.
        """
        w1 = _side("w1", kron_w1, kron_w1_a, kron_w1_b, None, transposed, scale)
        w2 = _side("w2", kron_w2, kron_w2_a, kron_w2_b, kron_t2, transposed, 1.0)
        self._outer, self._inner = (w2, w1) if swapped and kron_w2 is not None else (w1, w2)
        repeats = kron_w2[0, 0].numel() if swapped and kron_w2 is not None else 1
        outer, inner = self._outer.shape[1] // repeats, self._inner.shape[1]
        self._grid = (-1, outer, inner, repeats)
        self._outer_grid, self._inner_grid = (-1, outer, 1, repeats), (-1, 1, inner, 1)

    def add_to(self, block: Tensor, rows: range) -> None:
        """Add the rows `rows` of the update to `block`, (len(rows), in * kernel) in the dtype of the factors."""
        height = self._inner.shape[0]
        for band in range(rows.start // height, -(-rows.stop // height)):
            first, last = max(rows.start, band * height), min(rows.stop, (band + 1) * height)
            outer = self._outer.rows(range(band, band + 1)).view(self._outer_grid)
            inner = self._inner.rows(range(first - band * height, last - band * height)).view(self._inner_grid)
            block[first - rows.start : last - rows.start].view(self._grid).addcmul_(inner, outer)


def _side(
    name: str, whole: Tensor | None, a: Tensor | None, b: Tensor | None, t: Tensor | None, turned: bool, scale: float
) -> Matrix:
    """w1 or w2, `turned` over its diagonal, times `scale`."""
    if whole is not None:
        matrix = whole.flatten(1) * scale
        return Matrix(matrix.T.contiguous() if turned else matrix)
    if a is None or b is None:
        raise ValueError(f"LoKr needs {name}, whole or as two factors")
    left, right = factored(a, b, t)
    return Matrix(right.T, left.T * scale) if turned else Matrix(left * scale, right)
