"""Terms of any kind applied to one tensor in order, each to what the ones before it made; rows on demand.

Additive terms on their own are summed faster by whoever runs them; a chain is for tensors that some
term transforms, or whose updates are no product of two thin matrices. It asks the term before for just
the rows it needs: one for one, whole blocks for rotations, every row once for column norms.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import torch
from torch import Tensor

from bake.adapters import DELTAS, LOW_RANK, STORED, TRANSFORMS, dora

_PASS_ELEMENTS = 128 * 1024  # of a tensor, held at a time where every row is needed once: they stay in the cache
_SHARES = 32  # in which threads take such a pass over a tensor

# Contiguous rows of the tensor -> their values, a float64 matrix for the receiver to overwrite. It may lie in the
# memory of the one before: nothing that was received earlier is used after the next call.
Rows = Callable[[range], Tensor]


class DecompositionLike(Protocol):
    """Of a DoRA term."""

    @property
    def axis(self) -> int: ...
    @property
    def epsilon(self) -> float: ...


class TermLike(Protocol):
    """What a chain reads of a term; `bake.plan.model.Term` has it."""

    @property
    def algorithm(self) -> str: ...
    @property
    def factors(self) -> Mapping[str, object]: ...
    @property
    def scale(self) -> float: ...
    @property
    def weight(self) -> float: ...
    @property
    def rows(self) -> tuple[int, int]: ...
    @property
    def columns(self) -> tuple[int, int]: ...
    @property
    def part(self) -> tuple[int, int]: ...
    @property
    def height(self) -> int: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def dora(self) -> DecompositionLike | None: ...
    @property
    def settings(self) -> Mapping[str, float | None]: ...
    @property
    def rank_limit(self) -> int | None: ...
    @property
    def turn(self) -> int: ...


class Factors(Protocol):
    """Where a chain gets the factors of a term."""

    def whole(self, term: TermLike, name: str) -> Tensor: ...

    def rows(self, term: TermLike, name: str, rows: range) -> Tensor: ...


def pair(term: TermLike, factors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """(left, right) of a low-rank term for its region of the tensor: left @ right is what is added."""
    left, right = LOW_RANK[term.algorithm](**factors, scale=scale, **term.settings)
    if term.rank_limit is not None:
        left, right = left[:, : term.rank_limit], right[: term.rank_limit]
    if term.transposed:
        left, right = right.T, left.T
    return left[term.part[0] : term.part[1]], right


class Chain:
    """The terms of one tensor, ready to give any of its rows. Safe to use from several threads."""

    def __init__(self, shape: tuple[int, ...], terms: Sequence[TermLike], factors: Factors) -> None:
        """shape: of the tensor. Factors are loaded at once, except those that are read row by row.

        Raises ValueError if the factors of a term contradict each other or the shape.
        """
        self._steps = [_step(shape, term, factors) for term in terms]

    def rows(self, wanted: range, base: Rows) -> Tensor:
        """The values of the `wanted` contiguous rows after every term, where possible in the memory that `base` gave.

        base: gives the values before, of these and of other rows, for the chain to overwrite; each call may
        hand out the same memory.
        """
        return self._after(len(self._steps), wanted, base)

    def _after(self, count: int, wanted: range, base: Rows) -> Tensor:
        if count == 0:
            return base(wanted)
        step = self._steps[count - 1]
        return step.rows(wanted, lambda rows: self._after(count - 1, rows, base))


class _Step(ABC):
    """One term on its region of the tensor."""

    def __init__(self, shape: tuple[int, ...], term: TermLike, factors: Factors) -> None:
        self.term = term
        self.kernel = shape[2:] if not term.transposed else ()
        self.lock = threading.Lock()

    def load(self, factors: Factors, *without: str) -> dict[str, Tensor]:
        return {name: factors.whole(self.term, name) for name in self.term.factors if name not in without}

    def rows(self, wanted: range, before: Rows) -> Tensor:
        """The wanted rows of the tensor after this term."""
        return self.rows_by(self.change, wanted, before)

    def rows_by(self, change: Callable[[Tensor, range], None], wanted: range, before: Rows) -> Tensor:
        """`rows`, by a change of the region that may be another than `change`."""
        first, last = self.term.rows
        mine = range(max(first, wanted.start), min(last, wanted.stop))
        if not mine:
            return before(wanted)
        self.prepare(before)
        needed = self.needed(mine)
        held = range(min(wanted.start, needed.start), max(wanted.stop, needed.stop))
        values = before(held)
        region = values[needed.start - held.start : needed.stop - held.start, slice(*self.term.columns)]
        change(region, needed)
        return values[wanted.start - held.start : wanted.stop - held.start]

    def prepare(self, before: Rows) -> None:  # noqa: B027 - most steps need nothing but the rows they change
        """Settle, once, what depends on all rows of the region."""

    def needed(self, mine: range) -> range:
        """The rows of the tensor that have to be known together to make the rows `mine`."""
        return mine

    @abstractmethod
    def change(self, region: Tensor, rows: range) -> None:
        """Overwrite the region in these rows of the tensor with its new values."""

    def own(self, rows: range) -> range:
        """Rows of the tensor -> rows of the update."""
        shift = self.term.part[0] - self.term.rows[0]
        return range(rows.start + shift, rows.stop + shift)


class _Additive(_Step):
    """W + update."""

    def __init__(self, shape: tuple[int, ...], term: TermLike, factors: Factors) -> None:
        super().__init__(shape, term, factors)
        self.add_to = _adding(term, self.load(factors), term.scale * term.weight)

    def change(self, region: Tensor, rows: range) -> None:
        self.add_to(region, rows)


class _Stored(_Step):
    """Rows of one stored tensor, added or put in the place of the old ones."""

    def __init__(self, shape: tuple[int, ...], term: TermLike, factors: Factors) -> None:
        super().__init__(shape, term, factors)
        self.factors = factors

    def change(self, region: Tensor, rows: range) -> None:
        (name,) = self.term.factors
        own = self.own(rows)
        if self.term.transposed:
            whole = self.factors.whole(self.term, name)
            stored = whole.reshape(whole.shape[0], -1).T[own.start : own.stop]
        else:
            stored = self.factors.rows(self.term, name, own)
        region.copy_(STORED[self.term.algorithm](region, stored, self.term.scale * self.term.weight))


class _Decomposed(_Step):
    """DoRA around an additive update."""

    def __init__(self, shape: tuple[int, ...], term: TermLike, factors: Factors, decomposition: DecompositionLike):
        super().__init__(shape, term, factors)
        self.settings = {"strength": term.weight, "epsilon": decomposition.epsilon}
        self.add_to = _adding(term, self.load(factors, "magnitude"), term.scale)
        self.magnitude = factors.whole(term, "magnitude").flatten()

    def updated(self, old: Tensor, rows: range) -> Tensor:
        """V beside W."""
        values = old.clone(memory_format=torch.contiguous_format)
        self.add_to(values, rows)
        return values


class _OldNeeded(Exception):
    """The values were to be made in the place of the old ones, and some of the old ones stay."""


class _DecomposedRows(_Decomposed):
    """DoRA that gives the tensor's rows their lengths."""

    def __init__(self, shape: tuple[int, ...], term: TermLike, factors: Factors, decomposition: DecompositionLike):
        super().__init__(shape, term, factors, decomposition)
        self.magnitude = self.magnitude[term.part[0] : term.part[1]].unsqueeze(1)

    def rows(self, wanted: range, before: Rows) -> Tensor:
        """The wanted rows of the tensor after this term."""
        if self.term.weight == 1:
            try:
                return self.rows_by(self.replace, wanted, before)
            except _OldNeeded:
                pass
        return self.rows_by(self.change, wanted, before)

    def replace(self, region: Tensor, rows: range) -> None:
        """As `change` without the cost of V beside W. Raises _OldNeeded if a row of V has no direction."""
        self.add_to(region, rows)
        gain, rest = self.shares(region, rows)
        if rest.any():
            raise _OldNeeded
        region.mul_(gain)

    def change(self, region: Tensor, rows: range) -> None:
        if self.term.weight != 0:
            updated = self.updated(region, rows)
            dora.blend(region, updated, *self.shares(updated, rows))

    def shares(self, updated: Tensor, rows: range) -> tuple[Tensor, Tensor]:
        first = self.term.rows[0]
        magnitude = self.magnitude[rows.start - first : rows.stop - first]
        return dora.shares(magnitude, dora.row_norms(updated), **self.settings)


class _DecomposedColumns(_Decomposed):
    """DoRA that gives the tensor's input channels their lengths, which takes a pass over all rows."""

    def __init__(self, shape: tuple[int, ...], term: TermLike, factors: Factors, decomposition: DecompositionLike):
        super().__init__(shape, term, factors, decomposition)
        self.squares = _Pass(_shares(term), self.squares_of)
        self.shares: tuple[Tensor, Tensor] | None = None  # of V and of W, for each column

    def squares_of(self, blocks: Sequence[range], before: Rows) -> Tensor:
        total = torch.zeros_like(self.magnitude)
        for block in blocks:
            values = before(block)[:, slice(*self.term.columns)]
            self.add_to(values, block)
            total += dora.column_squares(values, self.magnitude.numel())
        return total

    def prepare(self, before: Rows) -> None:
        if self.term.weight == 0 or self.shares is not None:
            return  # two threads may both come this far, with the same result
        norms = self.squares.total(before).sqrt()
        taps = (self.term.columns[1] - self.term.columns[0]) // norms.numel()
        gain, rest = dora.shares(self.magnitude, norms, **self.settings)
        self.shares = gain.repeat_interleave(taps), rest.repeat_interleave(taps)

    def change(self, region: Tensor, rows: range) -> None:
        if self.shares is None:  # at weight 0
            return
        gain, rest = self.shares
        if rest.any():
            dora.blend(region, self.updated(region, rows), gain, rest)
        else:  # nothing of W is left
            self.add_to(region, rows)
            region.mul_(gain)


class _Pass:
    """A sum over all rows of a tensor, made by all threads that need it; always in the same order."""

    def __init__(self, shares: Sequence[Sequence[range]], part: Callable[[Sequence[range], Rows], Tensor]) -> None:
        """shares: blocks of rows that one thread takes together. part: their contribution to the sum."""
        self._part = part
        self._lock = threading.Lock()
        self._parts: list[Future[Tensor]] = [Future() for _ in shares]
        self._open = iter(zip(self._parts, shares, strict=True))

    def total(self, before: Rows) -> Tensor:
        """Do what is still to be done of the pass, wait for the other threads, and return the sum.

        Raises whatever `before` raised in any of the threads.
        """
        while (taken := self._take()) is not None:
            future, blocks = taken
            try:
                future.set_result(self._part(blocks, before))
            except BaseException as error:
                future.set_exception(error)  # for those who wait
                raise
        return torch.stack([future.result() for future in self._parts]).sum(0)

    def _take(self) -> tuple[Future[Tensor], Sequence[range]] | None:
        with self._lock:
            return next(self._open, None)


class _Transform(_Step):
    """A new weight out of the old one."""

    def __init__(self, shape: tuple[int, ...], term: TermLike, factors: Factors) -> None:
        super().__init__(shape, term, factors)
        width = term.columns[1] - term.columns[0]
        own: tuple[int, ...]
        if term.transposed:
            own = (width, term.rows[1] - term.rows[0])
        else:
            own = (term.height, *_channels(width, self.kernel)) if len(shape) > 1 else (term.height,)
        self.transform = TRANSFORMS[term.algorithm](
            **self.load(factors), shape=own, strength=term.weight, **term.settings
        )
        self.whole: Tensor | None = None  # of a transposed target, whose blocks are no rows

    def prepare(self, before: Rows) -> None:
        if not self.term.transposed:
            return
        with self.lock:
            if self.whole is None:
                columns = before(range(*self.term.rows))[:, slice(*self.term.columns)].T.contiguous()
                self.transform.apply(columns, range(len(columns)))
                self.whole = columns.T

    def needed(self, mine: range) -> range:
        block = self.transform.block
        if block == 1 or self.term.transposed:
            return mine
        shift = self.term.part[0] - self.term.rows[0]
        first = (mine.start + shift) // block * block - shift
        last = -(-(mine.stop + shift) // block) * block - shift
        return range(first, last)

    def change(self, region: Tensor, rows: range) -> None:
        if self.whole is None:
            self.transform.apply(region, self.own(rows))
        else:
            first = self.term.rows[0]
            region.copy_(self.whole[rows.start - first : rows.stop - first])


class _Turned:
    """A term on the whole tensor whose update starts at a later row: it gets to see the rows in its own order."""

    def __init__(self, step: _Step, turn: int, height: int) -> None:
        self.step, self.turn, self.height = step, turn, height

    def rows(self, wanted: range, before: Rows) -> Tensor:
        """The wanted rows of the tensor after the term."""

        def seen(rows: range) -> Tensor:
            return _joined(self._turned(rows, self.turn), before)

        return _joined(self._turned(wanted, -self.turn), lambda rows: self.step.rows(rows, seen))

    def _turned(self, rows: range, by: int) -> list[range]:
        first = (rows.start + by) % self.height
        past = first + len(rows) - self.height  # rows beyond the last one
        return [range(first, first + len(rows))] if past <= 0 else [range(first, self.height), range(past)]


def _step(shape: tuple[int, ...], term: TermLike, factors: Factors) -> _Step | _Turned:
    step = _plain_step(shape, term, factors)
    return _Turned(step, term.turn, shape[0]) if term.turn else step


def _plain_step(shape: tuple[int, ...], term: TermLike, factors: Factors) -> _Step:
    if term.algorithm in TRANSFORMS:
        return _Transform(shape, term, factors)
    if term.dora is not None:
        # A transposed target turns the update's output axis into the tensor's columns.
        by_column = (term.dora.axis == 1) != term.transposed
        return (_DecomposedColumns if by_column else _DecomposedRows)(shape, term, factors, term.dora)
    return (_Stored if term.algorithm in STORED else _Additive)(shape, term, factors)


def _adding(term: TermLike, factors: Mapping[str, Tensor], scale: float) -> Callable[[Tensor, range], None]:
    """(region, rows of the tensor): adds the part of the additive update that belongs there, in place."""
    first = term.rows[0]
    if term.algorithm in LOW_RANK:
        left, right = pair(term, factors, scale)

        def add(region: Tensor, rows: range) -> None:
            region.addmm_(left[rows.start - first : rows.stop - first], right)

        return add
    update = DELTAS[term.algorithm](**factors, scale=scale, transposed=term.transposed, **term.settings)
    shift = term.part[0] - first
    return lambda region, rows: update.add_to(region, range(rows.start + shift, rows.stop + shift))


def _joined(pieces: Sequence[range], rows: Rows) -> Tensor:
    """The rows of several pieces below each other."""
    if len(pieces) == 1:
        return rows(pieces[0])
    return torch.cat([rows(piece).clone() for piece in pieces])


def _channels(width: int, kernel: tuple[int, ...]) -> tuple[int, ...]:
    taps = 1
    for size in kernel:
        taps *= size
    return (width // taps, *kernel)


def _shares(term: TermLike) -> list[list[range]]:
    """The rows of a term in blocks of bounded size, shared out; both follow from the term alone."""
    first, last = term.rows
    step = max(1, _PASS_ELEMENTS // max(1, term.columns[1] - term.columns[0]))
    blocks = [range(start, min(last, start + step)) for start in range(first, last, step)]
    size = -(-len(blocks) // _SHARES)
    return [blocks[start : start + size] for start in range(0, len(blocks), size)]
