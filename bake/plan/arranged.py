"""The base of a bake as it is put together, from one checkpoint or several, before adapters are fused into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from bake.identify.checkpoint import BaseIdentity
from bake.identify.scaled import ScaledBase
from bake.io.checkpoint import Checkpoint
from bake.io.header import TensorInfo
from bake.plan.model import Coverage, Input, MergeStep, Merging, Replacement, Share, Stored

# Where the values of a tensor come from: bytes of an input, or what is made of those of several.
Origin: TypeAlias = "Stored | MergeStep"

_ALONE = "passthrough"


@dataclass(frozen=True)
class Arranged:
    """A checkpoint, and where the values of its tensors come from."""

    checkpoint: Checkpoint  # its names, shapes, dtypes, files and side files are those of the output
    identity: BaseIdentity
    scaled: ScaledBase
    inputs: tuple[Input, ...]  # the checkpoint's own files first
    origins: Mapping[str, Origin] = field(default_factory=dict)  # full name -> origin; others lie in their own file
    merging: Merging | None = None
    merged: Mapping[str, Coverage] = field(default_factory=dict)  # component -> how many of its tensors are merged
    replaced: tuple[Replacement, ...] = ()
    notes: tuple[str, ...] = ()

    def origin(self, full: str, place: int, name: str, info: TensorInfo) -> Origin:
        """Where the values of a tensor come from, which file `place` of the checkpoint has as `name`."""
        return self.origins.get(full) or Stored(place, name, info.dtype, info.shape, (info.begin, info.end))


def origin_of(full: str, own: Stored, share: Share, place: int) -> Origin:
    """What takes the place of a tensor that is one model's alone: its bytes where they lie as they are to lie.

    full: name of the tensor. own: the tensor of the first model. place: of the model among those merged.
    """
    (stored, *more) = share.stored
    if not more and not share.transposed and math.prod(stored.shape) == math.prod(own.shape):
        return replace(stored, shape=own.shape)
    if columns(share) < columns(Share((own,))):  # the rest of each row is the first model's
        return MergeStep("weighted_sum", full, (0, place), (Share((own,)), share), ("a", "b"), {"alpha": 1.0}, {})
    return MergeStep(_ALONE, full, (place,), (share,), ("a",), {"scale": 1.0}, {})


def columns(share: Share) -> int:
    """Elements in a row of what is stored."""
    return math.prod(share.stored[0].shape[1:])
