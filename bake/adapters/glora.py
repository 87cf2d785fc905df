"""GLoRA: an update with a part that depends on the weight itself (arXiv:2306.07967, support tensors A and B).

    W + strength * scale * ((W @ a1) @ a2 + b1 @ b2)

For a convolution W @ a1 runs over the input channels, at each kernel position. The first LyCORIS wrote the
same update with 1 and 2 exchanged: (W @ a2) @ a1 + b2 @ b1.
"""

from __future__ import annotations

import math

from torch import Tensor

from bake.adapters.lora import low_rank
from bake.adapters.rows import part


class Transform:
    """A weight plus its GLoRA update; any rows."""

    block: int = 1

    def __init__(
        self,
        a1: Tensor,
        a2: Tensor,
        b1: Tensor,
        b2: Tensor,
        bm: Tensor | None = None,
        *,
        shape: tuple[int, ...],
        strength: float,
        scale: float,
    ) -> None:
        """Take the factors apart.

        a1: (in, rank[, 1, 1]). a2: (rank, in[, 1, 1]). b1: (out, rank[, 1, 1]). b2: (rank, in[, kh, kw]); with bm
        (rank, in[, 1, 1]) and bm (rank, rank, kh, kw), as the middle of a Tucker LoRA. First spelling: a1 (rank, in),
        a2 (in, rank), b1 (rank, in), b2 (out, rank); never with a kernel. shape: (out, in, *kernel). strength: the
        user's weight. scale: alpha / rank; the first LyCORIS trained with it squared by mistake, while its merge and
        every reader apply it once, as here. Raises ValueError if the factors fit neither spelling, or not the shape.
        Source: LyCORIS modules/glora.py; which spelling it is: ComfyUI comfy/weight_adapter/glora.py.
        """
        if len(shape) < 2:
            raise ValueError(f"GLoRA updates weights of layers, not a tensor of shape {list(shape)}")
        if _is_first_spelling(a1, a2, b1, b2, shape):
            a1, a2, b1, b2 = a2, a1, b2, b1
        self._channels, self._kernel = shape[1], math.prod(shape[2:])
        self._a1, self._a2 = a1.flatten(1), a2.flatten(1) * (strength * scale)
        self._left, self._right = low_rank(b1, b2, bm, scale=strength * scale)
        self._is_nothing = strength * scale == 0
        found = (len(self._a1), self._a2.shape[1], len(self._left), self._right.shape[1])
        expected = (shape[1], shape[1], shape[0], shape[1] * self._kernel)
        if found != expected:
            raise ValueError(f"GLoRA factors of sizes {list(found)} do not fit a weight of shape {list(shape)}")

    def apply(self, weight: Tensor, rows: range) -> None:
        """Overwrite the rows `rows` of the weight, (len(rows), in * kernel), with their new values."""
        if self._is_nothing:
            return
        a1, a2 = self._a1.to(weight.dtype), self._a2.to(weight.dtype)
        by_position = weight.view(-1, self._channels, self._kernel).transpose(1, 2)
        mixed = by_position.reshape(-1, self._channels) @ a1
        weight.addmm_(part(self._left, rows).to(weight.dtype), self._right.to(weight.dtype))
        if self._kernel == 1:
            weight.addmm_(mixed, a2)
        else:
            by_position.add_((mixed @ a2).view(by_position.shape))


def _is_first_spelling(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, shape: tuple[int, ...]) -> bool:
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    first = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    if not new and not first:
        sizes = ", ".join(str(list(factor.shape)) for factor in (a1, a2, b1, b2))
        raise ValueError(f"the ranks of a1, a2, b1, b2 {sizes} differ")
    if new and first:  # every square layer, in either spelling
        return a2.shape[0] == shape[0] == shape[1]
    return first
