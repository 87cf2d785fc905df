"""The singular values of a matrix, and the two factors whose product it is, the largest values first.

Factors are balanced: each singular value is split as its root on both sides, so that neither factor runs out
of the range of 16-bit floats before the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bake.draws import draws, key_of

_EXACT_UP_TO = 512  # of the smaller side: where all singular values cost no more than a sketch of some
_ITERATIONS = 3
_LEAST_SPARE = 16


class Matrix(Protocol):
    """A matrix that may be too large to hold: its rows, some at a time."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def blocks(self) -> Iterator[tuple[range, Tensor]]:
        """(rows, their values), from the first row to the last; each block is valid until the next is taken."""


class Spectrum(NamedTuple):
    """A matrix by its singular values: `left @ right`; any first columns and rows are the best of that rank."""

    left: Tensor  # (rows, n)
    values: Tensor  # (n,), falling
    right: Tensor  # (n, columns)


def exact(dense: Tensor) -> Spectrum:
    """Return all singular values of `dense` and the factors for them, in float64.

    dense: (rows, columns), float64. By the eigenvectors of the smaller of A^T A and A A^T: their basis is orthonormal
    to the last bit, so the whole product is `dense` to 1e-15, and a product of first columns and rows misses the
    best one of its rank by no more than 1e-8 of the largest singular value.
    """
    is_wide = dense.shape[0] < dense.shape[1]
    tall = dense.T if is_wide else dense
    _, basis = torch.linalg.eigh(tall.T @ tall)
    scaled = tall @ basis
    lengths = torch.linalg.vector_norm(scaled, dim=0)
    values, order = torch.sort(lengths, descending=True, stable=True)
    basis, signs = _with_sign(basis[:, order])
    scaled = scaled[:, order] * signs
    roots = values.sqrt()
    thin = scaled / roots.where(roots > 0, torch.ones_like(roots))
    flat = (basis * roots).T
    return Spectrum(flat.T, values, thin.T) if is_wide else Spectrum(thin, values, flat)


def sketched(matrix: Matrix, count: int, seed: int, name: str) -> Spectrum:
    """Return the `count` largest singular values of `matrix` and the factors for them, nearly, in float64.

    A randomised range finder with power iterations, each made orthonormal. name: of the module; the draws
    depend on it and on `seed` alone. The matrix is gone over eight times and never held.
    Source: Halko, Martinsson and Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    rows, columns = matrix.shape
    width = min(rows, columns, count + max(_LEAST_SPARE, count // 2))
    numbers = draws(key_of(seed, name), 0, columns * width, torch.device("cpu"))
    basis = numbers.to(torch.float32).mul_(2.0**-31).reshape(columns, width)
    for _ in range(_ITERATIONS):
        basis = _orthonormal(_transposed_times(matrix, _orthonormal(_times(matrix, basis))))
    outer = _orthonormal(_times(matrix, basis))
    small = exact(_transposed_times(matrix, outer).T.to(torch.float64))
    return Spectrum(outer.to(torch.float64) @ small.left, small.values, small.right)


def spectrum_of(matrix: Matrix, count: int, method: str, seed: int, name: str) -> Spectrum:
    """Return at least the `count` largest singular values of `matrix` with their factors.

    method: "exact", "randomised" or "auto": a sketch where the smaller side is more than 512 and far more
    than `count`.
    """
    smaller = min(matrix.shape)
    if method == "randomised" or (method == "auto" and smaller > max(_EXACT_UP_TO, 4 * count)):
        return sketched(matrix, min(count, smaller), seed, name)
    dense = torch.empty(matrix.shape, dtype=torch.float64)
    for rows, block in matrix.blocks():
        dense[rows.start : rows.stop] = block
    return exact(dense)


def of_product(left: Tensor, right: Tensor) -> Spectrum:
    """Return the singular values of `left @ right` and their factors, without forming the product.

    left: (rows, rank), right: (rank, columns), float64; QR of both, and the singular values of the rank x rank core.
    """
    outer, inner = torch.linalg.qr(left)
    outer_right, inner_right = torch.linalg.qr(right.T)
    core, values, turned = torch.linalg.svd(inner @ inner_right.T, full_matrices=False)
    turned, signs = _with_sign(turned.T)
    roots = values.sqrt()
    return Spectrum(outer @ (core * signs * roots), values, (outer_right @ (turned * roots)).T)


def _with_sign(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Columns turned so that the largest entry of each is positive, and the signs they were turned with."""
    largest = basis.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(basis.gather(0, largest) < 0, -1.0, 1.0)[0].to(basis.dtype)
    return basis * signs, signs


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _times(matrix: Matrix, right: Tensor) -> Tensor:
    found = torch.empty((matrix.shape[0], right.shape[1]), dtype=right.dtype)
    for rows, block in matrix.blocks():
        found[rows.start : rows.stop] = block @ right
    return found


def _transposed_times(matrix: Matrix, right: Tensor) -> Tensor:
    found = torch.zeros((matrix.shape[1], right.shape[1]), dtype=right.dtype)
    for rows, block in matrix.blocks():
        found += block.T @ right[rows.start : rows.stop]
    return found
