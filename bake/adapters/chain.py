"""Terms of any kind applied to one tensor in order, each to what the ones before it made; rows on demand.

Additive terms on their own are summed faster by whoever runs them; a chain is for tensors that some
term transforms, or whose updates are no product of two thin matrices. It asks the term before for just
the rows it needs: one for one, whole blocks for rotations, every row once for column norms.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bake.adapters import DELTAS, LOW_RANK, STORED, TRANSFORMS, dora

_PASS_ELEMENTS = 1024 * 1024  # of a tensor, read at a time where every row is needed once

Rows = Callable[[range], Tensor]  # contiguous rows of the tensor -> their values, a matrix


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
        """The values of the `wanted` contiguous rows after every term; base: gives the values before."""
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
        first, last = self.term.rows
        mine = range(max(first, wanted.start), min(last, wanted.stop))
        if not mine:
            return before(wanted)
        needed = self.needed(mine)
        held = range(min(wanted.start, needed.start), max(wanted.stop, needed.stop))
        values = before(held).clone()
        region = values[needed.start - held.start : needed.stop - held.start, slice(*self.term.columns)]
        region.copy_(self.new(region, needed, before))
        return values[wanted.start - held.start : wanted.stop - held.start]

    def needed(self, mine: range) -> range:
        """The rows of the tensor that have to be known together to make the rows `mine`."""
        return mine

    @abstractmethod
    def new(self, old: Tensor, rows: range, before: Rows) -> Tensor:
        """The new values of the region in these rows of the tensor, from the old ones."""

    def own(self, rows: range) -> range:
        """Rows of the tensor -> rows of the update."""
        shift = self.term.part[0] - self.term.rows[0]
        return range(rows.start + shift, rows.stop + shift)


class _Additive(_Step):
    """W + update."""

    def __init__(self, shape: tuple[int, ...], term: TermLike, factors: Factors) -> None:
        super().__init__(shape, term, factors)
        self.update = _update(term, self.load(factors, "magnitude"), term.scale * term.weight)

    def new(self, old: Tensor, rows: range, before: Rows) -> Tensor:
        return old + self.update(rows)


class _Stored(_Step):
    """Rows of one stored tensor, added or put in the place of the old ones."""

    def __init__(self, shape: tuple[int, ...], term: TermLike, factors: Factors) -> None:
        super().__init__(shape, term, factors)
        self.factors = factors

    def new(self, old: Tensor, rows: range, before: Rows) -> Tensor:
        (name,) = self.term.factors
        if self.term.transposed:
            whole = self.factors.whole(self.term, name)
            own = self.own(rows)
            stored = whole.reshape(whole.shape[0], -1).T[own.start : own.stop]
        else:
            stored = self.factors.rows(self.term, name, self.own(rows))
        return STORED[self.term.algorithm](old, stored, self.term.scale * self.term.weight)


class _Decomposed(_Step):
    """DoRA around an additive update."""

    def __init__(self, shape: tuple[int, ...], term: TermLike, factors: Factors) -> None:
        super().__init__(shape, term, factors)
        self.update = _update(term, self.load(factors, "magnitude"), term.scale)
        # A transposed target turns the update's output axis into the tensor's columns.
        assert term.dora is not None
        self.by_column = (term.dora.axis == 1) != term.transposed
        self.strength = {"strength": term.weight, "epsilon": term.dora.epsilon}
        self.magnitude = factors.whole(term, "magnitude").flatten()
        if not self.by_column:
            self.magnitude = self.magnitude[term.part[0] : term.part[1]]
        self.norms: Tensor | None = None

    def new(self, old: Tensor, rows: range, before: Rows) -> Tensor:
        updated = old + self.update(rows)
        first = self.term.rows[0]
        if self.by_column:
            norms = self._column_norms(before, self.magnitude.numel())
            return dora.by_column(old, updated, self.magnitude, norms, **self.strength)
        return dora.by_row(old, updated, self.magnitude[rows.start - first : rows.stop - first], **self.strength)

    def _column_norms(self, before: Rows, channels: int) -> Tensor:
        with self.lock:
            if self.norms is None:
                squares: Tensor | None = None
                for block in _blocks(self.term):
                    updated = before(block)[:, slice(*self.term.columns)] + self.update(block)
                    part = dora.column_squares(updated, channels)
                    squares = part if squares is None else squares + part
                assert squares is not None
                self.norms = squares.sqrt()
            return self.norms


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
        self.whole: Tensor | None = None

    def needed(self, mine: range) -> range:
        block = self.transform.block
        if block is None or block == 1 or self.term.transposed:
            return mine
        shift = self.term.part[0] - self.term.rows[0]
        first = (mine.start + shift) // block * block - shift
        last = -(-(mine.stop + shift) // block) * block - shift
        return range(first, last)

    def new(self, old: Tensor, rows: range, before: Rows) -> Tensor:
        if self.transform.block is not None and not self.term.transposed:
            return self.transform.apply(old, self.own(rows))
        first, last = self.term.rows
        with self.lock:
            if self.whole is None:
                values = before(range(first, last))[:, slice(*self.term.columns)]
                if self.term.transposed:
                    self.whole = self.transform.apply(values.T, range(values.shape[1])).T
                else:
                    self.whole = self.transform.apply(values, range(*self.term.part))
        return self.whole[rows.start - first : rows.stop - first]


class _Turned:
    """A term on the whole tensor whose update starts at a later row: it gets to see the rows in its own order."""

    def __init__(self, step: _Step, turn: int, height: int) -> None:
        self.step, self.turn, self.height = step, turn, height

    def rows(self, wanted: range, before: Rows) -> Tensor:
        """The wanted rows of the tensor after the term."""

        def seen(rows: range) -> Tensor:
            return torch.cat([before(piece) for piece in self._turned(rows, self.turn)])

        return torch.cat([self.step.rows(piece, seen) for piece in self._turned(wanted, -self.turn)])

    def _turned(self, rows: range, by: int) -> list[range]:
        first = (rows.start + by) % self.height
        past = first + len(rows) - self.height  # rows beyond the last one
        return [range(first, first + len(rows))] if past <= 0 else [range(first, self.height), range(past)]


_STEPS: dict[str, type[_Step]] = {
    "additive": _Additive,
    "stored": _Stored,
    "decomposed": _Decomposed,
    "transform": _Transform,
}


def _step(shape: tuple[int, ...], term: TermLike, factors: Factors) -> _Step | _Turned:
    step = _STEPS[_kind(term)](shape, term, factors)
    return _Turned(step, term.turn, shape[0]) if term.turn else step


def _kind(term: TermLike) -> str:
    if term.algorithm in TRANSFORMS:
        return "transform"
    if "magnitude" in term.factors:
        return "decomposed"
    return "stored" if term.algorithm in STORED else "additive"


def _update(term: TermLike, factors: Mapping[str, Tensor], scale: float) -> Rows:
    """rows of the tensor -> the part of the additive update that belongs there."""
    first = term.rows[0]
    if term.algorithm in LOW_RANK:
        left, right = pair(term, factors, scale)
        return lambda rows: left[rows.start - first : rows.stop - first] @ right
    delta, shift = DELTAS[term.algorithm], term.part[0] - first
    if term.transposed:
        across = range(term.columns[1] - term.columns[0])
        whole = delta(**factors, rows=across, scale=scale, **term.settings).T
        return lambda rows: whole[rows.start + shift : rows.stop + shift]
    return lambda rows: delta(
        **factors, rows=range(rows.start + shift, rows.stop + shift), scale=scale, **term.settings
    )


def _channels(width: int, kernel: tuple[int, ...]) -> tuple[int, ...]:
    taps = 1
    for size in kernel:
        taps *= size
    return (width // taps, *kernel)


def _blocks(term: TermLike) -> list[range]:
    first, last = term.rows
    step = max(1, _PASS_ELEMENTS // max(1, term.columns[1] - term.columns[0]))
    return [range(start, min(last, start + step)) for start in range(first, last, step)]
