"""Clipping: no element of the result further than the nearer of A and B."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped(values: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`values`, where they lie outside of what A and B span the nearer end of it."""
    return torch.minimum(torch.maximum(values, torch.minimum(a, b)), torch.maximum(a, b))
