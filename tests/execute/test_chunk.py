"""The chunk grid."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bake.execute.chunk import CHUNK_ELEMENTS, Chunk, chunk_height


@given(st.integers(0, 10**7))
def test_a_chunk_is_small_or_one_row(columns: int) -> None:
    height = chunk_height(columns)
    assert height == 1 or height * columns <= CHUNK_ELEMENTS
    assert (height + 1) * columns > CHUNK_ELEMENTS or columns == 0


def test_it_may_be_smaller() -> None:
    assert chunk_height(10, 35) == 3
    assert chunk_height(10, 3) == 1
    assert Chunk(2, 5, 10).elements == 30
