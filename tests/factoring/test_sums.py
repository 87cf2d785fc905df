"""Several updates as one, against NumPy and PEFT's own functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random

from bake.factoring.sums import agreeing_mean, combined, dropped, largest, weighted_sum

UPDATES = [torch.from_numpy(random(seed, 20, 30)).float() for seed in range(3)]
WEIGHTS = [0.7, 1.3, 0.4]


@pytest.mark.parametrize(("density", "count"), [(0.3, 180), (0.333, 199)])
def test_the_largest_entries_stay(density: float, count: int) -> None:
    thinned = largest(UPDATES[0], density)
    assert int((thinned != 0).sum()) == count
    values = UPDATES[0].numpy()
    cut = np.sort(np.abs(values).ravel())[-count]
    np.testing.assert_array_equal(thinned.numpy(), np.where(np.abs(values) >= cut, values, 0))


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_as_peft_combines_whole_updates(method: str) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils")
    reference = {"ties": peft.ties, "magnitude_prune": peft.magnitude_prune}[method]
    expected = reference(UPDATES, torch.tensor(WEIGHTS), 0.4)
    found = combined(method, UPDATES, WEIGHTS, 0.4, 0, ["a", "b", "c"])
    torch.testing.assert_close(found, expected)


def test_a_negative_weight_votes_for_the_other_sign() -> None:
    found = agreeing_mean(UPDATES[:2], [1.0, -1.0])
    torch.testing.assert_close(found, agreeing_mean([UPDATES[0], -UPDATES[1]], [1.0, 1.0]))


def test_dropping_keeps_the_mean_and_follows_the_seed() -> None:
    ones = torch.ones((300, 300))
    found = dropped(ones, 0.25, 7, "a")
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(found, dropped(ones, 0.25, 7, "a"))
    assert not torch.equal(found, dropped(ones, 0.25, 8, "a"))
    assert not torch.equal(found, dropped(ones, 0.25, 7, "b"))


def test_as_many_draws_keep_an_entry_as_the_density_says(monkeypatch: pytest.MonkeyPatch) -> None:
    quarters = (torch.arange(4) << 30).to(torch.int32)
    monkeypatch.setattr("bake.factoring.sums.draws", lambda *arguments: quarters)
    assert dropped(torch.ones(4), 0.5, 0, "a").tolist() == [2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("method", ["dare_linear", "magnitude_prune"])
def test_with_everything_kept_it_is_the_weighted_sum(method: str) -> None:
    found = combined(method, UPDATES, WEIGHTS, 1.0, 0, ["a", "b", "c"])
    torch.testing.assert_close(found, weighted_sum(UPDATES, WEIGHTS))


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_one_update_alone_stays_what_it_is(method: str) -> None:
    torch.testing.assert_close(combined(method, UPDATES[:1], [1.0], 1.0, 0, ["a"]), UPDATES[0])
