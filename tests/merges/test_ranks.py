"""Order statistics are those of a sort, in few passes, for any chunks."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bake.merges import ranks
from bake.merges.merge import Chunk
from bake.merges.ranks import Ranks


def search(values: torch.Tensor, wanted: list[int], step: int) -> tuple[list[float], int]:
    """(the numbers of these ranks, how many passes it took)."""
    chunks = [Chunk(first, [values[first : first + step]]) for first in range(0, len(values), step)]
    found = Ranks([(lambda chunk: chunk.models[0], rank) for rank in wanted])
    count = 0
    for survey in found.passes():
        count += 1
        random.Random(count).shuffle(chunks)
        for chunk in chunks:
            survey.add(chunk)
    return found.found, count


NUMBERS = st.floats(0, allow_nan=False, allow_infinity=True) | st.sampled_from([0.0, 1.0, 0.5, 5e-324])


@settings(max_examples=40)
@given(st.lists(NUMBERS, min_size=1, max_size=60), st.integers(1, 20), st.sampled_from([0, 2, 10**6]), st.data())
def test_numbers_of_a_rank_are_those_of_a_sort(numbers: list[float], step: int, few: int, data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.integers(0, len(numbers) - 1), min_size=1, max_size=3))
    values = torch.tensor(numbers, dtype=torch.float64).unsqueeze(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_COLLECTED", few)  # also where candidates are never few enough to be collected
        found, passes = search(values, wanted, step)
    assert found == [sorted(numbers)[rank] for rank in wanted]
    assert passes <= 4


def test_two_passes_are_enough_for_most_tensors() -> None:
    values = torch.randn(100_000, 3, dtype=torch.float64).abs()
    found, passes = search(values, [0, 150_000, 299_999], 7_000)
    ordered = values.flatten().sort().values
    assert found == [float(ordered[0]), float(ordered[150_000]), float(ordered[-1])]
    assert passes == 2


def test_equal_numbers_end_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_COLLECTED", 10)
    values = torch.full((1000, 1), math.pi, dtype=torch.float64)
    assert search(values, [17], 100) == ([math.pi], 1)
