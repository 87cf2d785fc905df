"""One rounding from float64, where torch's own conversion makes two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bake.execute.narrow import narrow
from bake.verify.rounding import round_once

TAGS = {"F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize(("tag", "dtype"), TAGS.items())
def test_values_beside_a_tie_go_to_their_own_side(tag: str, dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    tie = 1 + step / 2
    values = torch.tensor([tie, np.nextafter(tie, 2), np.nextafter(tie, 0), -np.nextafter(tie, 2)], dtype=torch.float64)
    assert narrow(values, dtype).double().tolist() == [1.0, 1 + step, 1.0, -1 - step]
    assert values.to(dtype).double().tolist() == [1.0, 1.0, 1.0, -1.0]  # what it is for


@given(st.lists(st.floats(-6e4, 6e4), min_size=1), st.sampled_from(sorted(TAGS)), st.integers(0, 2**32))
def test_everything_is_rounded_like_the_independent_rounding_of_verification(values, tag: str, seed: int) -> None:
    exact = torch.tensor(values, dtype=torch.float64)
    near_ties = torch.from_numpy(np.random.default_rng(seed).standard_normal(64)).to(TAGS[tag]).double()
    near_ties = near_ties * (1 + torch.finfo(TAGS[tag]).eps / 2) * (1 + 1e-15)
    for case in (exact, near_ties):
        assert np.array_equal(narrow(case, TAGS[tag]).double(), round_once(case.numpy(), tag))


def test_infinities_stay_and_wider_dtypes_are_left_to_torch() -> None:
    values = torch.tensor([torch.inf, -torch.inf, 0.1], dtype=torch.float64)
    assert narrow(values, torch.float16)[:2].tolist() == [torch.inf, -torch.inf]
    assert torch.equal(narrow(values, torch.float32), values.float())
    assert torch.equal(narrow(values.float(), torch.float16), values.float().half())
