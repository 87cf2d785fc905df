"""Linear: the weighted sum or mean of any number of models.

Source: mergekit merge_methods/linear.py; kohya's merge_models.py is `normalize=false` with weights of 1/N,
sd-mecha's n_average the default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.merges.merge import Chunk, Merge

if TYPE_CHECKING:
    from torch import Tensor


class Linear(Merge):
    """sum(w W), divided by sum(w) if `normalize`. Models: one or more."""

    is_plain = True

    def blend(self, chunk: Chunk) -> Tensor:
        weights = self.job.numbers("weight")
        total = chunk.models[0] * weights[0]
        for model, weight in zip(chunk.models[1:], weights[1:], strict=True):
            total += model * weight
        if self.job.values["normalize"]:
            total /= added_up(weights)
        return total


def added_up(weights: tuple[float, ...]) -> float:
    """The sum of the weights, in their order."""
    total = 0.0
    for weight in weights:
        total += weight
    return total
