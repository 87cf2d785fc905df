"""What the methods on task vectors leave out of each model's difference from the base before they add them up.

magnitude    keep the `density` share of largest magnitudes (TIES, arXiv:2306.01708)
outliers     leave out the `gamma` share of largest ones, then the smallest until `density` is left (arXiv:2312.06795)
random       keep each with a chance of `density` (DARE, arXiv:2311.03099)
ranked       keep each with a chance by its rank in its row, density - epsilon to density + epsilon (DELLA,
             arXiv:2406.11617)

Equal magnitudes are kept or left out together, and in a row have the same chance: which of them a sort happens to put
first says nothing. mergekit (sparsify.py) keeps an exact number, and leaves to chance which of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bake.merges.chances import uniform
from bake.merges.merge import Chunk, Job, Survey
from bake.merges.ranks import Ranks


class Trim(ABC):
    """Of each model's difference the share `density` is kept."""

    def __init__(self, job: Job, count: int) -> None:
        """count: elements of the tensor."""
        self.job = job
        self.count = count
        self.densities = job.numbers("density")
        self.kept = [max(1, int(density * count)) for density in self.densities]

    def passes(self) -> Iterator[Survey]:
        """What it has to know beforehand."""
        return iter(())

    def apply(self, place: int, change: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | float]:
        """(what is left of the change that model `place` makes, the chance that each element had to be kept)."""
        if self.densities[place] == 1:
            return change, 1.0
        is_kept, chance = self.choose(place, change, chunk)
        return torch.where(is_kept, change, 0.0), chance

    @abstractmethod
    def choose(self, place: int, change: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | float]:
        """(which elements are kept, the chance they had), for a density below 1."""


class Magnitude(Trim):
    """By magnitude, from a limit on that a search finds."""

    def passes(self) -> Iterator[Survey]:
        trimmed = [place for place, density in enumerate(self.densities) if density < 1]
        wanted = [(place, rank) for place in trimmed for rank in self.ends(place)]
        ranks = Ranks([(partial(_sizes, place), rank) for place, rank in wanted])
        yield from ranks.passes()
        found = list(zip(wanted, ranks.found, strict=True))
        self._limits = {here: [limit for (place, _), limit in found if place == here] for here in trimmed}

    def ends(self, place: int) -> Sequence[int]:
        """The ranks of the smallest, and unless it is the last of all the largest, magnitude that is kept."""
        return (self.count - self.kept[place],)

    def choose(self, place: int, change: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | float]:
        return change.abs() >= self._limits[place][0], 1.0


class Outliers(Magnitude):
    """By magnitude, without the largest."""

    def ends(self, place: int) -> Sequence[int]:
        largest = int(self.job.numbers("gamma")[place] * self.count)
        first = max(0, self.count - self.kept[place] - largest)
        return first, first + self.kept[place] - 1

    def choose(self, place: int, change: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | float]:
        low, high = self._limits[place]
        size = change.abs()
        return (size >= low) & (size <= high), 1.0


class Random(Trim):
    """By chance."""

    def choose(self, place: int, change: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | float]:
        density = self.densities[place]
        return uniform(self.job, chunk, place) < density, density


class Ranked(Trim):
    """By chance, the larger ones of a row with a better one."""

    def choose(self, place: int, change: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | float]:
        epsilon = self.job.numbers("epsilon")[place]
        chance = ranks(change.abs()) * (2 * epsilon) + (self.densities[place] - epsilon)
        return uniform(self.job, chunk, place) < chance, chance


def ranks(sizes: Tensor) -> Tensor:
    """The rank of each number in its row, from 0 for the smallest to 1; equal ones have the mean of theirs."""
    if sizes.shape[1] == 1:
        return torch.full_like(sizes, 0.5)
    ordered = sizes.sort(dim=1).values
    below = torch.searchsorted(ordered, sizes)
    up_to = torch.searchsorted(ordered, sizes, right=True)
    return (below + up_to - 1).to(sizes.dtype) / (2 * (sizes.shape[1] - 1))


def _sizes(place: int, chunk: Chunk) -> Tensor:
    return (chunk.models[place + 1] - chunk.models[0]).abs()


TRIMS: dict[str, type[Trim]] = {
    "magnitude": Magnitude,
    "outliers": Outliers,
    "random": Random,
    "ranked": Ranked,
}
