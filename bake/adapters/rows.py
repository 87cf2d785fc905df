"""Matrices that are stored as the factors of a product: any rows of them, as they are needed."""

from __future__ import annotations

import torch
from torch import Tensor

_SETTLED = 4 * 1024 * 1024  # elements that a product may have to be made once and kept


def part(tensor: Tensor, rows: range) -> Tensor:
    """The rows `rows` of a tensor's first dimension, as a view."""
    return tensor[rows.start : rows.stop : rows.step]


def factored(a: Tensor, b: Tensor, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (left, right) with `left @ right` = `a @ b` or its Tucker form: (out, rank) and (rank, in * kernel).

    Plain: a (out, rank[, 1, 1]), b (rank, in) or (rank, in, kh, kw). Tucker: a (rank, out), b (rank, in),
    t (rank, rank, kh, kw), for sum_ij t[i, j] a[i, :] b[j, :]. In the dtype of the factors.
    Source: LyCORIS functional/general.py, rebuild_tucker.
    """
    if t is None:
        return a.flatten(1), b.flatten(1)
    return a.flatten(1).T, torch.einsum("ijk,jc->ick", t.flatten(2), b.flatten(1)).flatten(1)


class Matrix:
    """A matrix given whole, or as left @ right: made once if it is small, else as much of it as is asked for."""

    def __init__(self, left: Tensor, right: Tensor | None = None) -> None:
        if right is not None and left.shape[0] * right.shape[1] <= _SETTLED:
            left, right = left @ right, None
        self._left, self._right = left, right

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self._left.shape[0], (self._left if self._right is None else self._right).shape[1]

    def rows(self, rows: range) -> Tensor:
        """Return these rows, in the dtype of the factors; they may be a view and are not to be changed."""
        left = part(self._left, rows)
        return left if self._right is None else left @ self._right
