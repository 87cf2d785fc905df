"""Top-k tensor sum: A's values in the order of B's, those whose magnitude ranks within a region.

Source: meh sd_meh/merge_methods.py; sd-mecha merge_methods/slicing.py counts the magnitude just below the region in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Merge
from bake.merges.tensor_sum import region


class TopKTensorSum(Merge):
    """A, but the k-th smallest of its values goes where B has its k-th smallest, if that value's magnitude is
    within [offset, offset + width) of all, as shares of their number. Models: a, b. width: -1 to 1.
    """

    whole = True

    def blend(self, chunk: Chunk) -> Tensor:
        a, b = (model.reshape(-1) for model in chunk.models)
        ordered = a.sort(stable=True).values
        sizes = ordered.abs()
        start, end, is_outside = region(self.job.number("width"), self.job.number("offset"), a.numel())
        limits = sizes.sort().values
        above = sizes > limits[start - 1] if start > 0 else torch.ones_like(sizes, dtype=torch.bool)
        below = sizes <= limits[end - 1] if end > 0 else torch.zeros_like(above)
        is_meant = (above & below) != is_outside
        places = b.argsort(stable=True)
        result = torch.empty_like(a)
        result[places] = torch.where(is_meant, ordered, a[places])
        return result.reshape(chunk.models[0].shape)
