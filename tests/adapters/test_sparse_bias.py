"""LyCORIS' sparse remainders of an extraction, against a dense matrix filled element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random
from trainers import in_pieces, rows_of

from bake.adapters import sparse_bias

INDICES = torch.tensor([[0, 0, 3, 7, 7, 2], [5, 0, 2, 1, 5, 4]], dtype=torch.int16)
VALUES = torch.from_numpy(random(0, 6))
SIZE = torch.tensor([8, 6], dtype=torch.int16)


def dense(scale: float):
    matrix = np.zeros((8, 6))
    for row, column, value in zip(*INDICES.tolist(), VALUES.tolist(), strict=True):
        matrix[row, column] += scale * value
    return matrix


@pytest.mark.parametrize("scale", [1.0, 0.7, -0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64])
def test_the_definition(scale: float, dtype) -> None:
    """Positions may come widened to the dtype that everything is computed in."""
    found = rows_of(sparse_bias.Update(INDICES.to(dtype), VALUES, SIZE.to(dtype), scale=scale), range(8), 6)
    np.testing.assert_array_equal(found, dense(scale))


def test_an_element_stored_twice_counts_twice() -> None:
    twice, values = torch.tensor([[1, 1], [2, 2]]), torch.tensor([1.0, 2.5])
    assert rows_of(sparse_bias.Update(twice, values, SIZE, scale=1.0), range(8), 6, torch.float32)[1, 2] == 3.5


def test_rows_alone_are_the_rows_of_the_whole() -> None:
    for dtype in (torch.float32, torch.float64):
        whole = rows_of(sparse_bias.Update(INDICES, VALUES.to(dtype), SIZE, scale=0.7), range(8), 6, dtype)
        assert whole.dtype == dtype
        pieces = [
            rows_of(sparse_bias.Update(INDICES, VALUES.to(dtype), SIZE, scale=0.7), rows, 6, dtype)
            for rows in in_pieces(8)
        ]
        assert torch.equal(torch.cat(pieces), whole)
        for rows in (range(1, 4), range(4, 7), range(0)):
            part = rows_of(sparse_bias.Update(INDICES, VALUES.to(dtype), SIZE, scale=0.7), rows, 6, dtype)
            assert torch.equal(part, whole[rows.start : rows.stop])


@pytest.mark.parametrize("where", [[[8], [0]], [[0], [6]], [[-1], [0]], [[0], [-1]]])
def test_positions_outside_the_matrix_are_refused(where) -> None:
    with pytest.raises(ValueError, match="outside"):
        rows_of(sparse_bias.Update(torch.tensor(where), torch.ones(1), SIZE, scale=1.0), range(8), 6)


def test_rows_beyond_the_stored_size_are_refused() -> None:
    with pytest.raises(ValueError, match="has 8 rows"):
        rows_of(sparse_bias.Update(INDICES, VALUES, SIZE, scale=1.0), range(9), 6)


def test_what_lycoris_stores_of_a_sparse_matrix_is_read_back() -> None:
    """Its own cut, and the conversions of its extract_diff."""
    utilities = pytest.importorskip("lycoris.utils", reason="the LyCORIS oracle is not installed")
    difference = torch.from_numpy(random(1, 8, 6)).float()
    kept = utilities.make_sparse(difference.clone(), 0.9).to_sparse().coalesce()
    positions, size = kept.indices().to(torch.int16), torch.tensor(difference.shape).to(torch.int16)
    found = rows_of(sparse_bias.Update(positions, kept.values(), size, scale=1.0), range(8), 6, torch.float32)
    assert torch.equal(found, kept.to_dense())
    assert 0 < found.count_nonzero() < found.numel()
