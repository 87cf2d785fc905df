"""Which rows of a tensor are worked on together.

The grid follows from the tensor's shape alone, never from free memory or threads, so that neither
changes how a matrix product is cut up and with it the last bit of a float32 result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bake.keys.factors import as_matrix

CHUNK_ELEMENTS = 512 * 1024  # 2 MiB in float32: stays in the cache between widening, adding and rounding


class Chunk(NamedTuple):
    """Rows [first, last) of a tensor seen as a matrix."""

    first: int
    last: int
    columns: int

    @property
    def elements(self) -> int:
        return (self.last - self.first) * self.columns


def chunks(shape: tuple[int, ...]) -> Iterator[Chunk]:
    """The chunks of a tensor, in order; at least one row each."""
    rows, columns = as_matrix(shape)
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for first in range(0, rows, step):
        yield Chunk(first, min(rows, first + step), columns)


def largest_chunk(shape: tuple[int, ...]) -> int:
    """Elements of the largest chunk of a tensor."""
    return next((chunk.elements for chunk in chunks(shape)), 0)
