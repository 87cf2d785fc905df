"""Additive updates by NumPy, in float64: any rows of them, added in place. `bake.adapters` has their sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bake.execute.plain.desk import Desk
from bake.io.arrays import read_array
from bake.io.fileset import FileSet
from bake.keys.factors import as_matrix
from bake.plan.model import Term

Doubles = NDArray[np.float64]
Factors = Mapping[str, Doubles]

_SETTLED = 1024 * 1024  # elements that a product may have to be made once and kept

KNOWN = ("lora", "loha", "lokr")  # with all factors that they may have


class Update(Protocol):
    """The update of one term."""

    def add_to(self, block: Doubles, rows: range, desk: Desk) -> None:
        """Add the rows `rows` of the update to `block` (len(rows), columns).

        How products are rounded may depend on how many rows there are: the caller sees to that being the same always.
        """


def update_of(term: Term, files: FileSet, scale: float) -> Update:
    """The update of a term whose algorithm is KNOWN, times `scale`, oriented as the tensor is."""
    factors = {name: _load(term, name, files) for name in term.factors if name != "magnitude"}
    if term.algorithm == "lora":
        return _Product(term, factors, scale)
    kind = _Hadamard if term.algorithm == "loha" else _Kronecker
    return kind(term, factors, scale)


class _Product:
    """LoRA and LoCon: left @ right."""

    def __init__(self, term: Term, factors: Factors, scale: float) -> None:
        """Experts share two factors: their rows of `down` follow each other, their columns of `up` take turns."""
        expert, experts = (int(term.settings.get(name) or default) for name, default in (("expert", 0), ("experts", 1)))
        left, right = _factored(factors["up"], factors["down"], factors.get("mid"), is_lora=True)
        rank = len(right) // experts
        left, right = left[:, expert::experts] * scale, right[expert * rank : (expert + 1) * rank]
        left, right = left[:, : term.rank_limit], right[: term.rank_limit]
        self._left, self._right = _oriented(left, right, term.transposed)

    def add_to(self, block: Doubles, rows: range, desk: Desk) -> None:
        """As `Update` says."""
        product = desk.array("first", np.float64, block.shape)
        np.add(block, np.matmul(self._left[rows.start : rows.stop], self._right, out=product), out=block)


class _Hadamard:
    """LoHa: the elementwise product of two products."""

    def __init__(self, term: Term, factors: Factors, scale: float) -> None:
        one = _factored(factors["w1_a"] * scale, factors["w1_b"], factors.get("t1"))
        two = _factored(factors["w2_a"], factors["w2_b"], factors.get("t2"))
        self._one, self._two = (_oriented(*pair, term.transposed) for pair in (one, two))

    def add_to(self, block: Doubles, rows: range, desk: Desk) -> None:
        """As `Update` says."""
        one, two = (desk.array(name, np.float64, block.shape) for name in ("first", "second"))
        for (left, right), product in ((self._one, one), (self._two, two)):
            np.matmul(left[rows.start : rows.stop], right, out=product)
        np.add(block, np.multiply(one, two, out=one), out=block)


class _Kronecker:
    """LoKr: each row is the outer product of a row of w1 and one of w2, for PEFT's Conv1d the other way round."""

    def __init__(self, term: Term, factors: Factors, scale: float) -> None:
        w1, w2 = (_Matrix(name, factors, times, term.transposed) for name, times in (("w1", scale), ("w2", 1.0)))
        is_swapped = bool(term.settings.get("swapped")) and "kron_w2" in factors
        self._outer, self._inner = (w2, w1) if is_swapped else (w1, w2)
        repeats = int(np.prod(factors["kron_w2"].shape[2:])) if is_swapped else 1
        self._columns = (self._outer.shape[1] // repeats, self._inner.shape[1], repeats)

    def add_to(self, block: Doubles, rows: range, desk: Desk) -> None:
        """As `Update` says."""
        outer, inner, repeats = self._columns
        bands, places = np.divmod(np.arange(rows.start, rows.stop), self._inner.shape[0])
        shape = (len(rows), *self._columns)
        product = np.multiply(
            self._inner.rows(places).reshape(-1, 1, inner, 1),
            self._outer.rows(bands).reshape(-1, outer, 1, repeats),
            out=desk.array("first", np.float64, shape),
        )
        np.add(block, product.reshape(block.shape), out=block)


class _Matrix:
    """w1 or w2, times a number: whole, or made of two factors, as much of it as is asked for if it is large."""

    def __init__(self, name: str, factors: Factors, times: float, transposed: bool) -> None:
        self._right: Doubles | None = None
        whole = factors.get(f"kron_{name}")
        if whole is not None:
            matrix = whole.reshape(as_matrix(whole.shape)) * times
            self._left = np.ascontiguousarray(matrix.T) if transposed else matrix
            return
        a, b = (factors[f"kron_{name}_{side}"] for side in "ab")
        core = factors.get("kron_t2") if name == "w2" else None
        left, right = _oriented(*_factored(a * times, b, core), transposed)
        if len(left) * right.shape[1] <= _SETTLED:
            self._left = left @ right
        else:
            self._left, self._right = left, right

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self._left), (self._left if self._right is None else self._right).shape[1]

    def rows(self, numbers: NDArray[np.intp]) -> Doubles:
        """The rows of these numbers."""
        left = self._left.take(numbers, axis=0)
        return left if self._right is None else left @ self._right


def _factored(a: Doubles, b: Doubles, t: Doubles | None, is_lora: bool = False) -> tuple[Doubles, Doubles]:
    """(left, right) with left @ right = a @ b, (out, rank) and (rank, in * kernel), or its Tucker form.

    Plain: a (out, rank[, 1, 1]), b (rank, in[, kernel]). Tucker: t (rank, rank, kernel) between them, b without a
    kernel, a (rank, out), or as ever if `is_lora`.
    """
    left, right = a.reshape(as_matrix(a.shape)), b.reshape(as_matrix(b.shape))
    if t is None:
        return left, right
    core = np.einsum("ijk,jc->ick", t.reshape(*t.shape[:2], -1), right)
    return left if is_lora else left.T, core.reshape(as_matrix(core.shape))


def _oriented(left: Doubles, right: Doubles, transposed: bool) -> tuple[Doubles, Doubles]:
    """The factors of a product, or of its transpose."""
    if transposed:
        left, right = right.T, left.T
    return np.ascontiguousarray(left), np.ascontiguousarray(right)


def _load(term: Term, name: str, files: FileSet) -> NDArray[Any]:
    stored = term.factors[name]
    with files.using(stored.input) as file:
        return read_array(file, stored.span[0], stored.dtype, stored.shape, np.float64)
