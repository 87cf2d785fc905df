"""Rounding float64 once, against NumPy and torch where their casts are single roundings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bake.dtypes import DTYPES
from bake.verify.rounding import round_once, spacing

floats = st.lists(st.floats(width=64, allow_nan=False, allow_infinity=False), min_size=1, max_size=50)
halves = st.lists(st.floats(-70000, 70000) | st.floats(-1e-4, 1e-4) | st.floats(-1e-7, 1e-7), min_size=1, max_size=50)


@given(halves)
def test_fp16_as_numpy_rounds_it(values: list[float]) -> None:
    with np.errstate(over="ignore"):
        expected = np.array(values).astype(np.float16).astype(np.float64)
    np.testing.assert_array_equal(round_once(np.array(values), "F16"), expected)


@given(floats)
def test_fp32_as_numpy_rounds_it(values: list[float]) -> None:
    with np.errstate(over="ignore", under="ignore"):
        expected = np.array(values).astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(round_once(np.array(values), "F32"), expected)


@pytest.mark.parametrize("tag", ["BF16", "F8_E4M3", "F8_E5M2"])
@given(st.lists(st.floats(-400, 400, width=32), min_size=1, max_size=50))
def test_short_floats_as_torch_rounds_float32(tag: str, values: list[float]) -> None:
    exact = np.array(values)
    expected = torch.from_numpy(exact).float().to(getattr(torch, DTYPES[tag].torch)).double()
    np.testing.assert_array_equal(round_once(exact, tag), expected)


def test_double_rounding_is_avoided() -> None:
    """A number just above the middle of two halves: through float32 it would tie and go down."""
    exact = np.array([1 + 2**-11 + 2**-40])
    assert round_once(exact, "F16").tolist() == [1 + 2**-10]
    assert exact.astype(np.float32).astype(np.float16).tolist() == [1.0]


def test_overflow_is_infinite_and_saturates_in_fp8() -> None:
    values = np.array([65519.9, 65520.0, -1e9])
    assert round_once(values, "F16").tolist() == [65504.0, float("inf"), float("-inf")]
    assert round_once(values, "F8_E4M3").tolist() == [448.0, 448.0, -448.0]


@pytest.mark.parametrize("tag", ["F16", "F32"])
def test_spacing_is_numpys(tag: str) -> None:
    kind = {"F16": np.float16, "F32": np.float32}[tag]
    values = np.array([0.0, 1.0, 1.5, 0.1, 1e-5, 6e-8, 1000.0], kind)
    found = spacing(np.abs(values).astype(np.float64), tag)
    np.testing.assert_array_equal(found, np.spacing(np.abs(values)).astype(np.float64))


def test_float64_is_left_alone() -> None:
    values = np.random.default_rng(0).standard_normal(10)
    assert round_once(values, "F64") is values
