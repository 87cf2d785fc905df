"""Sums are exact enough, and the same to the last bit however the rows are cut and in whatever order they come."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bake.merges.merge import Chunk
from bake.merges.sums import Sums, gram, products, row_sums


def total(values: torch.Tensor, cuts: list[int], seed: int = 0) -> torch.Tensor:
    """Sums over all rows of `values`, in chunks that begin at the `cuts`."""
    places = sorted({0, *cuts, len(values)})
    chunks = [Chunk(first, [values[first:last]]) for first, last in itertools.pairwise(places)]
    random.Random(seed).shuffle(chunks)
    sums = Sums(len(values), lambda chunk: chunk.models[0])
    for chunk in chunks:
        sums.add(chunk)
    return sums.total


@given(st.integers(1, 200), st.lists(st.integers(1, 199), max_size=12), st.integers(0, 10))
def test_any_cuts_in_any_order_give_the_same_bits(rows: int, cuts: list[int], seed: int) -> None:
    values = torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    cuts = [cut for cut in cuts if cut < rows]
    assert torch.equal(total(values, cuts, seed), total(values, []))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 64, 1000])
def test_sums_are_those_of_the_rows(rows: int) -> None:
    values = torch.randn(rows, 4, dtype=torch.float64)
    expected = [math.fsum(column) for column in values.T.tolist()]
    assert total(values, [rows // 3]).tolist() == pytest.approx(expected, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 100])
def test_rows_are_summed(columns: int) -> None:
    values = torch.randn(5, columns, dtype=torch.float64)
    expected = [math.fsum(row) for row in values.tolist()]
    assert row_sums(values.clone()).tolist() == pytest.approx(expected, rel=1e-14, abs=1e-14)


def test_inner_products_of_every_two() -> None:
    vectors = [torch.randn(1, 9, dtype=torch.float64) for _ in range(4)]
    found = gram(products(vectors)[0].tolist(), 4)
    expected = [[float((one * other).sum()) for one in vectors] for other in vectors]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-13)
