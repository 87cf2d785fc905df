"""Touched tensors, recomputed in float64 from the base and the adapters and compared element by element."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from bake.adapters import LOW_RANK, is_plain
from bake.adapters.chain import Chain, TermLike, pair
from bake.io.fileset import FileSet
from bake.io.payload import read_padded, read_rows, read_tensor
from bake.io.tensorfile import TensorFile
from bake.keys.factors import as_matrix
from bake.plan.model import Stored, TensorPlan, Term
from bake.verify.report import Report
from bake.verify.rounding import round_once, spacing

_BLOCK_ELEMENTS = 1024 * 1024
_SAMPLED_TENSORS = 64
_SAMPLED_ROWS = 4
_FLOAT32_UNIT = 2.0**-24
_FLOAT64_UNIT = 2.0**-53
_CHAIN_TOLERANCE = 2.0**-36  # of a row's largest value: float64 sums, rotations and inverses in another order


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
    height = as_matrix(tensor.view)[0]
    seed = hashlib.sha256(tensor.name.encode()).digest()
    between = [int.from_bytes(seed[4 * i : 4 * i + 4], "little") % max(1, height) for i in range(_SAMPLED_ROWS - 2)]
    return [range(row, row + 1) for row in sorted({0, height - 1, *between}) if 0 <= row < height]


def all_rows(tensor: TensorPlan) -> list[range]:
    """Every row, in blocks that bound the memory."""
    height, width = as_matrix(tensor.view)
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    return [range(first, min(height, first + step)) for first in range(0, height, step)]


def check_tensor(tensor: TensorPlan, blocks: list[range], output: TensorFile, files: FileSet, report: Report) -> None:
    """Compare `blocks` of rows of one touched tensor with their float64 recomputation; note it in `report`.

    An element is wrong if it is further from the float64 value than half a unit of its last place plus
    what the arithmetic may lose on the way: for float32 sums the bound of Higham, Accuracy and
    Stability, section 3.1; for what is computed in float64 a fixed small share of the row's size.
    """
    width = as_matrix(tensor.view)[1]
    written = output.tensors[tensor.name]
    reference = _Reference(tensor, files)
    for block in blocks:
        exact, lost = reference.result(block)
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


def check_appended(tensor: TensorPlan, output: TensorFile, files: FileSet, report: Report) -> None:
    """Compare the rows behind those of the base with the stored vectors, rounded once; note it in `report`."""
    found = output.tensors[tensor.name]
    begin = found.begin + (found.end - found.begin) // tensor.shape[0] * tensor.source.shape[0]
    for stored in tensor.appended:
        with files.using(stored.input) as file:
            due = read_tensor(file, stored.span[0], stored.dtype, stored.as_rows, torch.float64)
        written = read_tensor(output, begin, found.dtype, stored.as_rows, torch.float64)
        begin += (found.end - found.begin) // tensor.shape[0] * stored.as_rows[0]
        report.embeddings += 1
        if not torch.equal(written, round_once(due, found.dtype)):
            report.add(f"{output.path}: the rows of {tensor.name} for {stored.name} are not the adapter's vectors")


class _Reference:
    """One tensor's float64 result, by rows."""

    def __init__(self, plan: TensorPlan, files: FileSet) -> None:
        self._plan, self._files = plan, files
        self._chain = Chain(plan.view, plan.terms, self)
        self._is_plain = all(is_plain(term.algorithm, term.factors) for term in plan.terms)
        self._pairs = [self._pair(term) if self._is_plain else None for term in plan.terms]

    def _pair(self, term: Term) -> tuple[Tensor, Tensor] | None:
        if term.algorithm not in LOW_RANK:
            return None
        return pair(term, {name: self.whole(term, name) for name in term.factors}, term.scale * term.weight)

    def whole(self, term: TermLike, name: str) -> Tensor:
        """A factor for the chain."""
        stored = _stored(term, name)
        with self._files.using(stored.input) as file:
            return read_tensor(file, stored.span[0], stored.dtype, stored.shape, torch.float64)

    def rows(self, term: TermLike, name: str, rows: range) -> Tensor:
        """Rows of a factor for the chain."""
        stored = _stored(term, name)
        with self._files.using(stored.input) as file:
            return read_rows(file, stored.span[0], stored.dtype, as_matrix(stored.shape)[1], rows, torch.float64)

    def base_rows(self, block: range) -> Tensor:
        """The base's values."""
        source = self._plan.source
        with self._files.using(source.input) as file:
            size, columns = self._plan.source_size, as_matrix(self._plan.view)[1]
            return read_padded(file, source.span[0], source.dtype, size, columns, block, torch.float64)

    def result(self, block: range) -> tuple[Tensor, Tensor]:
        """(float64 values, bound on what the arithmetic of the run may lose) for some rows."""
        exact = self._chain.rows(block, self.base_rows)
        if not self._is_plain:
            size = torch.maximum(exact.abs(), self.base_rows(block).abs()).amax(1, keepdim=True)
            return exact, (size * _CHAIN_TOLERANCE).expand_as(exact)
        unit = _FLOAT64_UNIT if "F64" in (self._plan.dtype, self._plan.source.dtype) else _FLOAT32_UNIT
        # roundings an element sees at most: one per product and sum, and those of the factors
        roundings = sum(two[0].shape[1] + 3 for two in self._pairs if two is not None) + 3 * len(self._pairs) + 2
        return exact, self._magnitude(block) * (roundings * unit)

    def _magnitude(self, block: range) -> Tensor:
        """The sum of the magnitudes of everything that is added up in an element."""
        total = self.base_rows(block).abs()
        for term, two in zip(self._plan.terms, self._pairs, strict=True):
            first, last = max(block.start, term.rows[0]), min(block.stop, term.rows[1])
            if first >= last:
                continue
            mine = slice(first - term.rows[0], last - term.rows[0])
            if two is not None:
                size = two[0][mine].abs() @ two[1].abs()
            else:
                size = self._stored_rows(term, mine).abs() * abs(term.scale * term.weight)
            total[first - block.start : last - block.start, slice(*term.columns)] += size
        return total

    def _stored_rows(self, term: Term, mine: slice) -> Tensor:
        (name,) = term.factors
        own = range(mine.start + term.part[0], mine.stop + term.part[0])
        if term.transposed:
            whole = self.whole(term, name)
            return whole.reshape(whole.shape[0], -1).T[own.start : own.stop]
        return self.rows(term, name, own)


def _stored(term: TermLike, name: str) -> Stored:
    stored = term.factors[name]
    assert isinstance(stored, Stored)
    return stored


def iter_blocks(tensors: list[TensorPlan], full: bool) -> Iterator[tuple[TensorPlan, list[range]]]:
    """What to compare: everything, or some rows of a sample."""
    for tensor in tensors if full else sampled(tensors):
        yield tensor, all_rows(tensor) if full else sampled_rows(tensor)
