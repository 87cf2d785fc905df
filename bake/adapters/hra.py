"""HRA: a chain of reflections of the input columns.

H = (I - 2 u_1 u_1^T)(I - 2 u_2 u_2^T) ...,  every u_i scaled to length 1
W' = W + s (W H - W)

The chain is one low-rank change, H = I - U M^-1 U^T, where M has 1/2 on its diagonal and u_i . u_j above
it; so no (in, in) matrix is ever made. PEFT knows no strength; in between, bake goes straight from the
old weight to the new one. The bias is not concerned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Transform:
    """Householder reflections. Source: arXiv:2405.17484; PEFT tuners/hra/layer.py.

    The product as one matrix: Joffrain et al., Accumulating Householder Transformations, Revisited (2006).
    """

    block: int = 1

    def __init__(self, hra_u: Tensor, *, shape: tuple[int, ...], strength: float, apply_gs: bool = False) -> None:
        """Prepare the chain, in the dtype of `hra_u`.

        hra_u: (in * kernel, r). shape: of the weight tensor. strength: what the user typed. apply_gs:
        PEFT's apply_GS, make the vectors orthogonal first (Gram-Schmidt). Raises ValueError if they are
        not as long as the weight is wide, one is zero, or with apply_gs they depend on each other.
        """
        columns = math.prod(shape[1:])
        if hra_u.dim() != 2 or hra_u.shape[0] != columns:
            raise ValueError(f"hra_u {list(hra_u.shape)} does not reflect the {columns} columns of the weight")
        lengths = hra_u.norm(dim=0)
        if not lengths.all():
            raise ValueError(f"hra_u {list(hra_u.shape)} has a vector of zeros, which reflects nothing")
        vectors: Tensor = hra_u / lengths
        if apply_gs:
            vectors = _orthogonal(vectors)
        half = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device) / 2
        middle = half + (vectors.T @ vectors).triu(1)
        self._strength = strength
        self._left = vectors * strength
        right: Tensor = torch.linalg.solve_triangular(middle, vectors.T, upper=True)
        self._right = right

    def apply(self, weight: Tensor, rows: range) -> None:
        """Overwrite the rows `rows` of the weight, (len(rows), in * kernel), with their new values."""
        if self._strength != 0:
            weight.addmm_(weight @ self._left.to(weight.dtype), self._right.to(weight.dtype), alpha=-1)


def _orthogonal(vectors: Tensor) -> Tensor:
    """The vectors made orthogonal, first to last; a reflection does not ask for their signs."""
    if vectors.shape[1] > vectors.shape[0]:
        raise ValueError(f"{vectors.shape[1]} vectors of {vectors.shape[0]} numbers cannot all be orthogonal")
    basis: Tensor
    basis, remains = torch.linalg.qr(vectors)
    if (remains.diagonal().abs() <= 16 * torch.finfo(vectors.dtype).eps).any():
        raise ValueError("the vectors of hra_u depend on each other, so they cannot be made orthogonal")
    return basis
