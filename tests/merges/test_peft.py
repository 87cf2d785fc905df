"""TIES and DARE against PEFT, which divides by the number of those who agree where bake divides by their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merging import merge

peft = pytest.importorskip("peft.utils.merge_utils", reason="the PEFT oracle is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("oracles")]


@pytest.fixture
def models() -> list[np.ndarray]:
    """Without equal magnitudes, of which PEFT keeps some and not others."""
    return list(np.random.default_rng(0).normal(0, 0.05, (4, 30, 40)))


def deltas(models: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(model - models[0]) for model in models[1:]]


def close(found: np.ndarray, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert found == pytest.approx(expected.numpy(), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("vote", "method"), [("sum", "total"), ("count", "frequency")])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties(models: list[np.ndarray], density: float, vote: str, method: str) -> None:
    expected = peft.ties(deltas(models), torch.ones(3).double(), density, method)
    found = merge("ties", models, {"density": density, "vote": vote})
    close(found - models[0], expected)


def test_task_arithmetic_with_and_without_pruning(models: list[np.ndarray]) -> None:
    weight = [0.5, 1.5, -0.25]
    weights = torch.tensor(weight).double()
    expected = peft.task_arithmetic(deltas(models), weights)
    close(merge("task_arithmetic", models, {"weight": weight}) - models[0], expected)
    pruned = peft.magnitude_prune(deltas(models), weights, 0.3)
    given = {"weight": weight, "density": 0.3, "gamma": 0.0}
    close(merge("breadcrumbs", models, given) - models[0], pruned)


def test_dare_is_rescaled_by_density_as_there(models: list[np.ndarray]) -> None:
    base, model = models[:2]
    torch.manual_seed(0)
    expected = peft.dare_linear(deltas([base, model]), torch.ones(1).double(), 0.4).numpy()
    found = merge("dare_linear", [base, model], {"density": 0.4}) - base
    both = (found != 0) & (expected != 0)
    assert both.sum() > 100
    assert found[both] == pytest.approx(expected[both], rel=1e-6)
