"""Additive updates: products of thin matrices and stored differences, summed and rounded once, to the last bit.

What is written is, for every element, this number rounded once:

    W + ((g_1 + g_2) + ... )        in float64, one operation after the other

with one g for each region of the tensor that some term updates: for low-rank terms the products of scaled left
and right factors, of all of them side by side, padded with zeros to a power of two and summed by halves
(the second half is added to the first until one is left); for a stored difference weight * difference.

The sum is computed in float32 with a bound on its error. Where the bound leaves the rounding open, the element
is computed again as above. A tensor where that is the case too often, or with a stored difference, is summed in
float64 to begin with; what is written is the same.
"""

from __future__ import annotations

import itertools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bake.adapters import LOW_RANK
from bake.adapters.chain import pair
from bake.dtypes import DTYPES
from bake.execute.chunk import Chunk
from bake.execute.compute import Rows, Work, lost
from bake.execute.device import Desk, Device
from bake.execute.halves import sum_by_halves
from bake.execute.rounding import SPREAD, UNIT, Rounding, differing, has_nonfinite, put, settle, take
from bake.execute.survival import Survival, sampled
from bake.io.fileset import FileSet
from bake.keys.factors import as_matrix
from bake.plan.model import TensorPlan, Term

_UNIT64 = 2.0**-53

# Norms below this count as this: squares of smaller numbers are lost in float32.
_SMALLEST_NORM = 2.0**-50
_NORM_MARGIN = 1 + 2.0**-10  # for the rounding of the norms themselves

# With more undecided elements than this, of all of a chunk, float64 for all of them is cheaper: one costs about
# as much as 60 to 80 elements cost more in a float64 sum than in one of float32.
_DENSE_SHARE = 1 / 64
_GATHERED = 128 * 1024  # products that are summed by halves at a time


class Sum(Work):
    """W plus everything that is added to it."""

    def __init__(
        self, plan: TensorPlan, files: FileSet, device: Device, rounding: Rounding, merged: Rows | None = None
    ) -> None:
        """Load the low-rank factors of `plan`; stored differences are read chunk by chunk."""
        super().__init__(plan, files, device, rounding, merged)
        self.exact = device.torch if device.has_float64 else torch.device("cpu")
        self._steps: list[_Products | _Difference] = []
        for region, group in itertools.groupby(plan.terms, key=_region):
            terms = list(group)
            if terms[0].algorithm in LOW_RANK:
                self._steps.append(_Products(terms, *region[1:], self))
            else:
                self._steps += [_Difference(term, self) for term in terms]
        # Set, by any thread, once float64 turns out to be cheaper.
        self._is_dense = (
            DTYPES[plan.dtype].bits > 16
            or plan.source.dtype == "F64"
            or plan.scale is not None  # the base's values are exact in float64 alone
            or merged is not None
            or any(isinstance(step, _Difference) for step in self._steps)
        )
        self.has_free_grid = DTYPES[plan.dtype].bits <= 16

    def _pieces(self, first: int, count: int) -> list[_Piece]:
        """What is added to these rows."""
        rows = range(first, first + count)
        width = as_matrix(self.plan.view)[1]
        return [piece for step in self._steps if (piece := step.on(rows, width)) is not None]

    def _fuse(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk) -> Survival:
        pieces = self._pieces(chunk.first, raw.shape[0])
        if self._is_dense:
            return self._in_float64(raw, out, chunk, desk, pieces)
        return self._in_float32(raw, out, chunk, desk, pieces)

    def _beyond(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk) -> Survival:
        # Large numbers may cancel that float32 cannot hold.
        survival = self._in_float64(raw, out, chunk, desk, self._pieces(chunk.first, raw.shape[0]))
        return survival if not has_nonfinite(out) else super()._beyond(raw, out, chunk, desk)

    def _in_float32(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk, pieces: Sequence[_Piece]) -> Survival:
        near = desk.computed("near", torch.float32, raw.shape)
        slack = desk.computed("slack", torch.float32, raw.shape)
        near.copy_(raw)
        if not (len(pieces) == 1 and pieces[0].set_to(slack)):
            slack.zero_()
            for piece in pieces:
                piece.add_to(slack)
        near.add_(slack)
        update = slack[sampled(chunk.first)].clone()
        if self._rounding.is_fast:
            self._rounding.narrow(near, out, self._flat(chunk))
            return lost(update, raw, out, chunk)
        torch.abs(near, out=slack)
        places = self._settle(near, slack, out, chunk, desk, pieces, UNIT)
        if places.shape[0] > raw.numel() * _DENSE_SHARE and self.device.has_float64:
            self._is_dense = True
            return self._in_float64(raw, out, chunk, desk, pieces)
        self._recompute(places, raw, out, chunk, pieces)
        return lost(update, raw, out, chunk)

    def _in_float64(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk, pieces: Sequence[_Piece]) -> Survival:
        values = self._sum(raw, pieces, desk.computed("wide", torch.float64, raw.shape), desk)
        if out.element_size() >= 4:
            return self._round(values, raw, out, chunk, desk)
        rows = sampled(chunk.first)
        update = values[rows] - raw[rows].to(torch.float64)
        near = desk.computed("near", torch.float32, raw.shape)
        slack = desk.computed("slack", torch.float32, raw.shape)
        near.copy_(values)
        torch.abs(near, out=slack)
        places = self._settle(near, slack, out, chunk, desk, pieces, _UNIT64)
        self._recompute(places, raw, out, chunk, pieces)
        return lost(update, raw, out, chunk)

    def _settle(
        self, near: Tensor, slack: Tensor, out: Tensor, chunk: Chunk, desk: Desk, pieces: Sequence[_Piece], unit: float
    ) -> Tensor:
        """Round what is decided into `out`; return the flat places of the chunk where it is not.

        near: the sum in float32. slack: its magnitudes. unit: the largest relative error of the arithmetic before.
        """
        total = sum(piece.additions for piece in pieces)
        for piece in pieces:
            piece.bound(slack, (total + 8) * unit / SPREAD)
        other = desk.computed("other", out.dtype, out.shape)
        settle(near, slack, self._rounding, out, other, self._flat(chunk))
        return differing(out, other)

    def _sum(self, raw: Tensor, pieces: Sequence[_Piece], total: Tensor, desk: Desk) -> Tensor:
        """The new values in float64, summed in any order: `total`, overwritten."""
        if not (len(pieces) == 1 and pieces[0].set_to(total)):
            total.zero_()
            for piece in pieces:
                piece.add_to(total)
        if raw.element_size() < 4:  # straight from 16 bits it takes three times as long
            near = desk.computed("near", torch.float32, raw.shape)
            raw = near.copy_(raw)
        return total.add_(raw)

    def _values(self, raw: Tensor, chunk: Chunk) -> Tensor:
        total = torch.empty(raw.shape, dtype=torch.float64, device=raw.device)
        return self._sum(raw, self._pieces(chunk.first, raw.shape[0]), total, Desk(self.device))

    def interval(self, raw: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        pieces = self._pieces(chunk.first, raw.shape[0])
        near = raw.to(torch.float32, copy=True)
        slack = near.abs()  # what is lost of the base, and below of the result, is each at most a third of this
        update = torch.zeros_like(near)
        for piece in pieces:
            piece.add_to(update)
        near.add_(update)
        slack.add_(torch.abs(near, out=update))
        total = sum(piece.additions for piece in pieces)
        for piece in pieces:
            piece.bound(slack, (total + 8) * UNIT / SPREAD)
        return near, slack

    def exactly(self, places: Tensor, raw: Tensor, chunk: Chunk) -> Tensor:
        pieces = self._pieces(chunk.first, raw.shape[0])
        found = [values for _, values in self._defined(places, raw, chunk, pieces)]
        return torch.cat(found).to(raw.device) if found else raw.new_empty(0, dtype=torch.float64)

    def _recompute(self, places: Tensor, raw: Tensor, out: Tensor, chunk: Chunk, pieces: Sequence[_Piece]) -> None:
        """Set the elements at these flat places of the chunk to what they are by definition."""
        for some, values in self._defined(places, raw, chunk, pieces):
            index = some.to(self.exact) + self._flat(chunk)
            put(out, some, self._rounding.narrow_each(values, index).to(out.device))

    def _defined(
        self, places: Tensor, raw: Tensor, chunk: Chunk, pieces: Sequence[_Piece]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(flat places of the chunk, what the elements there are by definition), some at a time."""
        widest = max((piece.additions for piece in pieces), default=1)
        for some in torch.split(places, max(64, _GATHERED // max(1, widest))):
            here = some.to(self.exact)
            rows = torch.div(here, chunk.columns, rounding_mode="floor")
            columns = here - rows * chunk.columns
            update = torch.zeros(here.shape[0], dtype=torch.float64, device=self.exact)
            for piece in pieces:
                piece.add_each(update, rows, columns)
            yield some, update.add_(take(raw, some).to(self.exact).to(torch.float64))


class _Piece(ABC):
    """The part of one step that falls into one chunk."""

    additions: int  # at most so many roundings of one operation lie between the stored numbers and an element

    def __init__(self, rows: slice, columns: slice, is_whole: bool) -> None:
        self.rows, self.columns = rows, columns  # of the chunk
        self.is_whole = is_whole  # it covers the chunk

    def set_to(self, total: Tensor) -> bool:
        """Make `total` the update of a whole chunk, if that is easy; say whether it was."""
        return False

    @abstractmethod
    def add_to(self, total: Tensor) -> None:
        """Add the update to `total`, a whole chunk, in its dtype and any order."""

    @abstractmethod
    def bound(self, slack: Tensor, unit: float) -> None:
        """Add to `slack`, a whole chunk, `unit` times a bound on the sum of the magnitudes that are added up."""

    @abstractmethod
    def add_each(self, total: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Add the update's elements at (rows, columns) of the chunk to the float64 `total`, in the fixed order."""

    def _inside(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """Which of these elements are in the piece; None for all of them."""
        if self.is_whole:
            return None
        inside = (rows >= self.rows.start) & (rows < self.rows.stop)
        inside &= (columns >= self.columns.start) & (columns < self.columns.stop)
        return None if bool(inside.all()) else inside


class _Products:
    """Low-rank terms of one region: factors side by side, so one product adds them all."""

    def __init__(self, terms: Sequence[Term], rows: tuple[int, int], columns: tuple[int, int], work: Sum) -> None:
        """Load the factors. left (rows, rank) is float64, right (rank, columns) float32 where that is exact."""
        self.rows, self.columns, self.device = rows, columns, work.device
        pairs = [_pair(term, work) for term in terms]
        self.left, self.right = pairs[0]
        if len(pairs) > 1:
            self.left = torch.cat([left for left, _ in pairs], dim=1)
            self.right = torch.cat([right for _, right in pairs], dim=0)
        self.left32, self.right32 = self.left.to(torch.float32), self.right.to(torch.float32)
        self.tall, self.wide = _norms(pairs)
        self.exact = work.exact
        self._by_column: Tensor | None = None
        self._right64: Tensor | None = None
        self._lock = threading.Lock()

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def by_column(self) -> Tensor:
        """The right factor with the ranks of a column side by side, (columns, rank), where float64 is."""
        with self._lock:
            if self._by_column is None:
                self._by_column = self.right.to(self.exact).T.contiguous()
                self.device.wait()  # until other workers' streams may use it
            return self._by_column

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(left, right) in float32 or float64."""
        if dtype == torch.float32:
            return self.left32, self.right32
        with self._lock:
            if self._right64 is None:
                self._right64 = self.right.to(torch.float64)
                self.device.wait()  # until other workers' streams may use it
            return self.left, self._right64

    def on(self, rows: range, width: int) -> _Piece | None:
        """The part in these rows of the tensor, which is `width` columns wide."""
        first, last = max(rows.start, self.rows[0]), min(rows.stop, self.rows[1])
        if first >= last:
            return None
        here, own = slice(first - rows.start, last - rows.start), slice(first - self.rows[0], last - self.rows[0])
        is_whole = last - first == len(rows) and self.columns == (0, width)
        return _ProductsPiece(here, slice(*self.columns), is_whole, self, own)


class _ProductsPiece(_Piece):
    def __init__(self, rows: slice, columns: slice, is_whole: bool, step: _Products, own: slice) -> None:
        super().__init__(rows, columns, is_whole)
        self.step, self.own = step, own
        self.additions = step.rank + 2  # and the rounding of both factors

    def set_to(self, total: Tensor) -> bool:
        if not self.is_whole:
            return False
        left, right = self.step.factors(total.dtype)
        torch.mm(left[self.own], right, out=total)
        return True

    def add_to(self, total: Tensor) -> None:
        left, right = self.step.factors(total.dtype)
        total[self.rows, self.columns].addmm_(left[self.own], right)

    def bound(self, slack: Tensor, unit: float) -> None:
        # Cauchy and Schwarz: the magnitudes of the products add up to at most the product of the norms.
        region = slack if self.is_whole else slack[self.rows, self.columns]
        region.addcmul_(self.step.tall[self.own], self.step.wide, value=unit)

    def add_each(self, total: Tensor, rows: Tensor, columns: Tensor) -> None:
        inside = self._inside(rows, columns)
        if inside is not None:
            rows, columns = rows[inside], columns[inside]
        left = self.step.left.to(self.step.exact)[self.own].index_select(0, rows - self.rows.start)
        right = self.step.by_column.index_select(0, columns - self.columns.start)
        values = sum_by_halves(left.mul_(right))
        if inside is None:
            total.add_(values)
        else:
            total[inside] += values


class _Difference:
    """A stored difference: only the rows of the chunk are ever read."""

    def __init__(self, term: Term, work: Sum) -> None:
        self.term, self.work = term, work

    def on(self, rows: range, width: int) -> _Piece | None:
        """The part in these rows of the tensor, which is `width` columns wide."""
        first, last = max(rows.start, self.term.rows[0]), min(rows.stop, self.term.rows[1])
        if first >= last:
            return None
        (stored,) = self.term.factors.values()
        shift = self.term.part[0] - self.term.rows[0]
        own = range(first + shift, last + shift)
        if self.term.transposed:
            whole = self.work.load(stored, torch.float64)
            values = whole.reshape(whole.shape[0], -1).T[own.start : own.stop]
        else:
            values = self.work.load_rows(stored, own, torch.float64)
        here = slice(first - rows.start, last - rows.start)
        is_whole = last - first == len(rows) and self.term.columns == (0, width)
        values *= self.term.scale * self.term.weight
        return _DifferencePiece(here, slice(*self.term.columns), is_whole, values)


class _DifferencePiece(_Piece):
    additions = 1

    def __init__(self, rows: slice, columns: slice, is_whole: bool, values: Tensor) -> None:
        super().__init__(rows, columns, is_whole)
        self.values = values  # float64

    def add_to(self, total: Tensor) -> None:
        total[self.rows, self.columns] += self.values

    def bound(self, slack: Tensor, unit: float) -> None:
        largest = self.values.abs().amax(dim=1, keepdim=True).mul_(unit * _NORM_MARGIN)
        slack[self.rows, self.columns] += largest.to(slack.dtype)

    def add_each(self, total: Tensor, rows: Tensor, columns: Tensor) -> None:
        inside = self._inside(rows, columns)
        if inside is None:
            total.add_(self.values[rows - self.rows.start, columns - self.columns.start])
        else:
            total[inside] += self.values[rows[inside] - self.rows.start, columns[inside] - self.columns.start]


def _pair(term: Term, work: Sum) -> tuple[Tensor, Tensor]:
    """(left in float64, right) of a term for its region, on the device."""
    # Stored factors widen exactly to float32; those that have to be made first (Tucker, VeRA) are made in float64.
    is_stored = term.factors.keys() == {"up", "down"} and all(s.dtype != "F64" for s in term.factors.values())
    dtype = torch.float32 if is_stored else torch.float64
    left, right = pair(term, {name: work.load(stored, dtype) for name, stored in term.factors.items()}, 1.0)
    return left.to(torch.float64) * (term.scale * term.weight), right


def _norms(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Upper bounds of the norms of every row of the left and of every column of the right factors, side by side.

    (rows, 1) and (1, columns), float32. Each pair is balanced by a power of two first: what matters is the product.
    """
    tall, wide = [], []
    for left, right in pairs:
        rows = torch.linalg.vector_norm(left, dim=1, keepdim=True).to(torch.float32)
        columns = torch.linalg.vector_norm(right, dim=0, keepdim=True).to(torch.float32)
        higher, lower = float(rows.max()), float(columns.max())
        shift = 0
        if 0 < higher < math.inf and 0 < lower < math.inf:
            shift = round((math.log2(lower) - math.log2(higher)) / 2)
        tall.append(rows.mul_(2.0**shift).square_())
        wide.append(columns.mul_(2.0**-shift).square_())
    return _root(tall), _root(wide)


def _root(squares: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(squares)).sum(0).sqrt_().mul_(_NORM_MARGIN).clamp_min_(_SMALLEST_NORM)


def _region(term: Term) -> tuple[bool, tuple[int, int], tuple[int, int]]:
    return term.algorithm in LOW_RANK, term.rows, term.columns
