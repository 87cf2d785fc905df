"""Add difference: A + alpha * (B - C), what B learned from C on top of A.

Source: AUTOMATIC1111 modules/extras.py; "Add" of SuperMerger. `clip` is meh's weights clip, sd-mecha's clamp_to_ab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge


class AddDifference(Merge):
    """A + alpha * (B - C); with `clip` no further than the nearer of A and B. Models: a, b, c. alpha: any number."""

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        result = a + (b - c) * self.job.number("alpha")
        return clipped(result, a, b) if self.job.values["clip"] else result


def clipped(values: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`values`, where they lie outside of what A and B span the nearer end of it."""
    return torch.minimum(torch.maximum(values, torch.minimum(a, b)), torch.maximum(a, b))
