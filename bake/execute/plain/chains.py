"""Terms that are no sums of LoRAs, applied to a tensor in order, in float64: what `adapters.chain` does with torch.

LoHa and LoKr are added; DoRA, around one of them or a LoRA, adds and then gives rows or input channels their stored
lengths. Work is done in tiles that fit into a core's cache and follow from the tensor's shape alone, so that the
bytes depend on nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.execute.plain.desk import Desk
from bake.execute.plain.rounding import TooLarge, narrow_all, widen_all
from bake.execute.plain.survival import survival_of
from bake.execute.plain.updates import KNOWN, Doubles, update_of
from bake.execute.survival import NOTHING, Survival, sampled
from bake.io.arrays import as_bytes, read_array, stored_dtype
from bake.io.fileset import FileSet
from bake.keys.factors import as_matrix, is_plain
from bake.plan.model import TensorPlan, Term

_TILE_ELEMENTS = 48 * 1024  # three tiles in float64 stay in a core's cache


def is_chain(terms: Sequence[Term]) -> bool:
    """True if the terms can be applied here. Sums of LoRAs cannot: those are defined to the last bit."""
    if all(is_plain(term.algorithm, term.factors) for term in terms):
        return False
    return all(term.algorithm in KNOWN for term in terms)


class Chained:
    """One tensor, ready for any whole number of tiles of it."""

    def __init__(self, plan: TensorPlan, files: FileSet, desk: Desk, check: Callable[[], None]) -> None:
        """Load the factors, and go over the tensor for every term that needs to have seen all of its rows.

        check: called now and then; what it raises ends the work. Raises TooLarge.
        """
        self.plan = plan
        self._files = files
        self._columns = as_matrix(plan.view)[1]
        self.grain = max(1, _TILE_ELEMENTS // max(1, self._columns))  # rows of a tile
        self._steps: list[_Step] = []
        for term in plan.terms:
            step = _step(term, files)
            if isinstance(step, _ColumnLengths) and term.weight != 0:
                self._show(step, term.rows, desk, check)
            self._steps.append(step)

    def _show(self, step: _ColumnLengths, region: tuple[int, int], desk: Desk, check: Callable[[], None]) -> None:
        """Let a step see all of its rows as the ones before it leave them."""
        for first in range(*region, self.grain):
            check()
            rows = range(first, min(region[1], first + self.grain))
            values = self._widened(self._read(rows, desk), desk)
            self._apply(values, rows, desk)
            step.see(values, rows, desk)
        step.settle()

    def _read(self, rows: range, desk: Desk) -> NDArray[Any]:
        """The base's rows as they lie in the file."""
        source = self.plan.source
        stored = desk.array("seen", stored_dtype(source.dtype), (len(rows), self._columns))
        with self._files.using(source.input) as file:
            file.read_into(source.span[0] + rows.start * self._columns * stored.itemsize, as_bytes(stored))
        return stored

    def fuse(self, stored: NDArray[Any], out: NDArray[np.uint16], first: int, desk: Desk) -> Survival:
        """Write the finished rows from `first` on into `out`; return what survived of the update.

        stored: the base's rows as they lie in the file. out: likewise of the output. Raises TooLarge.
        """
        survival = NOTHING
        if stored.size:
            for begin in range(0, len(stored), self.grain):
                tile = slice(begin, begin + self.grain)
                survival += self._fuse(stored[tile], out[tile], first + begin, desk)
        return survival

    def _fuse(self, stored: NDArray[Any], out: NDArray[np.uint16], first: int, desk: Desk) -> Survival:
        """`fuse` for one tile."""
        values = self._widened(stored, desk)
        before = values[sampled(first)].astype(np.float32)
        self._apply(values, range(first, first + len(stored)), desk)
        update = values[sampled(first)] - before
        narrow_all(values, self.plan.dtype, out.view(stored_dtype(self.plan.dtype)), desk)
        return survival_of(self.plan, update, before, out[sampled(first)], desk)

    def _widened(self, stored: NDArray[Any], desk: Desk) -> Doubles:
        """The stored numbers in float64."""
        values = desk.array("values", np.float64, stored.shape)
        widen_all(stored, self.plan.source.dtype, values, desk)
        return values

    def _apply(self, values: Doubles, rows: range, desk: Desk) -> None:
        """Apply the steps that there are to these rows of the tensor."""
        for step in self._steps:
            step.apply(values, rows, desk)


class _Step(ABC):
    """One term on its region of the tensor."""

    def __init__(self, term: Term, files: FileSet, scale: float) -> None:
        """scale: of the update."""
        self.term = term
        self.update = update_of(term, files, scale)
        first, last = term.rows
        shift = term.part[0] - first
        # (first row of the tensor, past the last, how much further it is in the update)
        self._runs = [(first, last, shift)]
        if term.turn:
            self._runs = [(term.turn, last, shift - term.turn), (first, term.turn, shift + last - term.turn)]

    def apply(self, values: Doubles, rows: range, desk: Desk) -> None:
        """Overwrite these rows of the tensor with their new values, where the term's region is."""
        for region, own in self.parts(values, rows):
            self.change(region, own, desk)

    def parts(self, values: Doubles, rows: range) -> Iterator[tuple[Doubles, range]]:
        """What of these rows of the tensor is in the region, and which rows of the update belong there."""
        for first, last, shift in self._runs:
            mine = range(max(first, rows.start), min(last, rows.stop))
            if mine:
                region = values[mine.start - rows.start : mine.stop - rows.start, slice(*self.term.columns)]
                yield region, range(mine.start + shift, mine.stop + shift)

    @abstractmethod
    def change(self, region: Doubles, own: range, desk: Desk) -> None:
        """Overwrite values for which the rows `own` of the update are meant."""


class _Additive(_Step):
    """W + update."""

    def __init__(self, term: Term, files: FileSet) -> None:
        super().__init__(term, files, term.scale * term.weight)

    def change(self, region: Doubles, own: range, desk: Desk) -> None:
        self.update.add_to(region, own, desk)


class _Decomposed(_Step):
    """DoRA around an additive update: `adapters.dora` says how."""

    def __init__(self, term: Term, files: FileSet) -> None:
        super().__init__(term, files, term.scale)
        stored = term.factors["magnitude"]
        with files.using(stored.input) as file:
            shape = (int(np.prod(stored.shape)),)
            self.magnitude = read_array(file, stored.span[0], stored.dtype, shape, np.float64)

    def change(self, region: Doubles, own: range, desk: Desk) -> None:
        if self.term.weight == 0:
            return
        old = desk.array("old", np.float64, region.shape)
        np.copyto(old, region)
        self.update.add_to(region, own, desk)
        gain, rest = self.shares(region, own, desk)
        np.multiply(region, gain, out=region)
        if rest.any():
            np.add(region, np.multiply(old, rest, out=old), out=region)

    @abstractmethod
    def shares(self, updated: Doubles, own: range, desk: Desk) -> tuple[Doubles, Doubles]:
        """How much of V, which is `updated`, and how much of W is in the result."""

    def shares_of(self, magnitude: Doubles, squares: Doubles) -> tuple[Doubles, Doubles]:
        """The same from the squares of the lengths. Raises TooLarge if one is no number."""
        assert self.term.dora is not None
        if not np.isfinite(squares).all():
            raise TooLarge
        norms = np.sqrt(squares)
        has_none = norms == 0  # no direction: W stays
        gain = self.term.weight * (magnitude / (norms + self.term.dora.epsilon))
        return np.where(has_none, 0.0, gain), np.where(has_none, 1.0, 1 - self.term.weight)


class _RowLengths(_Decomposed):
    """DoRA that gives the tensor's rows their lengths."""

    def shares(self, updated: Doubles, own: range, desk: Desk) -> tuple[Doubles, Doubles]:
        squares = np.einsum("ij,ij->i", updated, updated)
        gain, rest = self.shares_of(self.magnitude[own.start : own.stop], squares)
        return gain[:, None], rest[:, None]


class _ColumnLengths(_Decomposed):
    """DoRA that gives the tensor's input channels their lengths: it has to see all rows before it changes one."""

    def __init__(self, term: Term, files: FileSet) -> None:
        super().__init__(term, files)
        self._squares = np.zeros(term.columns[1] - term.columns[0])

    def see(self, values: Doubles, rows: range, desk: Desk) -> None:
        """Count these rows of the tensor, which are used up."""
        for region, own in self.parts(values, rows):
            self.update.add_to(region, own, desk)
            self._squares += np.einsum("ij,ij->j", region, region)

    def settle(self) -> None:
        """All rows have been seen. Raises TooLarge."""
        channels = len(self.magnitude)
        taps = len(self._squares) // channels
        gain, rest = self.shares_of(self.magnitude, self._squares.reshape(channels, taps).sum(1))
        self._shares = gain.repeat(taps), rest.repeat(taps)

    def shares(self, updated: Doubles, own: range, desk: Desk) -> tuple[Doubles, Doubles]:
        return self._shares


def _step(term: Term, files: FileSet) -> _Step:
    if term.dora is None:
        return _Additive(term, files)
    # A transposed target turns the update's output axis into the tensor's columns.
    by_column = (term.dora.axis == 1) != term.transposed
    return (_ColumnLengths if by_column else _RowLengths)(term, files)
