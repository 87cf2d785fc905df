"""Order statistics of all elements of a tensor, exactly, in a few passes and little memory.

Non-negative floats are ordered as their bits are. A pass counts how many numbers begin with which 16 bits; the next
one looks at those only that begin like the wanted one, and collects them as soon as they are few. Counting has no
order, so the result depends on the values alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Survey

_DIGIT = 16  # bits that a pass counts
_FIRST_SHIFT = 64 - _DIGIT
_COLLECTED = 1024 * 1024  # numbers that may be collected for one search

Keys = Callable[[Chunk], Tensor]  # chunk -> non-negative numbers, float64, one for each element


class Ranks:
    """Searches for the numbers at some places of some sequences, as if each had been sorted."""

    def __init__(self, wanted: Sequence[tuple[Keys, int]]) -> None:
        """wanted: pairs of a sequence and a place in it, counted from 0, the smallest."""
        self._searches = [_Search(keys, rank) for keys, rank in wanted]

    def passes(self) -> Iterator[Survey]:
        """The passes that are needed."""
        while open_ones := [search for search in self._searches if search.found is None]:
            yield _Pass(open_ones)
            for search in open_ones:
                search.narrow()

    @property
    def found(self) -> list[float]:
        """The number at each wanted place, once all passes were made."""
        return [search.found for search in self._searches if search.found is not None]


class _Pass(Survey):
    def __init__(self, searches: Sequence[_Search]) -> None:
        self._searches = searches

    def add(self, chunk: Chunk) -> None:
        for search in self._searches:
            search.look_at(chunk)


class _Search:
    """For the number of one rank: what is known of its bits."""

    def __init__(self, keys: Keys, rank: int) -> None:
        self.found: float | None = None
        self._keys = keys
        self._rank = rank  # among the candidates
        self._shift = _FIRST_SHIFT
        self._prefix: int | None = None  # bits above those that are counted; candidates have them
        self._few = False
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        self._candidates: list[Tensor] = []
        self._extremes: list[int] = []

    def look_at(self, chunk: Chunk) -> None:
        bits = self._keys(chunk).reshape(-1).view(torch.int64)
        if self._prefix is not None:
            bits = bits[bits >> (self._shift + _DIGIT) == self._prefix]
        if bits.numel() == 0:
            return
        if self._few:
            candidates = bits.cpu()
            with self._lock:
                self._candidates.append(candidates)
            return
        digits = (bits >> self._shift) & ((1 << _DIGIT) - 1)
        first = int(digits.min())
        counts = torch.bincount(digits - first).cpu()
        extremes = [int(bits.min()), int(bits.max())]
        with self._lock:
            self._counts[first : first + len(counts)] += counts
            self._extremes += extremes

    def narrow(self) -> None:
        """Use what a pass counted or collected."""
        if self._few:
            self._settle(int(torch.cat(self._candidates).sort().values[self._rank]))
        elif min(self._extremes) == max(self._extremes):
            self._settle(self._extremes[0])
        else:
            ends = self._counts.cumsum(0)
            digit = int(torch.searchsorted(ends, self._rank, right=True))
            self._rank -= int(ends[digit] - self._counts[digit])
            self._prefix = (self._prefix or 0) << _DIGIT | digit
            self._few = int(self._counts[digit]) <= _COLLECTED
            if self._shift == 0:
                self._settle(self._prefix)
            self._shift -= _DIGIT
        self._begin()

    def _settle(self, bits: int) -> None:
        self.found = float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))
