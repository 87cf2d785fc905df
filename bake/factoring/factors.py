"""From exact factors to stored ones, and how far their product is from what they stand for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bake.errors import NonFinite
from bake.factoring.spectrum import Matrix

_BLOCK_ELEMENTS = 1024 * 1024


def clamped(left: Tensor, right: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return both factors cut off at the magnitude that a share of `quantile` of their entries stays within.

    kohya, ComfyUI and diffusers do so at 0.99 unasked (by the quantile of the signed values); it guards against
    single large entries and costs fidelity.
    """
    entries = torch.cat([left.flatten(), right.flatten()]).abs()
    place = max(1, min(len(entries), round(quantile * len(entries))))
    limit = float(entries.kthvalue(place).values)
    return left.clamp(-limit, limit), right.clamp(-limit, limit)


def stored(values: Tensor, dtype: torch.dtype, module: str) -> Tensor:
    """Return `values` rounded once to `dtype`; raises NonFinite if one of them is too large for it."""
    rounded = values.to(dtype).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise NonFinite(
            f"{module}: its factors are too large for {str(dtype).removeprefix('torch.')}; use --dtype fp32 or bf16",
            module=module,
        )
    return rounded


def squares(matrix: Matrix) -> float:
    """Return the sum of the squares of all entries, in float64."""
    return sum(float(block.to(torch.float64).square().sum()) for _, block in matrix.blocks())


def residual(matrix: Matrix, left: Tensor, right: Tensor) -> float:
    """Return |matrix - left @ right|^2, entry by entry in float64, with the factors as they are stored."""
    left, right = left.to(torch.float64), right.to(torch.float64)
    total = 0.0
    for rows, block in matrix.blocks():
        total += float((block.to(torch.float64) - left[rows.start : rows.stop] @ right).square_().sum())
    return total


class Dense:
    """A matrix that is held, as a Matrix."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def blocks(self) -> Iterator[tuple[range, Tensor]]:
        yield range(self.values.shape[0]), self.values


class Product:
    """left @ right as a Matrix that is never formed whole."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        """left: (rows, rank), right: (rank, columns), float64."""
        self.left, self.right = left, right

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def blocks(self) -> Iterator[tuple[range, Tensor]]:
        step = max(1, _BLOCK_ELEMENTS // max(1, self.right.shape[1]))
        for first in range(0, self.left.shape[0], step):
            rows = range(first, min(first + step, self.left.shape[0]))
            yield rows, self.left[first : rows.stop] @ self.right
