"""The base of a bake as it is put together, from one checkpoint or several, before adapters are fused into it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from bake.identify.checkpoint import BaseIdentity, identify_checkpoint
from bake.identify.scaled import ScaledBase, scaled_layers
from bake.io.checkpoint import Checkpoint, CheckpointFile, Packaging
from bake.io.jsontext import shortened
from bake.io.tensorfile import TensorFile
from bake.plan.composed import share_of
from bake.plan.inputs import input_of
from bake.plan.listing import some
from bake.plan.model import Coverage, Input, MergeStep, Merging, Replacement, Share
from bake.plan.record import RECIPE_KEY

# Where the values of a tensor come from: bytes of inputs, or what is made of those of several models.
Origin: TypeAlias = "Share | MergeStep"

_ALONE = "passthrough"


@dataclass(frozen=True)
class Arranged:
    """A checkpoint, and where the values of its tensors come from."""

    base: Path  # as it was named
    packaging: Packaging  # of what is read
    checkpoint: Checkpoint  # its names, shapes, dtypes, files and side files are those of the output
    identity: BaseIdentity
    scaled: ScaledBase
    inputs: tuple[Input, ...]  # the base's own files first
    files: Mapping[int, TensorFile]  # those of them that tensors lie in, by their places
    origins: Mapping[str, Origin] = field(default_factory=dict)  # full name -> origin; others are the checkpoint's own
    contents: Mapping[str, str] = field(default_factory=dict)  # side files with a new content
    like: Path | None = None  # the folder whose side files are taken, if it is another's
    merging: Merging | None = None
    merged: Mapping[str, Coverage] = field(default_factory=dict)  # component -> how many of its tensors are merged
    replaced: tuple[Replacement, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def records(self) -> Iterator[tuple[str, bool]]:
        """The recipes that earlier bakes stored in what it is made of, each with whether that is merged with others."""
        if self.merging is None:
            metadata: Iterable[Mapping[str, str]] = [part.file.metadata for part in self.checkpoint.files]
        else:
            metadata = [model.history for model in self.merging.models]
        return ((each[RECIPE_KEY], self.merging is not None) for each in metadata if RECIPE_KEY in each)

    def origin(self, part: CheckpointFile, place: int, name: str) -> Origin:
        """Where the values of a tensor come from, which file `place` of the checkpoint, `part`, has as `name`."""
        return self.origins.get(part.group + name) or share_of(part, place, name)


def arranged(checkpoint: Checkpoint) -> Arranged:
    """A checkpoint as it is. Its files are the first inputs."""
    return Arranged(
        base=checkpoint.root,
        packaging=checkpoint.packaging,
        checkpoint=checkpoint,
        identity=identify_checkpoint(checkpoint),
        scaled=scaled_layers(checkpoint),
        inputs=tuple(input_of(part.file, "base") for part in checkpoint.files),
        files=dict(enumerate(part.file for part in checkpoint.files)),
        notes=tuple(
            f"{part.file.path.name}: beside its state_dict there is more, which is not read: "
            f"{some([shortened(each) for each in part.file.left_out])}"
            for part in checkpoint.files
            if part.file.left_out
        ),
    )


def origin_of(full: str, own: Share, shape: tuple[int, ...], share: Share, place: int) -> Origin:
    """What takes the place of a tensor that is one model's alone: its bytes where they lie as they are to lie.

    full: name of the tensor. own: what the first model has, of this shape. place: of the model among those merged.
    """
    (stored, *more) = share.stored
    if not more and not share.transposed and math.prod(stored.shape) == math.prod(shape):
        return Share((replace(stored, shape=shape),))
    if columns(share) < columns(own):  # the rest of each row is the first model's
        return MergeStep("weighted_sum", full, (0, place), (own, share), ("a", "b"), {"alpha": 1.0}, {})
    return share


def passthrough(full: str, share: Share) -> MergeStep:
    """What makes a tensor of one that is stored in several pieces, or with its rows as columns."""
    return MergeStep(_ALONE, full, (0,), (share,), ("a",), {"scale": 1.0}, {})


def columns(share: Share) -> int:
    """Elements in a row of what is stored."""
    return math.prod(share.stored[0].shape[1:])
