"""Several updates as one: PEFT's ways of combining adapters, on the updates themselves.

PEFT's `linear`, `ties`, `dare_*` and `magnitude_prune` work on the two factors of each adapter one by one, which adds
products that nobody trained (up of one with down of another), and its random ones are not seeded. Here all work
on whole updates, as PEFT's `*_svd` forms do, and draws depend on the seed, the adapter's place and the module alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bake.draws import DRAW_BITS, draws, key_of


def weighted_sum(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of weight * update. updates: matrices of one shape."""
    total = torch.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        total.add_(update, alpha=weight)
    return total


def largest(update: Tensor, density: float) -> Tensor:
    """Return `update` with a share of `density` of its entries, those of the largest magnitude, and zeros.

    Source: PEFT utils/merge_utils.py, magnitude_based_pruning: int(density * entries) of them.
    """
    count = int(density * update.numel())
    kept = torch.zeros_like(update).flatten()
    if count:
        places = update.flatten().abs().topk(count, sorted=False).indices
        kept[places] = update.flatten()[places]
    return kept.reshape(update.shape)


def dropped(update: Tensor, density: float, seed: int, name: str) -> Tensor:
    """Return `update` with each entry kept by a chance of `density` and divided by it, else zero.

    Source: DARE, arXiv:2311.03099; PEFT utils/merge_utils.py random_pruning with rescale.
    """
    random = draws(key_of(seed, name), 0, update.numel(), torch.device("cpu"))
    shares = (random >> (32 - DRAW_BITS)).bitwise_and_((1 << DRAW_BITS) - 1).to(torch.float32) * 2.0**-DRAW_BITS
    return update * (shares < density).reshape(update.shape) / density


def agreeing_mean(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the mean, entry by entry, of weight * update over the updates that have the majority's sign.

    The majority is that of the sum of the updates, each with the sign of its weight; where it is 0, so is the mean.
    Source: TIES, arXiv:2306.01708, sections 3.2 and 3.3; PEFT utils/merge_utils.py disjoint_merge.
    """
    signed = [update if weight >= 0 else -update for update, weight in zip(updates, weights, strict=True)]
    majority = torch.sign(weighted_sum(signed, [1.0] * len(signed)))
    total, count = torch.zeros_like(updates[0]), torch.zeros_like(updates[0])
    for update, weight in zip(signed, weights, strict=True):
        agrees = torch.sign(update) == majority
        total += torch.where(agrees, update * abs(weight), 0.0)
        count += agrees
    return total / count.clamp(min=1)


Prune = Callable[[Tensor, float, int, str], Tensor]


def _largest(update: Tensor, density: float, seed: int, name: str) -> Tensor:
    return largest(update, density)


# method -> how each update is thinned out (update, density, seed, name), how what is left is summed (updates, weights)
METHODS: dict[str, tuple[Prune, Callable[[Sequence[Tensor], Sequence[float]], Tensor]]] = {
    "magnitude_prune": (_largest, weighted_sum),
    "ties": (_largest, agreeing_mean),
    "dare_linear": (dropped, weighted_sum),
    "dare_ties": (dropped, agreeing_mean),
}


def combined(
    method: str, updates: Sequence[Tensor], weights: Sequence[float], density: float, seed: int, names: Sequence[str]
) -> Tensor:
    """Return the updates of one module combined by a row of METHODS. names: of each update, for its draws."""
    thin, add = METHODS[method]
    thinned = [thin(update, density, seed, name) for update, name in zip(updates, names, strict=True)]
    return add(thinned, weights)
