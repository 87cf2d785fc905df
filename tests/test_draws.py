"""Draws depend on seed, name and place alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bake.draws import draws, draws_at, key_of

CPU = torch.device("cpu")


def splitmix(seed: int, count: int) -> list[int]:
    """The published generator, in Python's own integers."""
    mask, found = (1 << 64) - 1, []
    for place in range(1, count + 1):
        z = (seed + place * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def test_numbers_are_those_of_splitmix64() -> None:
    found = draws(1234567, 2, 200_000, CPU).view(torch.int64).numpy().view(np.uint64).tolist()
    assert found[:2] == [6457827717110365317, 3203168211198807973]  # as published for this seed
    assert found == splitmix(1234567, 100_000)


@pytest.mark.parametrize("first", [0, 1, 2**33 + 1])
def test_the_draw_of_an_element_is_the_same_in_any_chunk_and_by_itself(first: int) -> None:
    key = key_of(5, "layer.weight")
    whole = draws(key, first, 70_000, CPU)
    pieces = [draws(key, first + begin, min(999, 70_000 - begin), CPU) for begin in range(0, 70_000, 999)]
    assert torch.equal(torch.cat(pieces), whole)
    chosen = torch.randperm(70_000)[:1000]
    assert torch.equal(draws_at(key, chosen + first), whole[chosen])


def test_seed_and_name_change_everything() -> None:
    one, two, three = (draws(key, 0, 1000, CPU) for key in (key_of(0, "a"), key_of(1, "a"), key_of(0, "b")))
    assert int((one == two).sum()) < 3
    assert int((one == three).sum()) < 3


def test_draws_are_uniform_and_neighbours_are_independent() -> None:
    found = draws(key_of(0, "x"), 0, 1_000_000, CPU).double() / 2**32
    assert abs(float(found.mean())) < 0.002
    assert abs(float(found.var()) - 1 / 12) < 0.001
    assert abs(float((found[1:] * found[:-1]).mean())) < 0.001
    counts = torch.histc(found, 64, -0.5, 0.5)
    assert float(((counts - 15625) ** 2 / 15625).sum()) < 120  # chi squared of 63 degrees of freedom
