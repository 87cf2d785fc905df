"""Updates that take the maths of `bake.adapters` to recompute, in float64 with torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bake.adapters.chain import Chain, TermLike, pair
from bake.io.fileset import FileSet
from bake.io.payload import read_rows, read_tensor
from bake.keys.factors import as_matrix
from bake.plan.model import Stored, TensorPlan, Term
from bake.verify.rounding import Doubles


def chain_of(plan: TensorPlan, files: FileSet, base: Callable[[range], Doubles]) -> Callable[[range], Doubles]:
    """What gives contiguous rows of a tensor after every term. base: gives those before."""
    chain = Chain(plan.view, plan.terms, _Factors(files))
    return lambda rows: np.asarray(chain.rows(rows, lambda wanted: torch.from_numpy(base(wanted))))


def thin_pair(term: Term, files: FileSet) -> tuple[Doubles, Doubles]:
    """(left, right) of a low-rank term whose factors have to be made first, without its scale and weight."""
    factors = _Factors(files)
    left, right = pair(term, {name: factors.whole(term, name) for name in term.factors}, 1.0)
    return left.numpy(), right.numpy()


class _Factors:
    """The factors of terms, in float64."""

    def __init__(self, files: FileSet) -> None:
        self._files = files

    def whole(self, term: TermLike, name: str) -> Tensor:
        """All of a factor."""
        stored = _stored(term, name)
        with self._files.using(stored.input) as file:
            return read_tensor(file, stored.span[0], stored.dtype, stored.shape, torch.float64)

    def rows(self, term: TermLike, name: str, rows: range) -> Tensor:
        """Rows of a factor seen as a matrix."""
        stored = _stored(term, name)
        with self._files.using(stored.input) as file:
            return read_rows(file, stored.span[0], stored.dtype, as_matrix(stored.shape)[1], rows, torch.float64)


def _stored(term: TermLike, name: str) -> Stored:
    stored = term.factors[name]
    assert isinstance(stored, Stored)
    return stored
