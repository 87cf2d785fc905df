"""The methods that sd-mecha has too, against it, in float64; where the two differ on purpose, in what."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from merging import SHAPES, merge, models_for

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("sd_mecha", reason="the sd-mecha oracle is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("oracles")]


def function(name: str) -> Callable[..., torch.Tensor]:
    """A function of sd-mecha, from module.function."""
    module, _, short = name.partition(".")
    method = getattr(importlib.import_module(f"sd_mecha.extensions.builtin.merge_methods.{module}"), short)
    return method.__wrapped__


def tensors(values: dict[str, object]) -> dict[str, object]:
    """The values as sd-mecha wants them."""
    return {
        name: torch.tensor(value, dtype=torch.float64) if name == "alpha" else value for name, value in values.items()
    }


def theirs(name: str, models: Sequence[np.ndarray], **values: object) -> np.ndarray:
    """What sd-mecha makes of tensors."""
    return function(name)(*(torch.from_numpy(model.copy()) for model in models), **tensors(values)).numpy()


def of_files(name: str, models: Sequence[np.ndarray], **values: object) -> np.ndarray:
    """The same of functions that take state dicts."""
    files = [{"key": torch.from_numpy(model.copy())} for model in models]
    return function(name)(*files, key="key", **tensors(values)).numpy()


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_models(shape: tuple[int, ...]) -> None:
    models = models_for(2, shape, apart=1.0)
    for alpha in (0.3, 0.8):
        close(merge("weighted_sum", models, {"alpha": alpha}), of_files("linear.weighted_sum", models, alpha=alpha))
        given = {"alpha": alpha, "norms": "interpolate"}
        close(merge("slerp", models, given), theirs("linear.slerp", models, alpha=alpha))
        close(merge("geometric_sum", models, {"alpha": alpha}), theirs("linear.geometric_sum", models, alpha=alpha))
        for letter in "ab":
            found = merge(f"add_cosine_{letter}", models, {"alpha": alpha})
            close(found, theirs(f"cosine.add_cosine_{letter}", models, alpha=alpha))
    for width, offset in ((0.4, 0.3), (0.7, 0.6), (-0.4, 0.2)):
        given = {"width": width, "offset": offset}
        assert np.array_equal(merge("tensor_sum", models, given), theirs("slicing.tensor_sum", models, **given))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_models(shape: tuple[int, ...]) -> None:
    a, b, c = models = models_for(3, shape, apart=1.0)
    alpha = 0.7
    close(merge("add_difference", models, {"alpha": alpha}), of_files("linear.add_difference", [a, b - c], alpha=alpha))
    clipped = theirs("limiting.clamp", [a + alpha * (b - c), a, b])
    close(merge("add_difference", models, {"alpha": alpha, "clip": True}), clipped)
    new = theirs("linear.perpendicular_component", [a - c, b - c])
    close(merge("add_perpendicular", models, {"alpha": alpha}), a + alpha * new)
    for mask, name in (("train", "train_difference_mask"), ("opposite", "add_opposite_mask")):
        share = theirs(f"linear.{name}", models, alpha=alpha)
        close(merge("train_difference", models, {"alpha": alpha, "mask": mask}), a + share * (b - c))
    share = theirs("linear.add_strict_opposite_mask", models, alpha=alpha)
    close(merge("train_difference", models, {"alpha": alpha, "mask": "strict_opposite"}), a + share * (b - c))
    close(merge("multiply_quotient", models, {"alpha": alpha}), theirs("linear.multiply_quotient", models, alpha=alpha))


def test_top_k_tensor_sum_but_for_the_magnitude_below_the_region() -> None:
    models = models_for(2, (9, 8), apart=1.0)
    given = {"width": 0.5, "offset": 0.0}
    assert np.array_equal(merge("top_k_tensor_sum", models, given), theirs("slicing.top_k_tensor_sum", models, **given))
    given = {"width": 0.5, "offset": 0.3}
    found, expected = merge("top_k_tensor_sum", models, given), theirs("slicing.top_k_tensor_sum", models, **given)
    assert 1 <= (found != expected).sum() <= 2


@pytest.mark.parametrize("tilt", [0.0, 0.4, 1.0, 1.7, 2.3, 3.0, 3.6])
def test_crossover(tilt: float) -> None:
    for shape in SHAPES:
        models = models_for(2, shape, apart=1.0)
        expected = function("crossover.crossover")(*map(torch.from_numpy, models), alpha=0.4, tilt=tilt)
        close(merge("crossover", models, {"alpha": 0.4, "tilt": tilt}), expected.numpy(), 1e-6)  # filters in float32


def test_crossover_at_a_tilt_of_2_is_what_it_is_next_to_it() -> None:
    models = models_for(2, (12, 10), apart=1.0)
    near = merge("crossover", models, {"alpha": 0.3, "tilt": 2 - 1e-12})
    close(merge("crossover", models, {"alpha": 0.3, "tilt": 2.0}), near)


@pytest.mark.parametrize("given", [{}, {"alpha": 0.4}, {"alignment": 0.6}, {"centralization": 0.5}], ids=str)
@pytest.mark.parametrize("shape", [(20, 7), (16, 3, 3, 3), (30, 5, 1, 1)], ids=str)
def test_rotate_of_tall_matrices(shape: tuple[int, ...], given: dict[str, float]) -> None:
    models = models_for(2, shape, apart=1.0)
    values = {"alpha": 0.0, **given}
    close(merge("rotate", models, values), of_files("svd.rotate", models, **values), 1e-8)


def test_rotate_of_wide_matrices_comes_nearer() -> None:
    a, b = models_for(2, (7, 40), apart=1.0)
    ours, other = merge("rotate", [a, b], {}), of_files("svd.rotate", [a, b], alpha=0.0)
    assert np.linalg.norm(ours - b) < 0.9 * np.linalg.norm(other - b)


@pytest.mark.parametrize("vote", ["sum", "count"])
def test_ties_but_for_even_votes(vote: str) -> None:
    """They trim by "at least the k-th", as bake does, k counted from below; even votes are for nobody there."""
    base, *others = models_for(4, (30, 40), apart=1.0)
    deltas = [model - base for model in others]
    expected = base + theirs("ties.ties_sum", deltas, k=0.4, vote_sgn=vote == "sum")
    found = merge("ties", [base, *others], {"density": 481 / 1200, "vote": vote})
    kept = [np.where(abs(d) >= np.sort(abs(d), axis=None)[-481], np.sign(d), 0) for d in deltas]
    is_even = sum(kept) == 0
    assert is_even.sum() > 100
    if vote == "count":
        assert np.array_equal(expected[is_even], base[is_even])
        close(found[~is_even], expected[~is_even], 1e-6)
    else:
        close(found, expected, 1e-6)


def test_geometric_median() -> None:
    models = models_for(4, (30, 40), apart=1.0)
    close(merge("geometric_median", models, {}), theirs("ties.geometric_median", models), 1e-7)


def test_means() -> None:
    models = models_for(3, (9, 8))
    close(merge("linear", models, {}), of_files("linear.n_average", models))
    base, *others = models
    vectors = [(model - base).reshape(-1) for model in others]
    stock = theirs("ties.model_stock", vectors).reshape(9, 8)  # the same for two vectors
    close(merge("model_stock", models, {}), base + stock)


def test_dropout_keeps_as_much() -> None:
    """At an overlap of 1; any that is not odd ends in a TypeError in 1.1.8."""
    base, *others = models_for(4, (300, 200), apart=1.0)
    deltas = [model - base for model in others]
    expected = theirs("ties.dropout", deltas, probability=0.7, seed=0)
    found = merge("dropout", [base, *others], {"density": 0.3}) - base
    assert (found != 0).mean() == pytest.approx((expected != 0).mean(), abs=0.01)
    assert abs(found).mean() == pytest.approx(abs(expected).mean(), rel=0.05)
