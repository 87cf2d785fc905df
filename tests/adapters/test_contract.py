"""What every algorithm must keep: the names of its factors, its shape, zero at weight zero, rows alone."""

from __future__ import annotations

import inspect

import pytest
import torch

from bake.adapters import DELTAS, LOW_RANK
from bake.keys.factors import ALGORITHMS, supported

ROWS = [row for row in ALGORITHMS if row.shape is not None]

# Factors of one small module for each algorithm, in every form it has.
EXAMPLES = {
    "lora": [
        {"up": (6, 2), "down": (2, 5)},
        {"up": (6, 2, 1, 1), "down": (2, 5, 3, 3)},
        {"up": (6, 2, 1, 1), "down": (3, 5, 1, 1), "mid": (2, 3, 3, 3)},
        {"up": (6, 0), "down": (0, 5)},
    ],
    "full": [{"diff": (6, 5)}, {"diff": (6, 5, 3, 3)}, {"diff": (6,)}, {"diff": ()}],
}
CASES = [(name, shapes) for name, forms in EXAMPLES.items() for shapes in forms]


def factors(shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def test_the_two_tables_hold_the_same_algorithms() -> None:
    assert {row.name for row in ROWS} == set(DELTAS) == set(EXAMPLES)
    assert set(LOW_RANK) <= set(DELTAS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_algorithm_can_be_done_in_bounded_memory(row) -> None:
    """As two thin matrices, or row by row."""
    assert (row.name in LOW_RANK) != row.by_rows


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_parameters_of_the_maths_are_the_factors_of_the_row(row) -> None:
    for function in (DELTAS[row.name], LOW_RANK.get(row.name)):
        if function is not None:
            names = list(inspect.signature(function).parameters)
            assert names == [*row.factors, "scale"]
            assert "Source" in (inspect.getdoc(function) or "") or "arXiv" in (
                inspect.getmodule(function).__doc__ or ""
            )


@pytest.mark.parametrize(("name", "shapes"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_update_has_the_planned_shape_and_the_dtype_of_its_factors(name, shapes, dtype) -> None:
    update = DELTAS[name](**factors(shapes, dtype), scale=0.7)
    assert tuple(update.shape) == supported(name).shape(shapes)
    assert update.dtype == dtype


@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_weight_zero_changes_nothing_and_weights_add_up(name, shapes) -> None:
    inputs = factors(shapes)
    assert not DELTAS[name](**inputs, scale=0.0).any()
    one, three = DELTAS[name](**inputs, scale=1.0), DELTAS[name](**inputs, scale=3.0)
    torch.testing.assert_close(three, 3 * one)


@pytest.mark.parametrize(("name", "shapes"), [case for case in CASES if case[0] in LOW_RANK])
def test_two_thin_matrices_give_the_same_update_and_its_rows_alone(name, shapes) -> None:
    inputs = factors(shapes)
    left, right = LOW_RANK[name](**inputs, scale=-1.3)
    whole = DELTAS[name](**inputs, scale=-1.3)
    torch.testing.assert_close(left @ right, whole)
    torch.testing.assert_close(left[2:4] @ right, whole[2:4])
