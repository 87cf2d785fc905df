"""Rotations in blocks: what OFT, BOFT and their relatives share."""

from __future__ import annotations

import torch
from torch import Tensor

from bake.errors import NonFinite


def skew(blocks: Tensor) -> Tensor:
    """Return B - B^T of each block: (..., b, b), in the dtype of `blocks`."""
    return blocks - blocks.transpose(-1, -2)


def cayley(skewed: Tensor) -> Tensor:
    """Return the rotation (I + Q)(I - Q)^-1 of each skew-symmetric block Q: (..., b, b), dtype kept.

    The two halves commute, and I - Q is never singular, unless Q is so large that I is lost in rounding, or no
    number: then NonFinite is raised. Source: Cayley's transform, arXiv:2306.07280.
    """
    eye = torch.eye(skewed.shape[-1], dtype=skewed.dtype, device=skewed.device)
    rotation: Tensor = torch.linalg.solve_ex(eye - skewed, eye + skewed)[0]
    off = float((rotation @ rotation.transpose(-1, -2) - eye).norm())
    if not off <= (skewed.numel() * torch.finfo(skewed.dtype).eps) ** 0.5:
        raise NonFinite(f"a rotation cannot be computed: I - Q is singular (Q has length {float(skewed.norm()):.3g})")
    return rotation


def towards(rotation: Tensor, strength: float) -> Tensor:
    """Return s R + (1 - s) I of each block, exactly R at strength 1. In between it is no rotation."""
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return strength * rotation + (1 - strength) * eye


def multiply_rows(blocks: Tensor, weight: Tensor) -> Tensor:
    """Return blockdiag(blocks) @ weight: (n * b, columns), in the dtype of `weight`. blocks: (n, b, b)."""
    count, size, _ = blocks.shape
    return (blocks.to(weight.dtype) @ weight.reshape(count, size, weight.shape[1])).reshape(weight.shape)


def multiply_columns(weight: Tensor, blocks: Tensor) -> Tensor:
    """Return weight @ blockdiag(blocks): (rows, n * b), in the dtype of `weight`.

    blocks: (n, b, b), or (1, b, b): the same for every b columns.
    """
    parts = weight.reshape(weight.shape[0], -1, blocks.shape[-1])
    repeated = blocks.to(weight.dtype).expand(parts.shape[1], -1, -1)
    return torch.einsum("rkb,kbc->rkc", parts, repeated).reshape(weight.shape)


def square_blocks(name: str, blocks: Tensor, dimensions: int) -> tuple[int, int]:
    """Return (number of blocks side by side, size of a block). Raises ValueError if they are no square blocks."""
    if blocks.dim() != dimensions or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
        raise ValueError(f"{name} {list(blocks.shape)} is no tensor of {dimensions} dimensions that ends in squares")
    return blocks.shape[-3], blocks.shape[-1]


def blocks_of(rows: range, size: int) -> slice:
    """Return which blocks of `size` rows these rows are. Raises ValueError unless they are whole blocks."""
    if rows.step != 1 or rows.start % size or rows.stop % size:
        raise ValueError(f"rows {rows.start} to {rows.stop} are no whole blocks of {size} rows")
    return slice(rows.start // size, rows.stop // size)


class RowRotation:
    """W' = R^T W in blocks of output rows, then `rescale` row by row."""

    def __init__(
        self, rotation: Tensor, rescale: Tensor | None = None, *, shape: tuple[int, ...], strength: float
    ) -> None:
        """rotation: (n, b, b), R at strength 1. rescale: (out[, 1, ...]). shape: of the weight tensor."""
        count, size, _ = rotation.shape
        if count * size != shape[0]:
            raise ValueError(f"{count} blocks of {size} rows do not make up the {shape[0]} rows of the weight")
        if rescale is not None and rescale.numel() != shape[0]:
            raise ValueError(f"rescale {list(rescale.shape)} does not have one number for each of {shape[0]} rows")
        self.block = size
        self._strength = strength
        self._blocks = towards(rotation, strength).transpose(1, 2)
        self._rescale = None if rescale is None else rescale.reshape(-1, 1)

    def apply(self, weight: Tensor, rows: range) -> None:
        """Overwrite the rows `rows` of the weight, (len(rows), in * kernel), with their new values.

        Raises ValueError if the rows are no whole blocks.
        """
        blocks = blocks_of(rows, self._blocks.shape[-1])
        if self._strength == 0:
            return
        weight.copy_(multiply_rows(self._blocks[blocks], weight))
        if self._rescale is not None:
            weight.mul_(self._rescale[rows.start : rows.stop])
