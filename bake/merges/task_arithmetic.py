"""Task arithmetic: the weighted differences from the base, all of them, added to it.

Source: arXiv:2212.04089; mergekit merge_methods/generalized_task_arithmetic.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bake.merges.linear import added_up
from bake.merges.merge import Chunk, Merge, differences

if TYPE_CHECKING:
    from torch import Tensor


class TaskArithmetic(Merge):
    """W0 + lambda * sum(w d), divided by sum(w) if `normalize`. Models: base, one or more."""

    is_plain = True

    def blend(self, chunk: Chunk) -> Tensor:
        weights = self.job.numbers("weight")
        changes = differences(chunk.models)
        total = added([change * weight for change, weight in zip(changes, weights, strict=True)])
        if self.job.values["normalize"]:
            total = total / added_up(weights)
        return chunk.models[0] + total * self.job.number("lambda")


def added(values: Sequence[Tensor]) -> Tensor:
    """The sum of some tensors, in their order."""
    total = values[0]
    for other in values[1:]:
        total = total + other
    return total
