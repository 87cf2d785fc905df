"""Touched tensors, recomputed in float64 from the base and the adapters and compared element by element."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from bake.adapters import DELTAS, LOW_RANK
from bake.io.fileset import FileSet
from bake.io.payload import read_rows, read_tensor
from bake.io.tensorfile import TensorFile
from bake.keys.factors import as_matrix, supported
from bake.plan.model import Stored, TensorPlan, Term
from bake.verify.report import Report
from bake.verify.rounding import round_once, spacing

_BLOCK_ELEMENTS = 1024 * 1024
_SAMPLED_TENSORS = 64
_SAMPLED_ROWS = 4
_FLOAT32_UNIT = 2.0**-24
_FLOAT64_UNIT = 2.0**-53


def sampled(tensors: list[TensorPlan]) -> list[TensorPlan]:
    """A fixed, evenly spread choice of `tensors` that holds every component and algorithm among them."""
    step = max(1, len(tensors) // _SAMPLED_TENSORS)
    chosen = set(range(0, len(tensors), step))
    seen: set[tuple[str, ...]] = set()
    for place, tensor in enumerate(tensors):
        kind = (tensor.component, tensor.dtype, *(term.algorithm for term in tensor.terms))
        if kind not in seen:
            seen.add(kind)
            chosen.add(place)
    return [tensors[place] for place in sorted(chosen)]


def sampled_rows(tensor: TensorPlan) -> list[range]:
    """First, last and a few rows in between, chosen by the tensor's name: the same in every run."""
    height = as_matrix(tensor.shape)[0]
    seed = hashlib.sha256(tensor.name.encode()).digest()
    between = [int.from_bytes(seed[4 * i : 4 * i + 4], "little") % max(1, height) for i in range(_SAMPLED_ROWS - 2)]
    return [range(row, row + 1) for row in sorted({0, height - 1, *between}) if 0 <= row < height]


def all_rows(tensor: TensorPlan) -> list[range]:
    """Every row, in blocks that bound the memory."""
    height, width = as_matrix(tensor.shape)
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    return [range(first, min(height, first + step)) for first in range(0, height, step)]


def check_tensor(tensor: TensorPlan, blocks: list[range], output: TensorFile, files: FileSet, report: Report) -> None:
    """Compare `blocks` of rows of one touched tensor with their float64 recomputation; note it in `report`.

    An element is wrong if it is further from the float64 value than half a unit of its last place
    plus what float32 arithmetic may lose on the way (Higham, Accuracy and Stability, section 3.1).
    """
    width = as_matrix(tensor.shape)[1]
    written = output.tensors[tensor.name]
    reference = _Reference(tensor, files)
    for block in blocks:
        exact, lost = reference.rows(block)
        found = read_rows(output, written.begin, written.dtype, width, block, torch.float64)
        rounded = round_once(exact, tensor.dtype)
        error = (found - exact).abs()
        larger = torch.maximum(exact.abs(), reference.base_rows(block).abs())
        ulp = (error / spacing(larger, tensor.dtype)).nan_to_num(nan=torch.inf)
        worst = float(ulp.max()) if ulp.numel() else 0.0
        report.elements += exact.numel()
        report.equal += int((found == rounded).sum())
        if worst > report.max_ulp or report.worst is None:
            report.max_ulp, report.worst = max(worst, report.max_ulp), tensor.name
        wrong = ~(error <= spacing(exact, tensor.dtype) / 2 + lost) & (found != rounded)
        if bool(wrong.any()):
            row, column = (int(place) for place in wrong.nonzero()[0])
            report.add(
                f"{tensor.name}: row {block.start + row}, column {column} is {float(found[row, column]):.9g}, "
                f"should be {float(exact[row, column]):.9g} ({int(wrong.sum())} wrong elements in these rows)"
            )
            return


class _Reference:
    """One tensor's float64 result, by rows."""

    def __init__(self, plan: TensorPlan, files: FileSet) -> None:
        self._plan, self._files = plan, files
        unit = _FLOAT64_UNIT if "F64" in (plan.dtype, plan.source.dtype) else _FLOAT32_UNIT
        self._unit = unit
        self._pairs = {place: self._pair(term) for place, term in enumerate(plan.terms) if term.algorithm in LOW_RANK}
        # roundings an element sees at most: one per product and sum, and those of the factors
        self._roundings = sum(pair[0].shape[1] + 3 for pair in self._pairs.values()) + 3 * len(plan.terms) + 2

    def _pair(self, term: Term) -> tuple[Tensor, Tensor]:
        factors = {name: self._load(stored) for name, stored in term.factors.items()}
        left, right = LOW_RANK[term.algorithm](**factors, scale=term.scale)
        if term.rank_limit is not None:
            left, right = left[:, : term.rank_limit], right[: term.rank_limit]
        return (right.T, left.T) if term.transposed else (left, right)

    def _load(self, stored: Stored) -> Tensor:
        with self._files.using(stored.input) as file:
            return read_tensor(file, stored.span[0], stored.dtype, stored.shape, torch.float64)

    def base_rows(self, block: range) -> Tensor:
        source = self._plan.source
        with self._files.using(source.input) as file:
            columns = as_matrix(self._plan.shape)[1]
            return read_rows(file, source.span[0], source.dtype, columns, block, torch.float64)

    def rows(self, block: range) -> tuple[Tensor, Tensor]:
        """(float64 values, bound on what float32 arithmetic loses) for some rows."""
        exact = self.base_rows(block)
        magnitude = exact.abs()
        for place, term in enumerate(self._plan.terms):
            first, last = max(block.start, term.rows[0]), min(block.stop, term.rows[1])
            if first >= last:
                continue
            mine = slice(first - block.start, last - block.start)
            across = slice(*term.columns)
            update, size = self._update(place, term, range(first - term.rows[0], last - term.rows[0]))
            exact[mine, across] += update
            magnitude[mine, across] += size
        return exact, magnitude * (self._roundings * self._unit)

    def _update(self, place: int, term: Term, rows: range) -> tuple[Tensor, Tensor]:
        """(update, sum of the magnitudes of its products) for rows of the term's region."""
        if place in self._pairs:
            left, right = self._pairs[place]
            mine = left[rows.start : rows.stop]
            return mine @ right, mine.abs() @ right.abs()
        by_rows = supported(term.algorithm).by_rows and not term.transposed
        factors = {
            name: self._rows_of(stored, rows) if by_rows else self._load(stored)
            for name, stored in term.factors.items()
        }
        update = DELTAS[term.algorithm](**factors, scale=term.scale)
        if not by_rows:
            update = (update.T if term.transposed else update)[rows.start : rows.stop]
        return update, update.abs()

    def _rows_of(self, stored: Stored, rows: range) -> Tensor:
        with self._files.using(stored.input) as file:
            columns = as_matrix(stored.shape)[1]
            return read_rows(file, stored.span[0], stored.dtype, columns, rows, torch.float64)


def iter_blocks(tensors: list[TensorPlan], full: bool) -> Iterator[tuple[TensorPlan, list[range]]]:
    """What to compare: everything, or some rows of a sample."""
    for tensor in tensors if full else sampled(tensors):
        yield tensor, all_rows(tensor) if full else sampled_rows(tensor)
