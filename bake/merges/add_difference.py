"""Add difference: A + alpha * (B - C), what B learned from C on top of A.

Source: AUTOMATIC1111 modules/extras.py; "Add" of SuperMerger. `clip` is meh's weights clip, sd-mecha's clamp_to_ab.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.merges.merge import Chunk, Job, Merge

if TYPE_CHECKING:
    from torch import Tensor


class AddDifference(Merge):
    """A + alpha * (B - C); with `clip` no further than the nearer of A and B. Models: a, b, c. alpha: any number."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.is_plain = not job.values["clip"]

    def blend(self, chunk: Chunk) -> Tensor:
        a, b, c = chunk.models
        result = a + (b - c) * self.job.number("alpha")
        if self.is_plain:
            return result
        from bake.merges.clipping import clipped  # brings torch

        return clipped(result, a, b)
