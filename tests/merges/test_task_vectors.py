"""Task arithmetic, TIES, DARE, breadcrumbs, DELLA and dropout against their definitions; what chance keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merge_formulas import middle, row_ranks, task_sum, top
from merging import SHAPES, chunks_of, job_for, merge, models_for, survey

from bake.draws import draws, key_of
from bake.merges import METHODS
from bake.merges.trimming import ranks

WEIGHT = [0.5, 0.7, -0.25]


def uniform(shape: tuple[int, ...], stream: int, *, seed: int = 0, tensor: str = "layer.weight") -> np.ndarray:
    """The draws of a whole tensor, from 0 to 1."""
    key = key_of(seed, f"{tensor}\0{stream}")
    found = draws(key, 0, int(np.prod(shape)), torch.device("cpu")).numpy().astype(np.float64)
    return ((found + 2**31) / 2**32).reshape(shape)


def deltas_of(models: list[np.ndarray]) -> list[np.ndarray]:
    return [model - models[0] for model in models[1:]]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"])
def test_what_is_kept_by_magnitude(name: str, normalize: bool, shape: tuple[int, ...]) -> None:
    models = models_for(4, shape)
    given: dict[str, object] = {"weight": WEIGHT, "normalize": normalize, "lambda": 0.9}
    deltas = deltas_of(models)
    if name == "ties":
        given["density"] = densities = [0.3, 1, 0.05]
        deltas = [top(delta, density) for delta, density in zip(deltas, densities, strict=True)]
    elif name != "task_arithmetic":
        given |= {"density": (densities := [0.6, 1, 0.95]), "gamma": 0.15}
        deltas = [middle(delta, density, 0.15) for delta, density in zip(deltas, densities, strict=True)]
    consensus = name.endswith("ties")
    close(
        merge(name, models, given),
        task_sum(models[0], deltas, WEIGHT, consensus=consensus, normalize=normalize, scale=0.9),
    )


@pytest.mark.parametrize("vote", ["sum", "count"])
def test_votes(vote: str) -> None:
    models = models_for(6, (9, 8), apart=1.0)
    weight = [1, 0.2, 0.3, 0.4, 1.5]
    expected = task_sum(models[0], deltas_of(models), weight, consensus=True, normalize=True, vote=vote)
    close(merge("ties", models, {"density": 1, "weight": weight, "vote": vote}), expected)


def test_a_vote_by_hand() -> None:
    base, one, two, three = (np.array([row], float) for row in ([0, 0, 0], [4, 1, -1], [-1, -1, 1], [-1, 0, 0]))
    given = {"density": 1.0}
    assert merge("ties", [base, one, two, three], given).tolist() == [[4, 1, 1]]  # an even vote is for plus
    assert merge("ties", [base, one, two, three], {**given, "vote": "count"}).tolist() == [[-1, 1, 1]]
    assert merge("ties", [base, one, two, three], {**given, "normalize": False, "lambda": 0.5}).tolist() == [
        [2, 0.5, 0.5]
    ]


def test_the_smallest_tensors_keep_one_element_and_equal_ones_stay_together() -> None:
    """Where mergekit 0.1.4 stops (density of a small tensor below one element) or loses all of it (breadcrumbs)."""
    base = np.zeros((1, 4))
    model = np.array([[0.1, -0.4, 0.4, 0.2]])
    assert merge("ties", [base, model], {"density": 0.1}).tolist() == [[0, -0.4, 0.4, 0]]
    assert merge("breadcrumbs", [base, model], {"density": 0.8, "gamma": 0.01}).tolist() == [[0, -0.4, 0.4, 0.2]]
    assert merge("breadcrumbs", [base, model], {"density": 0.25, "gamma": 0.5}).tolist() == [[0, 0, 0, 0.2]]


@pytest.mark.parametrize("rescale", ["none", "probability", "l1"])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_what_is_kept_by_chance(name: str, rescale: str) -> None:
    for shape in SHAPES:
        models = models_for(4, shape)
        given: dict[str, object] = {"density": 0.6, "weight": WEIGHT, "rescale": rescale}
        deltas = []
        for stream, delta in enumerate(deltas_of(models)):
            chance = np.full(shape, 0.6)
            if name.startswith("della"):
                given["epsilon"] = 0.2
                chance = 0.4 + 0.4 * row_ranks(delta)
            kept = np.where(uniform(shape, stream, seed=3) < chance, delta, 0)
            if rescale == "probability":
                kept = kept / chance
            elif rescale == "l1" and abs(kept).sum():
                kept = kept * abs(delta).sum() / abs(kept).sum()
            deltas.append(kept)
        consensus = name in ("dare_ties", "della")
        expected = task_sum(models[0], deltas, WEIGHT, consensus=consensus, normalize=name == "della")
        close(merge(name, models, given, seed=3), expected)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
@pytest.mark.parametrize("rescale", ["probability", "l1"])
def test_on_average_nothing_is_lost(name: str, rescale: str) -> None:
    base, model = models_for(2, (300, 400))
    changed = merge(name, [base, model], {"density": 0.3, "rescale": rescale}, seed=9) - base
    kept = changed != 0
    assert kept.mean() == pytest.approx(0.3, abs=0.005)
    along = (changed * (model - base)).sum() / ((model - base) ** 2).sum()
    # By ranks more of the large ones is kept, whose squares count here.
    assert along == pytest.approx(1.0, abs=0.02) or (name == "della_linear" and rescale == "l1" and 1 < along < 1.5)


def test_large_changes_have_the_better_chance_in_della() -> None:
    base, model = models_for(2, (300, 400))
    kept = merge("della_linear", [base, model], {"density": 0.5, "epsilon": 0.4}) != base
    shares = row_ranks(model - base)
    for low in (0.0, 0.25, 0.5, 0.75):
        here = (shares >= low) & (shares < low + 0.25)
        assert kept[here].mean() == pytest.approx(0.1 + 0.8 * (low + 0.125), abs=0.02)


def test_ranks_of_rows() -> None:
    sizes = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    assert ranks(sizes).tolist() == [[1, 0, 0.5], [0.25, 0.25, 1], [0.5, 0.5, 0.5]]
    assert ranks(sizes[:, :1]).tolist() == [[0.5]] * 3


@pytest.mark.parametrize("overlap", ["independent", "disjoint", "shared"])
def test_dropout(overlap: str) -> None:
    shape = (30, 40)
    models = models_for(4, shape)
    if overlap == "independent":
        masks = np.stack([uniform(shape, place) < 0.6 for place in range(3)])
    else:
        kept = uniform(shape, 0) < 0.6
        chosen = np.floor(uniform(shape, 1) * 3)
        masks = np.stack([kept & (overlap == "shared" or chosen == place) for place in range(3)])
    expected = models[0] + (masks * np.stack(deltas_of(models))).sum(0) / np.maximum(1, masks.sum(0)) / 0.6**0.5
    close(merge("dropout", models, {"density": 0.6, "rescale": 0.5, "overlap": overlap}), expected)


def test_passes() -> None:
    """What a method costs in reads: none for chance, two for ranks, one for sums of magnitudes."""

    def count(name: str, given: dict[str, object]) -> int:
        models = models_for(4, (30, 40))
        work = METHODS[name].load()(job_for(name, models, given))
        return survey(work, chunks_of(work, models, 8))

    assert count("task_arithmetic", {}) == 0
    assert count("dare_ties", {"density": 0.5}) == 0
    assert count("della", {"density": 0.5}) == 0
    assert count("della", {"density": 0.5, "rescale": "l1"}) == 1
    assert count("ties", {"density": 1}) == 0
    assert count("ties", {"density": 0.5}) == 2
    assert count("breadcrumbs_ties", {"density": 0.5, "rescale": "l1"}) == 3
