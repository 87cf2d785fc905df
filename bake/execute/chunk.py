"""Which rows of a tensor are read, worked on and written together."""

from __future__ import annotations

from typing import NamedTuple

# Every call of torch hands Python's lock to another worker, and getting it back takes some 30 microseconds: calls
# have to be long compared to that, even if what they work on then no longer fits into a core's own cache.
CHUNK_ELEMENTS = 1024 * 1024


class Chunk(NamedTuple):
    """Rows [first, last) of a tensor seen as a matrix."""

    first: int
    last: int
    columns: int

    @property
    def elements(self) -> int:
        return (self.last - self.first) * self.columns


def chunk_height(columns: int, elements: int | None = None) -> int:
    """How many rows a chunk has: at least one, else at most `elements` (CHUNK_ELEMENTS) together."""
    return max(1, (elements or CHUNK_ELEMENTS) // max(1, columns))
