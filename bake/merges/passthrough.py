"""Passthrough: one model, times a number. With slices of layers, which the plan makes, a stack of layers of several.

Source: mergekit merge_methods/passthrough.py; "replace" and "self" of SuperMerger and Model Mixer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.merges.merge import Chunk, Merge

if TYPE_CHECKING:
    from torch import Tensor


class Passthrough(Merge):
    """scale * A. Models: a. scale: any number."""

    is_plain = True

    def blend(self, chunk: Chunk) -> Tensor:
        return chunk.models[0] * self.job.number("scale")
