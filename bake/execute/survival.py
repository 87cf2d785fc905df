"""How much of an update is left after it was rounded into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SAMPLED_ROWS = 16  # every 16th row of a tensor is used to measure what survived the rounding


def sampled(first: int) -> slice:
    """Those of the rows from `first` on."""
    return slice(-first % SAMPLED_ROWS, None, SAMPLED_ROWS)


@dataclass(frozen=True, slots=True)
class Survival:
    """How much of an update is left after rounding, as sums of squares and of products."""

    update: float = 0.0
    lost: float = 0.0
    along: float = 0.0  # what was written, times the update
    clamped: int = 0  # elements beyond the largest 8-bit number, which stands for them

    def __add__(self, other: Survival) -> Survival:
        return Survival(
            self.update + other.update,
            self.lost + other.lost,
            self.along + other.along,
            self.clamped + other.clamped,
        )

    @property
    def numbers(self) -> tuple[float, float, float, int]:
        """All of it, in order, to be stored."""
        return (self.update, self.lost, self.along, self.clamped)

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Survival:
        """The inverse of `numbers`; what is missing is 0."""
        update, lost, along, clamped = (*numbers, 0.0, 0.0, 0.0, 0.0)[:4]
        return cls(update, lost, along, int(clamped))

    @property
    def share(self) -> float | None:
        """1 - |lost| / |update|; None where nothing was to be added."""
        return None if self.update == 0 else max(0.0, 1.0 - (self.lost / self.update) ** 0.5)

    @property
    def mean_share(self) -> float | None:
        """1 - |1 - what was written along the update|: what single elements lose and gain by chance cancels out."""
        return None if self.update == 0 else max(0.0, 1.0 - abs(1.0 - self.along / self.update))


NOTHING = Survival()
