"""NearSwap: B where it is within t of A, less of it the further they are apart.

Source: mergekit merge_methods/nearswap.py; huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge, between


class NearSwap(Merge):
    """A + min(1, t / |B - A|) * (B - A). Models: a, b. t: from 0."""

    def blend(self, chunk: Chunk) -> Tensor:
        a, b = chunk.models
        apart = (b - a).abs()
        return torch.where(apart <= self.job.number("t"), b, between(a, b, self.job.number("t") / apart))
