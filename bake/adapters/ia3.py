"""(IA)3 as LyCORIS trains it: each output or input channel of the weight is scaled (arXiv:2205.05638).

W * (1 + strength * w), w = 0 leaves the weight alone
"""

from __future__ import annotations

import math

from torch import Tensor

from bake.adapters.rows import part


class Scaling:
    """A weight times one number for each output or each input channel; any rows."""

    block: int = 1

    def __init__(
        self, numbers: Tensor, by_column: bool, shape: tuple[int, ...], *, offset: float, factor: float
    ) -> None:
        """Scale by `offset + factor * numbers`.

        numbers: one for each row of a tensor of `shape`, or `by_column` for each input channel. Raises ValueError if
        there are more or fewer.
        """
        channels = shape[1:2] if by_column else shape[:1]
        if channels != (numbers.numel(),):
            side = "input channels" if by_column else "rows"
            raise ValueError(f"(IA)3 has {numbers.numel()} numbers for the {side} of a tensor of shape {list(shape)}")
        flat = offset + factor * numbers.flatten().double()
        self._numbers = flat.repeat_interleave(math.prod(shape[2:])) if by_column else flat.unsqueeze(1)
        self._by_column = by_column

    def apply(self, weight: Tensor, rows: range) -> None:
        """Overwrite the rows `rows` of the weight, (len(rows), in * kernel), with their new values."""
        weight.mul_(self._numbers if self._by_column else part(self._numbers, rows))


class Transform(Scaling):
    """A weight scaled by channel; its bias stays."""

    def __init__(self, ia3_weight: Tensor, on_input: Tensor, *, shape: tuple[int, ...], strength: float) -> None:
        """Take one number for each channel.

        ia3_weight: stored as `weight`: (out) or (in); of a convolution (1, out, 1, 1) or (1, in, 1, 1).
        on_input: one element, not 0 for input channels. shape: (out, in, *kernel). strength: the user's weight.
        Raises ValueError if the number of channels is another. Source: LyCORIS modules/ia3.py.
        """
        super().__init__(ia3_weight, bool(on_input), shape, offset=1.0, factor=strength)
