"""Stochastic rounding: to a neighbour, on average right, the same for any chunking and in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bake.draws import key_of
from bake.dtypes import DTYPES
from bake.execute.stochastic import Stochastic
from bake.io.payload import torch_dtype
from bake.verify.rounding import Rule, spacing

TAGS = ["F16", "BF16", "F8_E4M3", "F8_E5M2"]
every_tag = pytest.mark.parametrize("tag", TAGS)


def rounded(tag: str, values: torch.Tensor, seed: int = 0, first: int = 0) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=torch_dtype(tag))
    Stochastic(seed, "layer.weight", tag).narrow(values.float().view(1, -1), out.view(1, -1), first)
    return out.double()


def some(count: int, spread: float = 0.05) -> torch.Tensor:
    values = np.random.default_rng(1).standard_normal(count).astype(np.float32) * np.float32(spread)
    return torch.from_numpy(values)


def any_bits(count: int) -> torch.Tensor:
    bits = np.random.default_rng(2).integers(0, 2**32, count, dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32).copy())
    return values[values.isfinite()]


@every_tag
@pytest.mark.parametrize("spread", [1e-8, 1e-4, 0.05, 300.0, 3e4])
def test_the_mean_over_many_seeds_is_the_value(tag: str, spread: float) -> None:
    values = some(50, spread).double().clamp(-0.9 * DTYPES[tag].largest, 0.9 * DTYPES[tag].largest)
    tries = 2000
    many = torch.stack([rounded(tag, values, seed) for seed in range(tries)])
    error = (many.mean(0) - values.float().double()).abs().numpy()
    assert (error <= 5 * spacing(values.numpy(), tag) / 2 / tries**0.5).all()  # five standard deviations at most


@every_tag
def test_every_result_is_one_of_the_two_neighbours(tag: str) -> None:
    values = torch.cat([some(20_000), any_bits(20_000)]).double()
    values = values[values.abs() <= DTYPES[tag].largest]
    error = (rounded(tag, values) - values).abs().numpy()
    assert (error < spacing(values.numpy(), tag)).all()


@every_tag
def test_what_the_dtype_can_hold_never_moves(tag: str) -> None:
    size = DTYPES[tag].bits // 8
    patterns = torch.arange(2 ** (8 * size)).to(torch.uint8 if size == 1 else torch.uint16)
    values = patterns.view(torch_dtype(tag)).double()
    values = values[values.isfinite()]
    for seed in range(5):
        found = rounded(tag, values, seed)
        assert torch.equal(found, values)
        assert torch.equal(found.signbit(), values.signbit())


@every_tag
def test_float64_and_any_chunking_give_the_same(tag: str) -> None:
    values = torch.cat([some(10_000), some(10_000, 300.0), any_bits(10_000)])
    whole = rounded(tag, values, seed=3)
    pieces = [rounded(tag, values[begin : begin + 777], 3, begin) for begin in range(0, len(values), 777)]
    assert torch.equal(torch.cat(pieces), whole)
    order = torch.randperm(len(values))
    each = Stochastic(3, "layer.weight", tag).narrow_each(values[order].double(), order)
    assert torch.equal(each.double(), whole[order])


@every_tag
@given(st.integers(0, 2**40), st.floats(-500, 500, width=32), st.integers(1, 2000))
def test_for_one_element_the_result_grows_with_the_value(tag: str, place: int, value: float, steps: int) -> None:
    near = np.float32(value) + np.arange(-50, 51, dtype=np.float32) * np.float32(steps * 1e-4)
    values = torch.from_numpy(np.sort(near)).double()
    found = Stochastic(0, "x", tag).narrow_each(values, torch.full((len(values),), place)).double()
    assert bool((found.diff() >= 0).all())


@every_tag
def test_verification_rounds_the_same_by_itself(tag: str) -> None:
    values = torch.cat([some(20_000), some(5000, 1e5), any_bits(20_000)]).double()
    rule = Rule(tag, key_of(9, "layer.weight"))
    assert np.array_equal(rule.round(values.numpy(), 41), rounded(tag, values, 9, 41))


def test_overflow_is_infinite_and_saturates_in_fp8() -> None:
    values = torch.tensor([65504.0, 65519.0, 65520.0, -1e9, torch.inf])
    for seed in range(20):
        assert rounded("F16", values, seed).tolist() == [65504.0, 65504.0, torch.inf, -torch.inf, torch.inf]
        assert rounded("F8_E4M3", values, seed).tolist() == [448.0, 448.0, 448.0, -448.0, 448.0]
        assert rounded("BF16", torch.tensor([3.4e38, -torch.inf]), seed).tolist() == [torch.inf, -torch.inf]


@every_tag
def test_nan_stays_nan(tag: str) -> None:
    assert bool(rounded(tag, torch.tensor([torch.nan, -torch.nan])).isnan().all())


def test_float32_is_rounded_to_nearest() -> None:
    values = torch.tensor([0.1, 1 / 3], dtype=torch.float64)
    stochastic = Stochastic(0, "x", "F32")
    assert torch.equal(stochastic.narrow_each(values, torch.arange(2)), values.float())
    out = torch.empty(1, 2)
    stochastic.narrow(values.float().view(1, 2), out, 0)
    assert torch.equal(out.view(-1), values.float())
