"""Rounding float32 to 16 bits: against torch's casts, and against float64 where a bound leaves room."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bake.dtypes import DTYPES
from bake.execute.plain.desk import Desk
from bake.execute.plain.rounding import TooLarge, narrow, narrow_all, narrow_each, settle, widen
from bake.io.arrays import stored_dtype, widened
from bake.verify.rounding import round_once, spacing

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16}
LIMITS = {"F16": 2.0**15, "BF16": 2.0**100}  # from here on it is not done here
every_tag = pytest.mark.parametrize("tag", TORCH)
pytestmark = pytest.mark.usefixtures("loops")

Floats = NDArray[np.float32]


def all_numbers(tag: str) -> tuple[NDArray[np.uint16], NDArray[np.float64]]:
    """(bits, values) of every number of a dtype, NaN and infinities too."""
    bits = np.arange(65536).astype(np.uint16)
    return bits, torch.from_numpy(bits.view(np.int16)).view(TORCH[tag]).double().numpy()


def settled(near: NDArray[Any], bound: Floats | None, tag: str) -> tuple[NDArray[np.uint16], NDArray[np.intp]]:
    """(bits, undecided places) of float32 numbers."""
    near = np.array(near, np.float32).reshape(1, -1)
    out = np.full(near.shape, 0x7FFF, np.uint16)
    with np.errstate(all="ignore"):
        if bound is None:
            narrow(near, tag, out, Desk())
            return out.reshape(-1), np.empty(0, np.intp)
        more = bound.reshape(1, -1) * np.float32(1 + 2.0**-20) + np.float32(2.0**-149)
        nothing = np.full_like(near, -0.0)  # zeros keep their sign
        undecided = settle(near, "F32", nothing, None, more, tag, out, Desk())
    return out.reshape(-1), undecided


def cast(values: Floats, tag: str) -> NDArray[np.uint16]:
    """The bits of float32 numbers as torch rounds them."""
    found: NDArray[np.uint16] = torch.from_numpy(values).to(TORCH[tag]).view(torch.int16).numpy().view(np.uint16)
    return found


def hard(tag: str) -> Floats:
    """Numbers and the middles between neighbours, with what is next to them in float32; all that fit."""
    _, values = all_numbers(tag)
    numbers = np.sort(values[np.abs(values) < LIMITS[tag]]).astype(np.float32)
    middles = numbers[:-1] + np.diff(numbers) / np.float32(2)
    both = np.concatenate([numbers, middles])
    near = [np.nextafter(both, np.float32(side)) for side in (-np.inf, np.inf)]
    found: Floats = np.concatenate([both, *near])
    return found[np.abs(found) < LIMITS[tag]]


def any_bits(tag: str, count: int, seed: int = 0) -> Floats:
    values = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    return values[np.abs(values) < LIMITS[tag]]


def of_one_size(tag: str, seed: int, count: int = 40_000) -> Floats:
    """Numbers whose exponents the dtype has, evenly spread; some of few bits, next to its own numbers and ties."""
    random = np.random.default_rng(seed)
    lowest = {"F16": -27, "BF16": -136}[tag]
    values = np.ldexp(random.uniform(-2, 2, count), random.integers(lowest, 14, count))
    half = spacing(np.abs(values), tag) / 2
    coarse = np.rint(values / half) * half
    nudged = coarse * (1 + random.integers(-3, 4, count) * 2.0**-23)
    return np.concatenate([values, nudged]).astype(np.float32)


class TestWiden:
    @every_tag
    def test_every_finite_number(self, tag: str) -> None:
        bits, values = all_numbers(tag)
        bits, values = bits[np.isfinite(values)], values[np.isfinite(values)]
        out = np.empty(bits.shape, np.float32)
        widen(bits.view(stored_dtype(tag)), tag, out)
        assert np.array_equal(out, values)
        assert np.array_equal(np.signbit(out), np.signbit(values))

    def test_halves_that_are_no_finite_numbers_are_left_to_torch(self) -> None:
        bits, values = all_numbers("F16")
        for one in bits[~np.isfinite(values)]:
            with pytest.raises(TooLarge):
                widen(np.array([0x3C00, one], np.uint16).view(np.float16), "F16", np.empty(2, np.float32))

    def test_bfloat16_that_are_none_stay_so_and_are_found_when_they_are_rounded(self) -> None:
        bits, values = all_numbers("BF16")
        bits, values = bits[~np.isfinite(values)], values[~np.isfinite(values)]
        out = np.empty(bits.shape, np.float32)
        widen(bits, "BF16", out)
        assert np.array_equal(out, values, equal_nan=True)

    def test_float32_stays(self) -> None:
        values = any_bits("BF16", 1000)
        out = np.empty_like(values)
        widen(values, "F32", out)
        assert np.array_equal(out.view(np.uint32), values.view(np.uint32))


class TestWithoutABound:
    @every_tag
    def test_numbers_middles_and_their_neighbours_as_torch_rounds_them(self, tag: str) -> None:
        values = hard(tag)
        assert np.array_equal(settled(values, None, tag)[0], cast(values, tag))

    @every_tag
    def test_any_bits(self, tag: str) -> None:
        values = any_bits(tag, 500_000)
        assert np.array_equal(settled(values, None, tag)[0], cast(values, tag))

    @every_tag
    @pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1.0, -1.0])
    def test_what_may_not_fit_is_refused(self, tag: str, value: float) -> None:
        values = np.array([1.0, value * LIMITS[tag], 0.5], np.float32)
        with pytest.raises(TooLarge):
            settled(values, np.zeros(3, np.float32), tag)
        try:
            assert np.array_equal(settled(values, None, tag)[0], cast(values, tag))
            assert np.isfinite(value)
        except TooLarge:
            pass

    @every_tag
    def test_what_just_fits_is_done_and_nothing_is_nothing(self, tag: str) -> None:
        largest = np.nextafter(np.float32(LIMITS[tag]), np.float32(0))
        values = np.array([largest, -largest], np.float32)
        assert np.array_equal(settled(values, None, tag)[0], cast(values, tag))
        assert settled(np.zeros(0), np.zeros(0, np.float32), tag)[0].size == 0


def ends(near: Floats, bound: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The lowest and the highest number that a `near` with a `bound` may stand for."""
    lower = near.astype(np.float64) - bound - (near.astype(np.float64) - np.nextafter(near, np.float32(-np.inf))) / 2
    upper = near.astype(np.float64) + bound + (np.nextafter(near, np.float32(np.inf)).astype(np.float64) - near) / 2
    return lower, upper


def check_decided(near: Floats, bound: Floats, tag: str) -> float:
    """Both ends round to what was found wherever that is said to be decided; the share that is not."""
    out, undecided = settled(near, bound, tag)
    decided = np.ones(len(near), np.bool_)
    decided[undecided] = False
    for end in ends(near[decided], bound[decided]):
        due = round_once(end, tag)
        found = all_numbers(tag)[1][out[decided]]
        wrong = np.flatnonzero((found != due) | (np.signbit(found) != np.signbit(due)))
        assert not len(wrong), (near[decided][wrong[0]], bound[decided][wrong[0]], end[wrong[0]], due[wrong[0]])
    return len(undecided) / max(1, len(near))


class TestWithABound:
    @every_tag
    @pytest.mark.parametrize("share", [0, 1e-6, 1e-3, 0.1, 0.24, 0.26, 0.49, 0.51, 1, 3])
    def test_where_it_is_decided_both_ends_round_to_it(self, tag: str, share: float) -> None:
        near = np.concatenate([hard(tag), of_one_size(tag, 1)])
        step = spacing(np.abs(near).astype(np.float64), tag)
        check_decided(near, (step * share).astype(np.float32), tag)

    @every_tag
    @pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
    def test_bounds_that_just_reach_the_nearest_tie(self, tag: str, steps: int) -> None:
        near = np.concatenate([hard(tag), of_one_size(tag, 2)])
        exact = near.astype(np.float64)
        rounded, step = round_once(exact, tag), spacing(np.abs(exact), tag)
        ties = np.stack([rounded + step * part for part in (-0.5, -0.25, 0.25, 0.5)])
        for tie in ties:
            bound = np.abs(tie - exact).astype(np.float32)
            for _ in range(steps):
                bound = np.nextafter(bound, np.float32(0))
            check_decided(near, bound, tag)

    @every_tag
    def test_a_float32_rounding_beside_a_tie_is_not_forgotten(self, tag: str) -> None:
        near = hard(tag)
        share = check_decided(near, np.zeros_like(near), tag)
        assert 0.3 < share < 0.7  # the middles and their neighbours, not the numbers and theirs

    @every_tag
    @settings(max_examples=40)
    @given(st.integers(0, 10**6), st.floats(-12, 0))
    def test_any_bound(self, tag: str, seed: int, exponent: float) -> None:
        near = of_one_size(tag, seed, 500)
        random = np.random.default_rng(seed)
        bound = spacing(np.abs(near).astype(np.float64), tag) * random.random(len(near)) * 2**exponent
        check_decided(near, bound.astype(np.float32), tag)

    @every_tag
    @pytest.mark.parametrize("bound", [0.001, 0.01, 0.1])
    def test_few_are_left_open(self, tag: str, bound: float) -> None:
        near = np.random.default_rng(5).uniform(1, 2, 200_000).astype(np.float32)
        ulp = {"F16": 2.0**-10, "BF16": 2.0**-7}[tag]
        share = check_decided(near, np.full_like(near, bound * ulp), tag)
        lost = 4.5 * 2.0**-24 / ulp  # in units of the last place, to either side
        assert share == pytest.approx(2 * (bound + lost), rel=0.05)

    @every_tag
    def test_zeros_are_left_open_for_their_sign(self, tag: str) -> None:
        least = 2.0**-24 if tag == "F16" else 2.0**-133
        near = np.array([0.0, -0.0, least / 4, -least / 4, least / 4, -least / 4, least, -least], np.float32)
        bound = np.array([0.0, 0.0, least / 4, least / 4, 0.0, 0.0, 0.0, 0.0], np.float32)
        assert settled(near, bound, tag)[1].tolist() == [0, 1, 2, 3]

    @every_tag
    def test_a_bound_that_reaches_what_may_not_fit_leaves_open(self, tag: str) -> None:
        near = np.array([LIMITS[tag] / 2, 1.0, -LIMITS[tag] / 2, 1.0], np.float32)
        bound = np.array([LIMITS[tag], 2.0**-20, np.inf, np.nan], np.float32)
        assert settled(near, bound, tag)[1].tolist() == [0, 2, 3]


class TestFloat64:
    @every_tag
    def test_one_rounding_as_in_verification(self, tag: str) -> None:
        values = np.concatenate([hard(tag), any_bits(tag, 100_000), of_one_size(tag, 3)]).astype(np.float64)
        values = np.concatenate([values, np.nextafter(values, -np.inf), np.nextafter(values, np.inf)])
        values = values[np.abs(values) < LIMITS[tag]]
        found, due = all_numbers(tag)[1][narrow_each(values, tag)], round_once(values, tag)
        assert np.array_equal(found, due)
        assert np.array_equal(np.signbit(found), np.signbit(due))

    @every_tag
    @pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1.0, -1.0])
    def test_what_may_not_fit_is_refused(self, tag: str, value: float) -> None:
        with pytest.raises(TooLarge):
            narrow_each(np.array([1.0, value * LIMITS[tag]]), tag)


class TestAllFloat64:
    """Everything that the dtype can hold, up to its largest number."""

    TAGS = ("F16", "BF16", "F32", "F64")

    @staticmethod
    def narrowed(values: NDArray[np.float64], tag: str) -> NDArray[np.float64]:
        """The numbers that the bits stand for, in float64."""
        values = values.reshape(1, -1)
        out = np.full(values.shape, 0x7F, stored_dtype(tag))
        before = values.copy()
        with np.errstate(all="ignore"):
            narrow_all(values, tag, out, Desk())
        assert np.array_equal(values, before)
        return widened(out[0], tag, np.float64)

    @pytest.mark.parametrize("tag", TAGS)
    def test_one_rounding_as_in_verification(self, tag: str) -> None:
        kind = DTYPES[tag]
        bits = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64).view(np.float64)
        of_16 = [values for each in TORCH for values in (hard(each), any_bits(each, 100_000), of_one_size(each, 3))]
        edges = np.array([kind.largest, np.nextafter(kind.overflow, 0), 0.0, 2.0**-149, 2.0**-126, 5e-324])
        values = np.concatenate([*of_16, edges, bits[np.isfinite(bits)]]).astype(np.float64)
        values = np.concatenate([values, np.nextafter(values, 0), np.nextafter(values, 1), -values])
        values = values[np.abs(values) < kind.overflow]
        found, due = self.narrowed(values, tag), round_once(values, tag)
        assert np.array_equal(found, due)
        assert np.array_equal(np.signbit(found), np.signbit(due))

    @pytest.mark.parametrize("number", ["nan", "inf", "overflow", "payload"])
    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("tag", TAGS)
    def test_what_is_not_finite_then_is_refused(self, tag: str, sign: int, number: str) -> None:
        payload = np.array([0x7FFFFFFFFFFFFFFF], np.uint64).view(np.float64)[0]
        worst = {"nan": np.nan, "inf": np.inf, "payload": payload}.get(number, DTYPES[tag].overflow)
        with pytest.raises(TooLarge):
            self.narrowed(np.array([1.0, np.copysign(worst, sign), -2.0]), tag)
