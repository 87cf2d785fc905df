"""LoRA, LoHa and LoKr, and DoRA around them, recomputed in float64 by NumPy: torch's import would take longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bake.io.arrays import read_array
from bake.io.fileset import FileSet
from bake.keys.factors import as_matrix
from bake.plan.model import TensorPlan, Term
from bake.verify.rounding import Doubles

Rows = Callable[[range], Doubles]

_BLOCK_ELEMENTS = 256 * 1024  # of a tensor that is gone over


def is_simple(terms: Sequence[Term]) -> bool:
    """True if `rows_after` can apply all of the terms."""
    return all(term.algorithm in ("lora", "loha", "lokr") for term in terms)


def rows_after(plan: TensorPlan, files: FileSet, base: Rows) -> Rows:
    """What gives contiguous rows of a tensor after every term. base: gives those before."""
    rows = base
    for term in plan.terms:
        rows = _Applied(plan, term, files, rows).rows
    return rows


class _Applied:
    """A tensor after one term."""

    def __init__(self, plan: TensorPlan, term: Term, files: FileSet, before: Rows) -> None:
        """before: gives the values before it, in memory of their own."""
        self._height = as_matrix(plan.view)[0]
        self._term, self._before = term, before
        self._update = _Update(term, files)
        self._magnitude = _load(term, "magnitude", files).reshape(-1) if term.dora is not None else None

    def rows(self, rows: range) -> Doubles:
        """Contiguous rows, in memory of their own."""
        values, term = self._before(rows), self._term
        places = np.arange(rows.start, rows.stop)
        region = (places >= term.rows[0]) & (places < term.rows[1]), slice(*term.columns)
        if region[0].any():
            values[region] = self._changed(values[region], places[region[0]])
        return values

    def _changed(self, old: Doubles, places: NDArray[np.intp]) -> Doubles:
        """New values of the region's rows at these places of the tensor."""
        weight = self._term.weight
        if self._magnitude is None:
            return old + weight * self._added(places)
        if weight == 0:
            return old
        updated = old + self._added(places)
        lengths = self._column_lengths if self._is_by_column else np.linalg.norm(updated, axis=1, keepdims=True)
        magnitude = self._magnitude
        if self._is_by_column:
            magnitude = magnitude.repeat(old.shape[1] // len(magnitude))
        else:
            magnitude = magnitude[self._own(places), None]
        assert self._term.dora is not None
        directed = updated * (magnitude / (lengths + self._term.dora.epsilon))
        changed: Doubles = np.where(lengths == 0, old, weight * directed + (1 - weight) * old)
        return changed

    @property
    def _is_by_column(self) -> bool:
        dora = self._term.dora
        return dora is not None and (dora.axis == 1) != self._term.transposed

    @cached_property
    def _column_lengths(self) -> Doubles:
        """The length of each input channel of the region with its update, for each column."""
        assert self._magnitude is not None
        term, squares = self._term, np.zeros(self._term.columns[1] - self._term.columns[0])
        step = max(1, _BLOCK_ELEMENTS // max(1, len(squares)))
        for first in range(*term.rows, step):
            rows = range(first, min(term.rows[1], first + step))
            updated = self._before(rows)[:, slice(*term.columns)] + self._added(np.arange(rows.start, rows.stop))
            squares += np.square(updated).sum(axis=0)
        channels = len(self._magnitude)
        lengths: Doubles = np.sqrt(squares.reshape(channels, -1).sum(axis=1)).repeat(len(squares) // channels)
        return lengths

    def _added(self, places: NDArray[np.intp]) -> Doubles:
        """The update at weight 1 of these rows of the tensor."""
        return self._update.rows(self._own(places)) * self._term.scale

    def _own(self, places: NDArray[np.intp]) -> NDArray[np.intp]:
        """Rows of the tensor -> rows of the update."""
        term = self._term
        return (places - term.turn) % self._height - term.rows[0] + term.part[0]


class _Update:
    """The update of a term, without scale and weight, oriented as the tensor is."""

    def __init__(self, term: Term, files: FileSet) -> None:
        self._term = term
        self._factors = {name: _load(term, name, files) for name in term.factors}
        if term.algorithm == "loha":
            self._matrices = [self._matrix("w1_a", "w1_b", "t1"), self._matrix("w2_a", "w2_b", "t2")]
        elif term.algorithm == "lokr":
            self._matrices = [
                self._matrix(f"{name}_a", f"{name}_b", core, name)
                for name, core in (("kron_w1", None), ("kron_w2", "kron_t2"))
            ]
        else:
            self._matrices = [self._lora()]

    def rows(self, numbers: NDArray[np.intp]) -> Doubles:
        """Rows by number."""
        if self._term.algorithm == "lokr":
            return self._kronecker(numbers)
        product = self._matrices[0](numbers)
        for other in self._matrices[1:]:
            product = product * other(numbers)
        return product

    def _kronecker(self, numbers: NDArray[np.intp]) -> Doubles:
        """For every row the products of all numbers of one row of each; `swapped`: for each tap of the kernel."""
        (small, large), w2 = self._matrices, self._factors.get("kron_w2")
        if not self._term.settings.get("swapped") or w2 is None:
            bands, places = np.divmod(numbers, large.height)
            product: Doubles = np.einsum("na,nb->nab", small(bands), large(places))
        else:
            bands, places = np.divmod(numbers, small.height)
            taps = large(bands).reshape(len(numbers), w2.shape[1], -1)
            product = np.einsum("nak,nb->nabk", taps, small(places))
        return product.reshape(len(numbers), -1)

    def _matrix(self, a: str, b: str, core: str | None, whole: str = "") -> _Matrix:
        """The product of two factors, with a Tucker core between them if there is one, or the matrix itself."""
        if whole in self._factors:
            return _Matrix(_flat(self._factors[whole]), None, self._term.transposed)
        left, right = _flat(self._factors[a]), _flat(self._factors[b])
        if core in self._factors:
            left, right = left.T, _with_core(self._factors[core], right)
        return _Matrix(left, right, self._term.transposed)

    def _lora(self) -> _Matrix:
        term, left, right = self._term, _flat(self._factors["up"]), _flat(self._factors["down"])
        if "mid" in self._factors:
            right = _with_core(self._factors["mid"], right)
        expert, experts = int(term.settings.get("expert") or 0), int(term.settings.get("experts") or 1)
        rank = len(right) // experts
        left, right = left[:, expert::experts], right[expert * rank :][:rank]
        return _Matrix(left[:, : term.rank_limit], right[: term.rank_limit], term.transposed)


class _Matrix:
    """left @ right, or left alone, or its transpose; rows by number."""

    def __init__(self, left: Doubles, right: Doubles | None, transposed: bool) -> None:
        if transposed:
            left, right = (left.T, None) if right is None else (right.T, left.T)
        self._left, self._right = left, right
        self.height = len(left)

    def __call__(self, numbers: NDArray[np.intp]) -> Doubles:
        left = self._left[numbers]
        return left if self._right is None else left @ self._right


def _with_core(core: Doubles, right: Doubles) -> Doubles:
    """core (rank, other rank, kernel) times right (other rank, in), as (rank, in * kernel)."""
    taps = core.reshape(*core.shape[:2], -1)
    return _flat(np.einsum("abk,bi->aik", taps, right))


def _flat(factor: Doubles) -> Doubles:
    return factor.reshape(as_matrix(factor.shape))


def _load(term: Term, name: str, files: FileSet) -> Doubles:
    stored = term.factors[name]
    with files.using(stored.input) as file:
        return read_array(file, stored.span[0], stored.dtype, stored.shape, np.float64)
