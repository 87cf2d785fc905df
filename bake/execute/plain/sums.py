"""W plus thin products, in rows, rounded once to 16 bits: what `execute.sums` defines and does with torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.execute.halves import sum_by_halves
from bake.execute.plain.desk import Desk
from bake.execute.plain.rounding import UNIT, Floats, narrow_each, settle, widen
from bake.execute.survival import NOTHING, Survival, sampled
from bake.io.arrays import read_array, stored_dtype, widened
from bake.io.fileset import FileSet
from bake.keys.factors import as_matrix
from bake.plan.model import Stored, TensorPlan, Term

Doubles = NDArray[np.float64]

_UNIT64 = 2.0**-53
_SMALLEST_NORM = 2.0**-50  # norms below it count as it: their products are lost in float32
_NORM_MARGIN = 1 + 2.0**-10  # for the rounding of the norms, and of what is made of them
_PIECE_ELEMENTS = 64 * 1024  # that are rounded at a time: their buffers stay in a core's cache
_DENSE_SHARE = 1 / 200  # with more undecided elements than this, of all, float64 for all of them is cheaper
_GATHERED = 64 * 1024  # products that are summed by halves at a time


class Sum:
    """One tensor, ready for any rows of it."""

    def __init__(self, plan: TensorPlan, files: FileSet, is_fast: bool) -> None:
        """Load the factors. is_fast: float32 decides alone."""
        self.plan = plan
        self._is_fast = is_fast
        self._columns = as_matrix(plan.view)[1]
        self._groups = [_Group(list(terms), files) for _, terms in itertools.groupby(plan.terms, key=_region)]
        self._is_dense = False  # float64 has turned out to be cheaper

    def fuse(self, stored: NDArray[Any], out: NDArray[np.uint16], first: int, desk: Desk) -> Survival:
        """Write the finished rows from `first` on into `out`; return what survived of the update.

        stored: the base's rows as they lie in the file. out: likewise of the output. Raises TooLarge.
        """
        update: NDArray[Any] | None = None
        if self._groups:
            update = desk.array("update", np.float64 if self._is_dense else np.float32, stored.shape)
            self._update(update, first)
        height = max(1, _PIECE_ELEMENTS // max(1, self._columns))
        undecided = []
        for begin in range(0, len(stored), height):
            rows = slice(begin, begin + height)
            mine = None if update is None else update[rows]
            places = self._round(stored[rows], mine, out[rows], first + begin, desk)
            undecided.append(places + begin * self._columns)
        if update is None:
            return NOTHING
        self._recompute(np.concatenate(undecided), stored, out, first)
        return self._survival(stored, update, out, first, desk)

    def _update(self, update: NDArray[Any], first: int) -> None:
        """Set `update`, of the rows from `first` on, to the sum of all products, in any order."""
        rows = range(first, first + len(update))
        if len(self._groups) == 1 and self._groups[0].covers(rows, self._columns):
            left, right = self._groups[0].factors(update.dtype)
            np.matmul(left[self._groups[0].own(rows)], right, out=update)
            return
        update.fill(0)
        for group in self._groups:
            left, right = group.factors(update.dtype)
            update[group.inside(rows), group.across] += left[group.own(rows)] @ right

    def _round(
        self, stored: NDArray[Any], update: NDArray[Any] | None, out: NDArray[np.uint16], first: int, desk: Desk
    ) -> NDArray[np.intp]:
        """Round the sum for one piece into `out`; return the flat places where float32 leaves that open."""
        near = desk.array("near", np.float32, stored.shape)
        widen(stored, self.plan.source.dtype, near)
        if update is None:
            return settle(near, None, self.plan.dtype, out, desk)
        unit = UNIT
        if update.dtype == np.float64:
            unit = _UNIT64
            np.copyto(near, np.add(update, near, out=desk.array("total", np.float64, near.shape)), casting="same_kind")
        else:
            np.add(near, update, out=near)
        bound = None if self._is_fast else self._bound(near.shape, first, unit, desk)
        return settle(near, bound, self.plan.dtype, out, desk)

    def _bound(self, shape: tuple[int, ...], first: int, unit: float, desk: Desk) -> Floats:
        """How far the sum of these rows may be from what is defined, but for one rounding to float32.

        The error of one addition is at most `unit` times what is added up, and the magnitudes of all products
        of an element add up to at most the product of two norms (Cauchy and Schwarz).
        """
        rows, bound = range(first, first + shape[0]), desk.array("bound", np.float32, shape)
        additions = sum(group.rank + 2 for group in self._groups) + len(self._groups) + 2
        if len(self._groups) == 1 and self._groups[0].covers(rows, self._columns):
            (group,) = self._groups
            tall = group.tall[group.own(rows)] * np.float32(additions * unit)
            np.einsum("ij,jk->ik", tall, group.wide, out=bound)  # twice as fast as to multiply
            return bound
        bound.fill(0)
        for group in self._groups:
            tall = group.tall[group.own(rows)] * np.float32(additions * unit)
            bound[group.inside(rows), group.across] += tall * group.wide
        return bound

    def _recompute(self, places: NDArray[np.intp], stored: NDArray[Any], out: NDArray[np.uint16], first: int) -> None:
        """Set the elements at these flat places to what they are by definition."""
        step = max(64, _GATHERED // max(1, *(group.rank for group in self._groups)))
        for begin in range(0, len(places), step):
            rows, columns = np.divmod(places[begin : begin + step], self._columns)
            update = np.zeros(len(rows))
            for group in self._groups:
                group.add_each(update, rows + first, columns)
            update += widened(stored[rows, columns], self.plan.source.dtype, np.float64)
            out[rows, columns] = narrow_each(update, self.plan.dtype)
        if len(places) > stored.size * _DENSE_SHARE:
            self._is_dense = True

    def _survival(
        self, stored: NDArray[Any], update: NDArray[Any], out: NDArray[np.uint16], first: int, desk: Desk
    ) -> Survival:
        """What is left of the update in every 16th row of the tensor."""
        rows = sampled(first)
        source, target = self.plan.source.dtype, self.plan.dtype
        wanted = update[rows].astype(np.float32)
        before, written = np.empty_like(wanted), np.empty_like(wanted)
        widen(stored[rows], source, before)
        if source != target:  # what rounding the base loses is not the update's
            bits = np.empty(before.shape, np.uint16)
            settle(before, None, target, bits, desk)
            widen(bits.view(stored_dtype(target)), target, before)
        widen(out[rows].view(stored_dtype(target)), target, written)
        written -= before
        missing = wanted - written
        return Survival(
            float(np.vdot(wanted, wanted)), float(np.vdot(missing, missing)), float(np.vdot(wanted, written))
        )


class _Group:
    """The neighbouring terms on one region of the tensor, their factors side by side: one product adds them all."""

    def __init__(self, terms: Sequence[Term], files: FileSet) -> None:
        pairs = [_pair(term, files) for term in terms]
        self._rows = terms[0].rows
        self.across = slice(*terms[0].columns)
        self._left = np.concatenate([left for left, _ in pairs], axis=1)
        self._right = np.concatenate([right for _, right in pairs], axis=0)
        self.rank = len(self._right)
        self.tall, self.wide = _norms(pairs)

    def covers(self, rows: range, columns: int) -> bool:
        """True if all of these rows of a tensor of so many columns are updated."""
        inside = self._rows[0] <= rows.start and rows.stop <= self._rows[1]
        return inside and (self.across.start, self.across.stop) == (0, columns)

    def inside(self, rows: range) -> slice:
        """Which of these rows of the tensor are updated."""
        return slice(*(min(max(place - rows.start, 0), len(rows)) for place in self._rows))

    def own(self, rows: range) -> slice:
        """The rows of the left factor that go to them."""
        inside = self.inside(rows)
        shift = rows.start - self._rows[0]
        return slice(inside.start + shift, inside.stop + shift)

    def factors(self, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(left, right) in float32 or float64."""
        return self._in_float32 if dtype == np.float32 else (self._left, self._right64)

    @cached_property
    def _in_float32(self) -> tuple[Floats, Floats]:
        return self._left.astype(np.float32), self._right

    @cached_property
    def _right64(self) -> Doubles:
        return self._right.astype(np.float64)

    @cached_property
    def _by_column(self) -> Doubles:
        """The right factor with the ranks of a column side by side."""
        return np.ascontiguousarray(self._right.T, np.float64)

    def add_each(self, update: Doubles, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> None:
        """Add to `update` (n,) the elements at these places of the tensor, each summed as defined."""
        inside = (rows >= self._rows[0]) & (rows < self._rows[1])
        inside &= (columns >= self.across.start) & (columns < self.across.stop)
        products = self._left.take(rows[inside] - self._rows[0], axis=0)
        products *= self._by_column.take(columns[inside] - self.across.start, axis=0)
        update[inside] += sum_by_halves(products)


def _pair(term: Term, files: FileSet) -> tuple[Doubles, Floats]:
    """(left, right) of a term for its region: left is scaled, in float64; right is exact in float32."""
    up, down = (_load(term.factors[name], files) for name in ("up", "down"))
    expert, experts = (int(term.settings.get(name) or default) for name, default in (("expert", 0), ("experts", 1)))
    rank = len(down) // experts
    left, right = up[:, expert::experts], down[expert * rank : (expert + 1) * rank]
    left, right = left[:, : term.rank_limit], right[: term.rank_limit]
    if term.transposed:
        left, right = right.T, left.T
    return left[slice(*term.part)].astype(np.float64) * (term.scale * term.weight), np.ascontiguousarray(right)


def _load(stored: Stored, files: FileSet) -> Floats:
    with files.using(stored.input) as file:
        return read_array(file, stored.span[0], stored.dtype, as_matrix(stored.shape), np.float32)


def _norms(pairs: Sequence[tuple[Doubles, Floats]]) -> tuple[Floats, Floats]:
    """Upper bounds of the norms of every row of the left and of every column of the right factors, side by side.

    (rows, 1) and (1, columns). Each pair is balanced by a power of two first: what matters is the product.
    """
    tall, wide = [], []
    for left, right in pairs:
        rows = np.sqrt(np.square(left).sum(axis=1, keepdims=True))
        columns = np.sqrt(np.square(right, dtype=np.float64).sum(axis=0, keepdims=True))
        higher, lower = float(rows.max(initial=0.0)), float(columns.max(initial=0.0))
        shift = 0
        if 0 < higher < math.inf and 0 < lower < math.inf:
            shift = round((math.log2(lower) - math.log2(higher)) / 2)
        tall.append(np.square(rows * 2.0**shift))
        wide.append(np.square(columns * 2.0**-shift))
    return _root(tall), _root(wide)


def _root(squares: Sequence[Doubles]) -> Floats:
    norms: Doubles = np.sqrt(np.add.reduce(squares)) * _NORM_MARGIN
    return norms.clip(_SMALLEST_NORM).astype(np.float32)


def _region(term: Term) -> tuple[tuple[int, int], tuple[int, int]]:
    return term.rows, term.columns
