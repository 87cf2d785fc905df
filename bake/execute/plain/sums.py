"""W plus thin products, in rows, rounded once to 16 bits: what `execute.sums` defines and does with torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bake.execute import kernels
from bake.execute.halves import sum_by_halves
from bake.execute.plain.desk import Desk
from bake.execute.plain.rounding import UNIT, Floats, TooLarge, narrow, narrow_each, settle, widen
from bake.execute.plain.survival import survival_of
from bake.execute.survival import NOTHING, SAMPLED_ROWS, Survival, sampled
from bake.io.arrays import as_bytes, stored_dtype, widened
from bake.io.fileset import FileSet
from bake.keys.factors import as_matrix
from bake.plan.model import Stored, TensorPlan, Term

Number = TypeVar("Number", np.float32, np.float64)
Doubles = NDArray[np.float64]
_AddUp = Callable[[NDArray[np.float64], Floats], NDArray[np.float64]]

_UNIT64 = 2.0**-53
_SMALLEST_NORM = 2.0**-50  # norms below it count as it: their products are lost in float32
_NORM_MARGIN = 1 + 2.0**-10  # for the rounding of the norms, and of what is made of them
_PIECE_ELEMENTS = 256 * 1024  # that are rounded at a time, and better multiplied: their buffers stay in a core's cache
_ROWS_AT_ONCE = 96  # or more are multiplied at a time: for fewer, bringing the right factor in order would not pay
_RANKS_AT_ONCE = 64  # that are multiplied in float32: the more, the more is lost
# With more undecided elements than this, of all, float64 for all products is cheaper.
_DENSE_SHARE = 1 / 80
_DENSE_SHARE_COMPILED = 1 / 32
_GATHERED = 64 * 1024  # factors that are gathered at a time, for elements that are computed one by one


class Sum:
    """One tensor, ready for any rows of it."""

    grain = 1  # how many rows have to be worked on together

    def __init__(self, plan: TensorPlan, files: FileSet, is_fast: bool) -> None:
        """Load the factors. is_fast: float32 decides alone."""
        self.plan = plan
        self._is_fast = is_fast
        self._columns = as_matrix(plan.view)[1]
        self._groups = [_Group(list(terms), files) for _, terms in itertools.groupby(plan.terms, key=_region)]
        self._cuts = sorted({place for group in self._groups for place in group.rows})
        self._is_dense = False  # float64 has turned out to be cheaper

    def fuse(self, stored: NDArray[Any], out: NDArray[np.uint16], first: int, desk: Desk) -> Survival:
        """Write the finished rows from `first` on into `out`; return what survived of the update.

        stored: the base's rows as they lie in the file. out: likewise of the output. Raises TooLarge.
        """
        last, survival = first + len(stored), NOTHING
        for begin, end in itertools.pairwise([first, *(place for place in self._cuts if first < place < last), last]):
            rows = slice(begin - first, end - first)
            survival += self._fuse(stored[rows], out[rows], begin, desk)
        return survival

    def _fuse(self, stored: NDArray[Any], out: NDArray[np.uint16], first: int, desk: Desk) -> Survival:
        """`fuse` for rows on which the same groups are."""
        group = self._only(range(first, first + len(stored)))
        is_usual = group is not None and group.rank > 0 and not self._is_fast and not self._is_dense
        if group is not None and is_usual and kernels.compiled is not None and kernels.products is not None:
            return self._fuse_at_once(kernels.products, group, stored, out, first, desk)
        update = desk.array("update", np.float32, stored.shape) if self._groups else None
        height = max(1, _PIECE_ELEMENTS // max(1, self._columns))
        together = height * -(-_ROWS_AT_ONCE // height)
        undecided = []
        for begin in range(0, len(stored), height):
            rows = slice(begin, begin + height)
            if update is not None and begin % together == 0:
                self._update(update[begin : begin + together], first + begin, desk)
            places = self._round(stored[rows], None if update is None else update[rows], out[rows], first + begin, desk)
            undecided.append(places + begin * self._columns)
        if update is None:
            return NOTHING
        self._recompute(np.concatenate(undecided), stored, out, first)
        return self._survival(stored, update[sampled(first)], out, first, desk)

    def _only(self, rows: range) -> _Group | None:
        """The group that updates these rows, if it is one and updates all of them."""
        groups = [group for group in self._groups if group.reaches(rows)]
        return groups[0] if len(groups) == 1 and groups[0].covers(rows, self._columns) else None

    def _fuse_at_once(
        self,
        products: kernels.Products,
        group: _Group,
        stored: NDArray[Any],
        out: NDArray[np.uint16],
        first: int,
        desk: Desk,
    ) -> Survival:
        """`fuse` by one loop that multiplies, adds and rounds."""
        rows = range(first, first + len(stored))
        left, right = group.factors(rows)[0], group.in_tiles(products.WIDTH)
        tall = group.tall[group.own(rows)] * np.float32(_lost_in_float32(group.rank, products.DEPTH, 1))
        places = desk.array("places", np.intp, (stored.size,))
        sample = -first % SAMPLED_ROWS
        update = np.empty((len(range(sample, len(stored), SAMPLED_ROWS)), self._columns), np.float32)
        source, target = self.plan.source.dtype, self.plan.dtype
        count = products.fuse(
            *(left, right, stored, source, tall, group.wide, target, out, places, update, sample, SAMPLED_ROWS)
        )
        if count < 0:
            raise TooLarge
        self._recompute(places[:count], stored, out, first)
        return self._survival(stored, update, out, first, desk)

    def _update(self, update: Floats, first: int, desk: Desk) -> None:
        """Set `update`, of the rows from `first` on, to the sum of all products, in any order."""
        if not self._is_dense:
            self._products(update, first, desk)
            return
        wide = desk.array("wide", np.float64, update.shape)
        self._products(wide, first, desk)
        np.copyto(update, wide, casting="same_kind")

    def _products(self, update: NDArray[Any], first: int, desk: Desk) -> None:
        """Set `update`, of the rows from `first` on, to the sum of all products, in its dtype."""
        rows = range(first, first + len(update))
        only = self._only(rows)
        if only is not None:
            only.multiply(rows, update, desk)
            return
        update.fill(0)
        for group in self._groups:
            own = desk.array("own", update.dtype, update[group.inside(rows), group.across].shape)
            group.multiply(rows, own, desk)
            update[group.inside(rows), group.across] += own

    def _round(
        self, stored: NDArray[Any], update: Floats | None, out: NDArray[np.uint16], first: int, desk: Desk
    ) -> NDArray[np.intp]:
        """Round the sum for one piece into `out`; return the flat places where float32 leaves that open."""
        source, target = self.plan.source.dtype, self.plan.dtype
        if update is not None and not self._is_fast:
            tall, wide = self._bound(stored.shape, first, desk)
            return settle(stored, source, update, tall, wide, target, out, desk)
        near = desk.array("near", np.float32, stored.shape)
        widen(stored, source, near)
        if update is not None:
            np.add(near, update, out=near)
        narrow(near, target, out, desk)
        return np.empty(0, np.intp)

    def _bound(self, shape: tuple[int, ...], first: int, desk: Desk) -> tuple[Floats | None, Floats]:
        """How far the sum of these rows may be from what is defined, but for one rounding to float32.

        As `settle` wants it: of every row and of every column, or of every element.
        """
        rows, share = range(first, first + shape[0]), np.float32(self._lost_share)
        only = self._only(rows)
        if only is not None:
            return only.tall[only.own(rows)] * share, only.wide
        bound = desk.array("bounds", np.float32, shape)
        bound.fill(_SMALLEST_NORM**2 * share)
        for group in self._groups:
            bound[group.inside(rows), group.across] += group.tall[group.own(rows)] * share * group.wide
        return None, bound

    @property
    def _lost_share(self) -> float:
        """How far `_update` may be from what is defined, as a share of what the magnitudes of all products add up to.

        Those add up to at most the product of two norms (Cauchy and Schwarz).
        """
        if self._is_dense:
            return UNIT + self._lost_in_float64
        return max(_lost_in_float32(group.rank, _RANKS_AT_ONCE, len(self._groups)) for group in self._groups)

    @property
    def _lost_in_float64(self) -> float:
        """The same for a sum in float64 in any order; the definition is one order."""
        return (sum(group.rank for group in self._groups) + len(self._groups) + 2) * 2 * _UNIT64

    def _recompute(self, places: NDArray[np.intp], stored: NDArray[Any], out: NDArray[np.uint16], first: int) -> None:
        """Set the elements at these flat places to what they are by definition; if they are many, note that."""
        loops = kernels.compiled
        limit = _DENSE_SHARE if loops is None else _DENSE_SHARE_COMPILED
        self._is_dense = self._is_dense or len(places) > stored.size * limit
        if not len(places):
            return
        if loops is None:
            self._recompute_with_numpy(places, stored, out, first)
            return
        # Float64 in any order decides nearly all of them, in half of the time.
        for norms in (np.zeros(len(places)), None):
            totals = np.zeros(len(places))
            for group in self._groups:
                group.add_with(loops, places, self._columns, first, totals, norms)
            source, target, share = self.plan.source.dtype, self.plan.dtype, self._lost_in_float64
            count = loops.finish(stored, source, places, totals, norms, share, target, out)
            if count < 0:
                raise TooLarge
            places = places[:count]

    def _recompute_with_numpy(
        self, places: NDArray[np.intp], stored: NDArray[Any], out: NDArray[np.uint16], first: int
    ) -> None:
        """The same. Float64 in any order decides nearly all of them, in a third of the time."""
        step = max(64, _GATHERED // max(1, *(group.rank for group in self._groups)))
        for begin in range(0, len(places), step):
            some = places[begin : begin + step]
            values, bound = self._sum_each(some, stored, first, _sum_in_any_order)
            low, high = (narrow_each(end, self.plan.dtype) for end in (values - bound, values + bound))
            out.reshape(-1)[some] = low
            some = some[low != high]
            if len(some):
                values, _ = self._sum_each(some, stored, first, _sum_as_defined)
                out.reshape(-1)[some] = narrow_each(values, self.plan.dtype)

    def _sum_each(
        self, places: NDArray[np.intp], stored: NDArray[Any], first: int, add_up: _AddUp
    ) -> tuple[Doubles, Doubles]:
        """(values, how far they may be from what is defined) at these flat places."""
        rows = places // self._columns
        columns = places - rows * self._columns
        update, norms = np.zeros(len(places)), np.zeros(len(places))
        for group in self._groups:
            group.add_each(update, norms, rows + first, columns, add_up)
        update += widened(stored.reshape(-1)[places], self.plan.source.dtype, np.float64)
        return update, norms * self._lost_in_float64 + np.abs(update) * (4 * _UNIT64)

    def _survival(
        self, stored: NDArray[Any], update: Floats, out: NDArray[np.uint16], first: int, desk: Desk
    ) -> Survival:
        """What is left of the update, which is given in every 16th row of the tensor."""
        before = np.empty(update.shape, np.float32)
        widen(np.ascontiguousarray(stored[sampled(first)]), self.plan.source.dtype, before)
        return survival_of(self.plan, update, before, out[sampled(first)], desk)


class _Group:
    """The neighbouring terms on one region of the tensor, their factors side by side: one product adds them all."""

    def __init__(self, terms: Sequence[Term], files: FileSet) -> None:
        pairs = [_pair(term, files) for term in terms]
        self.rows = terms[0].rows
        self.across = slice(*terms[0].columns)
        self._left = _joined([left for left, _ in pairs], axis=1)
        self._right = _joined([right for _, right in pairs], axis=0)
        self.rank = len(self._right)
        self.tall, self.wide = _norms(pairs)
        self._tiles: Floats | None = None

    def reaches(self, rows: range) -> bool:
        """True if some of these rows of the tensor are updated."""
        return self.rows[0] < rows.stop and rows.start < self.rows[1]

    def covers(self, rows: range, columns: int) -> bool:
        """True if all of these rows of a tensor of so many columns are updated."""
        inside = self.rows[0] <= rows.start and rows.stop <= self.rows[1]
        return inside and (self.across.start, self.across.stop) == (0, columns)

    def inside(self, rows: range) -> slice:
        """Which of these rows of the tensor are updated."""
        return slice(*(min(max(place - rows.start, 0), len(rows)) for place in self.rows))

    def own(self, rows: range) -> slice:
        """The rows of the left factor that go to them."""
        inside = self.inside(rows)
        shift = rows.start - self.rows[0]
        return slice(inside.start + shift, inside.stop + shift)

    def factors(self, rows: range) -> tuple[Floats, Floats]:
        """(left, right) for these rows of the tensor, in float32."""
        left, right = self._in_float32
        return left[self.own(rows)], right

    def multiply(self, rows: range, out: NDArray[Any], desk: Desk) -> None:
        """Set `out` to the products for these rows of the tensor, in its dtype.

        In float32 so many ranks at a time that little is lost.
        """
        if out.dtype == np.float64:
            np.matmul(self._left[self.own(rows)], self._right64, out=out)
            return
        left, right = self.factors(rows)
        np.matmul(left[:, :_RANKS_AT_ONCE], right[:_RANKS_AT_ONCE], out=out)
        for begin in range(_RANKS_AT_ONCE, self.rank, _RANKS_AT_ONCE):
            ranks, more = slice(begin, begin + _RANKS_AT_ONCE), desk.array("more", np.float32, out.shape)
            np.matmul(left[:, ranks], right[ranks], out=more)
            np.add(out, more, out=out)

    @cached_property
    def _in_float32(self) -> tuple[Floats, Floats]:
        return self._left.astype(np.float32), self._right

    def in_tiles(self, width: int) -> Floats:
        """The right factor cut into tiles of so many columns, with zeros at the end: (tiles, rank, width)."""
        if self._tiles is None:
            count = -(-self._right.shape[1] // width)
            padded = np.zeros((self.rank, count * width), np.float32)
            padded[:, : self._right.shape[1]] = self._right
            self._tiles = np.ascontiguousarray(padded.reshape(self.rank, count, width).swapaxes(0, 1))
        return self._tiles

    @cached_property
    def _right64(self) -> Doubles:
        return self._right.astype(np.float64)

    @cached_property
    def _by_column(self) -> Floats:
        """The right factor with the ranks of a column side by side."""
        return np.ascontiguousarray(self._right.T)

    def add_with(
        self,
        loops: kernels.Loops,
        places: NDArray[np.intp],
        columns: int,
        first: int,
        totals: Doubles,
        norms: Doubles | None,
    ) -> None:
        """Add the elements at flat `places` of rows of so many columns, of the tensor from `first` on, to `totals`.

        As `loops` do it: with `norms` in any order.
        """
        if self.rank:
            begin, tall, wide = (self.rows[0] - first, self.across.start), self.tall, self.wide
            right = self._by_column
            loops.add_products(places, columns, self._left, right, tall, wide, self.rank, begin, totals, norms)

    def add_each(
        self, update: Doubles, norms: Doubles, rows: NDArray[np.intp], columns: NDArray[np.intp], add_up: _AddUp
    ) -> None:
        """Add the elements at these places of the tensor to `update` (n,), and what bounds them to `norms`."""
        rows, columns = rows - self.rows[0], columns - self.across.start
        inside: NDArray[np.bool_] | slice = slice(None)
        here = (rows >= 0) & (rows < len(self._left)) & (columns >= 0) & (columns < self._right.shape[1])
        if not here.all():
            inside, rows, columns = here, rows[here], columns[here]
        update[inside] += add_up(self._left.take(rows, axis=0), self._by_column.take(columns, axis=0))
        norms[inside] += self.tall[rows, 0] * self.wide[0, columns]


def _lost_in_float32(rank: int, together: int, groups: int) -> float:
    """How far sums of so many products may be from what is defined, as a share of what bounds their magnitudes.

    together: are added up, in any order, before they are added to the others of their group; left is rounded first.
    """
    return (min(rank, together) + -(-rank // together) + groups + 3) * UNIT


def _sum_in_any_order(left: Doubles, right: Floats) -> Doubles:
    """The sum of the products of each row of two (n, rank)."""
    total: Doubles = np.einsum("ij,ij->i", left, right)
    return total


def _sum_as_defined(left: Doubles, right: Floats) -> Doubles:
    """The same, as docs/numerics.md has it; `left` is used up."""
    left *= right
    total: Doubles = sum_by_halves(left)
    return total


def _pair(term: Term, files: FileSet) -> tuple[Doubles, Floats]:
    """(left, right) of a term for its region: left is scaled, in float64; right is exact in float32."""
    up, down = (_load(term.factors[name], files) for name in ("up", "down"))
    expert, experts = (int(term.settings.get(name) or default) for name, default in (("expert", 0), ("experts", 1)))
    rank = len(down) // experts
    left, right = up[:, expert::experts], down[expert * rank : (expert + 1) * rank]
    left, right = left[:, : term.rank_limit], right[: term.rank_limit]
    if term.transposed:
        left, right = right.T, left.T
    scaled = np.multiply(left[slice(*term.part)], term.scale * term.weight, dtype=np.float64, order="C")
    return scaled, np.ascontiguousarray(right)


def _joined(arrays: list[NDArray[Number]], axis: int) -> NDArray[Number]:
    """The arrays side by side; a single one as it is."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis)


def _load(stored: Stored, files: FileSet) -> Floats:
    values = np.empty(as_matrix(stored.shape), np.float32)
    raw = np.empty(values.shape, stored_dtype(stored.dtype))
    with files.using(stored.input) as file:
        file.read_into(stored.span[0], as_bytes(raw))
    widen(raw, stored.dtype, values)
    return values


def _norms(pairs: Sequence[tuple[Doubles, Floats]]) -> tuple[Floats, Floats]:
    """Upper bounds of the norms of every row of the left and of every column of the right factors, side by side.

    (rows, 1) and (1, columns). Each pair is balanced by a power of two first: what matters is the product.
    """
    tall, wide = [], []
    for left, right in pairs:
        rows = np.sqrt(np.einsum("ij,ij->i", left, left))[:, None]
        # In float32 a square may lose 2**-150 and each sum of so many 2**-24 of it.
        squares = np.einsum("ij,ij->j", right, right)[None].astype(np.float64)
        columns = np.sqrt(squares * (1 + len(right) * 2.0**-23) + len(right) * 2.0**-149)
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
