"""Train difference: add B - C to A, more of it where A still is far from B.

`train` is SuperMerger's trainDifference (scripts/mergers/mergers.py) with its constant of 1.8; the other two masks
are sd-mecha's add_opposite_mask and add_strict_opposite_mask (merge_methods/linear.py). Where a mask
divides zero by zero it is 0, so tensors on which B equals C stay those of A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bake.merges.clipping import clipped
from bake.merges.merge import Chunk, Merge


class TrainDifference(Merge):
    """A + alpha * mask * (B - C). Models: a, b, c. alpha: any number. mask: train, opposite or strict_opposite."""

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        mask = _MASKS[str(self.job.values["mask"])](a, b, c)
        result = a + (b - c) * (mask * self.job.number("alpha"))
        return clipped(result, a, b) if self.job.values["clip"] else result


def _train(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """From 0 where A is B to 1.8 where B is C."""
    far = (b - a).abs()
    return _quotient(far, far + (b - c).abs()) * 1.8


def _opposite(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """From 0 where A is B to 2 where A and B lie on opposite sides of C, equally far."""
    far = (a - b).abs()
    return _quotient(far, far + (a + b - c * 2).abs()) * 2


def _strict_opposite(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """0 where A and B lie on the same side of C, else up to 2."""
    largest = torch.maximum((a - c).abs(), (b - c).abs())
    return _quotient(((c - a) * (b - c)).clamp(min=0), largest * largest) * 2


_MASKS = {"train": _train, "opposite": _opposite, "strict_opposite": _strict_opposite}


def _quotient(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under == 0, 0.0, over / under)
