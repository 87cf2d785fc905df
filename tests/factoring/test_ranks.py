"""How many singular values are kept: kohya's and LyCORIS' criteria, without kohya's one more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random

from bake.errors import UsageError
from bake.factoring.ranks import kept
from bake.plan.adapter import Ranks, parse_rule

VALUES = np.sort(np.abs(random(5, 30)))[::-1].copy()


def kohya(values: np.ndarray, method: str, parameter: float) -> int:
    """kohya sd-scripts networks/resize_lora.py rank_resize, as it is: index functions and the + 1."""
    if method == "ratio":
        index = int(np.sum(values > values[0] / parameter))
    elif method == "cumulative":
        index = int(np.searchsorted(np.cumsum(values) / values.sum(), parameter)) + 1
    else:
        index = int(np.searchsorted(np.cumsum(values**2) / (values**2).sum(), parameter**2)) + 1
    return max(1, min(index, len(values) - 1)) + 1


@pytest.mark.parametrize("rule", ["ratio", "cumulative", "fro"])
@pytest.mark.parametrize("parameter", [0.3, 0.5, 0.8, 0.95])
def test_one_less_than_kohya_keeps(rule: str, parameter: float) -> None:
    wanted = 1 / parameter if rule == "ratio" else parameter
    square = float((VALUES**2).sum())
    found = kept(torch.from_numpy(VALUES), rule, wanted, square, 30)
    assert found == kohya(VALUES, rule, wanted) - 1
    shares = {"cumulative": VALUES / VALUES.sum(), "fro": VALUES**2 / square}
    if rule in shares:  # the smallest number that reaches what was asked for
        reached = np.cumsum(shares[rule]) >= (parameter if rule == "cumulative" else parameter**2)
        assert reached[found - 1]
        assert found == 1 or not reached[found - 2]


def test_lycoris_threshold_and_quantile() -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert kept(values, "threshold", 1.5, 30, 4) == 3
    assert kept(values, "quantile", 0.75, 30, 4) == 2  # 4 + 3 < 7.5
    assert kept(values, "quantile", 0.1, 30, 4) == 1


def test_a_value_that_lies_on_the_line_is_not_beyond_it() -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert kept(values, "ratio", 2.0, 30, 4) == 2
    assert kept(values, "threshold", 2.0, 30, 4) == 2
    assert kept(values, "quantile", 0.9, 30, 4) == 2


def test_a_share_that_is_reached_but_for_the_rounding_of_the_sum_is_reached() -> None:
    values = torch.full((10,), 0.1, dtype=torch.float64)
    assert float(values.cumsum(0)[7]) < 0.8 * float(values.sum())  # by the last bit
    assert kept(values, "cumulative", 0.8, 0.1, 10) == 8


def test_the_limit_and_zeros_count() -> None:
    values = torch.tensor([4.0, 3.0, 0.0], dtype=torch.float64)
    assert kept(values, "fixed", 0, 25, 3) == 2
    assert kept(values, "fixed", 0, 25, 1) == 1
    assert kept(values, "fro", 1.0, 25, 3) == 2
    assert kept(torch.zeros(3), "fixed", 0, 0, 3) == 0


def test_a_share_of_a_norm_that_the_known_values_do_not_reach_keeps_them_all() -> None:
    assert kept(torch.tensor([2.0, 1.0], dtype=torch.float64), "fro", 0.99, 100.0, 2) == 2
    assert kept(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), "fro", 0.99, 100.0, 3) == 2


@pytest.mark.parametrize("text", ["fro", "fro=x", "sv=1", "fro=0", "fro=1.5", "ratio=0.5", "fixed=1", "fro=nan"])
def test_rules_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="--keep"):
        Ranks(None, None, *parse_rule(text))


def test_other_settings_that_make_no_sense() -> None:
    for wrong in ({"rank": 0}, {"clamp": 0.0}, {"clamp": 2.0}, {"svd": "quick"}):
        with pytest.raises(UsageError):
            Ranks(**wrong)  # type: ignore[arg-type]
