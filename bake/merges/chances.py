"""Which elements a random method keeps: drawn by place, so that nothing but seed, names and place decides."""

from __future__ import annotations

import torch
from torch import Tensor

from bake.draws import draws, key_of
from bake.merges.merge import Chunk, Job


def uniform(job: Job, chunk: Chunk, stream: int) -> Tensor:
    """Numbers of [0, 1), multiples of 2^-32, one for each element of the chunk: (rows, columns), float64.

    stream: which of the independent sequences of the tensor is meant, mostly the number of the model.
    """
    shape = chunk.models[0].shape
    key = key_of(job.seed, f"{job.name}\0{stream}")
    found = draws(key, chunk.flat, shape.numel(), chunk.models[0].device)
    return (found.to(torch.float64) * 2.0**-32 + 0.5).reshape(shape)
