"""The chunk grid."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from bake.execute.chunk import CHUNK_ELEMENTS, chunks, largest_chunk
from bake.keys.factors import as_matrix


@given(st.lists(st.integers(1, 3000), max_size=4).map(tuple))
def test_chunks_tile_the_tensor_and_stay_small(shape: tuple[int, ...]) -> None:
    rows, columns = as_matrix(shape)
    found = list(chunks(shape)) if rows * columns < 10**9 else []
    if not found:
        return
    assert found[0].first == 0
    assert found[-1].last == rows
    assert all(one.last == two.first for one, two in itertools.pairwise(found))
    assert all(chunk.elements <= max(CHUNK_ELEMENTS, columns) for chunk in found)
    assert largest_chunk(shape) == max(chunk.elements for chunk in found)


def test_an_empty_tensor_has_no_chunks() -> None:
    assert list(chunks((0, 5))) == []
    assert largest_chunk((0, 5)) == 0
