"""Rotate: turn A's rows by the orthogonal matrix that brings them nearest to B's (Procrustes).

Source: sd-mecha merge_methods/svd.py. Different here: what a rotation does where the models say nothing is nothing, as
far as that is possible; a fractional power turns every plane by that share of its angle, for wide matrices
too, in the space that the rows of both models span. The bits depend on the machine's LAPACK.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge, between

_NEGLIGIBLE = 1e-12  # of the largest singular value
_SMALLEST_SINE = 1e-12


class Rotate(Merge):
    """lerp(A', B' Q^-1, alpha) Q^alignment + lerp(mean A, mean B, alignment). Models: a, b; vectors: lerp by alpha.

    A' = A less `centralization` times the mean of its rows. alpha, alignment, centralization: 0 to 1. A row is an
    output channel; of convolutions larger than 1 x 1 a kernel.
    """

    whole = True

    def blend(self, chunk: Chunk) -> Tensor:
        alpha, alignment = self.job.number("alpha"), self.job.number("alignment")
        a, b = chunk.models
        shape = self.job.shape
        if len(shape) < 2 or torch.equal(a, b):
            return between(a, b, alpha)
        if len(shape) > 2 and shape[2:].count(1) < len(shape) - 2:
            a, b = (model.reshape(shape[0] * shape[1], -1) for model in (a, b))
        mean_a, mean_b = (model.mean(0) * self.job.number("centralization") for model in (a, b))
        rotated = _rotated(a - mean_a, b - mean_b, alpha, alignment)
        return (rotated + between(mean_a, mean_b, alignment)).reshape(chunk.models[0].shape)


def _rotated(a: Tensor, b: Tensor, alpha: float, alignment: float) -> Tensor:
    """lerp(a, b Q^-1, alpha) Q^alignment. a, b: (rows, columns)."""
    rows, columns = a.shape
    result: Tensor
    if columns > 2 * rows:  # in coordinates of the space that the rows of both span
        basis = torch.linalg.qr(torch.cat([a, b]).T).Q
        result = _rotated(a @ basis, b @ basis, alpha, alignment) @ basis.T
        return result
    rotation = _nearest(a, b, proper=alignment not in (0, 1))
    if alpha:
        a = between(a, b @ rotation.T, alpha)
    result = a @ _power(rotation, alignment)
    return result


def _nearest(a: Tensor, b: Tensor, proper: bool) -> Tensor:
    """The orthogonal matrix Q with the smallest |a Q - b|; `proper`: of those without reflection."""
    left, sizes, right = torch.linalg.svd(a.T @ b)
    right = right.T
    rank = int((sizes > sizes[0] * _NEGLIGIBLE).sum())
    # Of the directions that nothing is known of, the ones that move least.
    turn_left, _, turn_right = torch.linalg.svd(left[:, rank:].T @ right[:, rank:])
    left[:, rank:] = left[:, rank:] @ turn_left
    right[:, rank:] = right[:, rank:] @ turn_right.T
    if proper and torch.linalg.det(left @ right.T) < 0:
        left[:, -1].neg_()
    rotation: Tensor = left @ right.T
    return rotation


def _power(rotation: Tensor, share: float) -> Tensor:
    """Every plane turned by this share of its angle; what is turned by half a turn has no direction to go."""
    if share == 1:
        return rotation
    # Q = C + K with symmetric C = cos and antisymmetric K = sin J, which commute.
    values, vectors = torch.linalg.eigh((rotation + rotation.T) / 2)
    values = values.clamp(-1, 1)
    angles = values.acos()
    sines = ((1 - values) * (1 + values)).sqrt()
    slopes = torch.where(sines < _SMALLEST_SINE, share, (angles * share).sin() / sines)
    cosines = (vectors * (angles * share).cos()) @ vectors.T
    power: Tensor = cosines + (vectors * slopes) @ vectors.T @ ((rotation - rotation.T) / 2)
    return power
