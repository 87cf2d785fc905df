"""Files of a checkpoint that is put together from others before any of it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bake.io.checkpoint import CheckpointFile
from bake.io.header import lay_out
from bake.io.tensorfile import TensorFile
from bake.plan.model import Share, Stored


class Part(NamedTuple):
    """One tensor of such a file."""

    share: Share  # where it lies
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """That of what is stored; where that differs, the one that holds all of it."""
        (first, *others) = {stored.dtype for stored in self.share.stored}
        return first if not others else "F32"


class ComposedFile:
    """Tensors of input files, or rows of them, under names of their own and laid end to end."""

    is_list = False
    left_out: tuple[str, ...] = ()

    def __init__(
        self, path: Path, parts: Mapping[str, Part], metadata: Mapping[str, str], inputs: Mapping[int, TensorFile]
    ) -> None:
        """path: what it is called in messages. inputs: the files that the parts lie in, by their places."""
        self.path = path
        self.shares = {name: part.share for name, part in parts.items()}
        self.tensors = lay_out((name, part.dtype, part.shape) for name, part in parts.items())
        self.metadata = dict(metadata)
        self._inputs = inputs
        self.size = sum(info.nbytes for info in self.tensors.values())
        self.modified = self.changed = self.inode = 0

    def read_into(self, begin: int, buffer: memoryview) -> None:
        """As `TensorFile`, of tensors that are stored in one piece: the small ones that planning looks at."""
        end = begin + len(buffer)
        for name, info in self.tensors.items():
            low, high = max(begin, info.begin), min(end, info.end)
            if low < high:
                (stored,) = self.shares[name].stored
                offset = stored.span[0] + low - info.begin
                self._inputs[stored.input].read_into(offset, buffer[low - begin : high - begin])

    def prefetch(self, begin: int, end: int) -> None:
        pass  # only a plan reads it, and little

    def forget(self, begin: int, end: int) -> None:
        pass

    def kernel_span(self) -> None:
        return None

    def close(self) -> None:
        pass  # whoever opened the inputs closes them


def share_of(part: CheckpointFile, place: int, name: str) -> Share:
    """Where a tensor of a checkpoint's file lies. place: of that file among the plan's inputs, if it is one of them."""
    if isinstance(part.file, ComposedFile):
        return part.file.shares[name]
    info = part.file.tensors[name]
    return Share((Stored(place, name, info.dtype, info.shape, (info.begin, info.end)),))


def cut(share: Share, rows: tuple[int, int]) -> Share:
    """Rows [first, past the last) of what a share stands for, which is not transposed."""
    found, at = [], 0
    for stored in share.stored:
        height = stored.shape[0]
        first, last = max(rows[0], at) - at, min(rows[1], at + height) - at
        if first < last:
            found.append(_rows(stored, first, last))
        at += height
    return Share(tuple(found))


def _rows(stored: Stored, first: int, last: int) -> Stored:
    size = (stored.span[1] - stored.span[0]) // stored.shape[0]  # bytes of a row
    begin = stored.span[0] + first * size
    return Stored(
        *(stored.input, stored.name, stored.dtype, (last - first, *stored.shape[1:])),
        (begin, begin + (last - first) * size),
    )


def is_in_place(share: Share, dtype: str) -> bool:
    """True if the bytes of a share, one piece after the other, are those of the tensor, which is stored as `dtype`."""
    return not share.transposed and all(stored.dtype == dtype for stored in share.stored)
