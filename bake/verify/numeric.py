"""Touched tensors, recomputed in float64 from the base and the adapters and compared element by element."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from bake.adapters import LOW_RANK, is_plain
from bake.adapters.chain import Chain, TermLike, pair
from bake.draws import key_of
from bake.dtypes import DTYPES
from bake.io.fileset import FileSet
from bake.io.payload import read_padded, read_rows, read_tensor
from bake.io.tensorfile import TensorFile
from bake.keys.factors import as_matrix
from bake.plan.model import Plan, Stored, TensorPlan, Term
from bake.verify.report import Report
from bake.verify.rounding import Rule, round_once, spacing
from bake.verify.scales import Scales

_BLOCK_ELEMENTS = 256 * 1024
_MAX_WORKERS = 8
_SAMPLED_TENSORS = 64
_SAMPLED_ROWS = 4
_FLOAT32_UNIT, _FLOAT64_UNIT = 2.0**-24, 2.0**-53
_CHAIN_TOLERANCE = 2.0**-36  # of a row's largest value: float64 sums, rotations and inverses in another order


def sampled(tensors: list[TensorPlan]) -> list[TensorPlan]:
    """A fixed, evenly spread choice of `tensors` that holds every component and algorithm among them."""
    step = max(1, len(tensors) // _SAMPLED_TENSORS)
    chosen = set(range(0, len(tensors), step))
    seen: set[tuple[str, ...]] = set()
    for place, tensor in enumerate(tensors):
        kind = (tensor.component, tensor.dtype, str(tensor.rescaled), *(term.algorithm for term in tensor.terms))
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


def check_tensors(
    plan: Plan, tensors: list[TensorPlan], full: bool, output: TensorFile, files: FileSet
) -> Iterator[tuple[TensorPlan, Report]]:
    """Each tensor that is looked at, with what was found: all elements of all of them, or some rows of a sample."""

    def check(tensor: TensorPlan) -> Report:
        blocks = all_rows(tensor) if full else sampled_rows(tensor)
        return _check_tensor(tensor, blocks, output, files, _rule_of(plan, tensor))

    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are what is worked on side by side
    try:
        if full:
            with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1), "bake verify") as pool:
                try:
                    yield from zip(tensors, pool.map(check, tensors), strict=True)
                finally:
                    pool.shutdown(cancel_futures=True)
        else:  # a few rows of each are too little work to share: threads would only wait for Python's lock
            yield from ((tensor, check(tensor)) for tensor in sampled(tensors))
    finally:
        torch.set_num_threads(threads_before)


def _rule_of(plan: Plan, tensor: TensorPlan) -> Rule:
    """How the elements of a tensor of `plan` are rounded."""
    key = key_of(plan.seed, tensor.name) if plan.rounding == "stochastic" else None
    return Rule(tensor.dtype, key, plan.rounding == "fast")


def _check_tensor(tensor: TensorPlan, blocks: list[range], output: TensorFile, files: FileSet, rule: Rule) -> Report:
    """What is found when `blocks` of rows of one touched tensor are compared with their float64 recomputation.

    A sum stored in 16 bits or fewer is wrong if it is not the float64 value rounded once. Anything else is if no
    value within reach of the float64 value rounds to it. Within reach is what float64 arithmetic in another order
    may lose: for sums the bound of Higham, Accuracy and Stability, section 3.1; for transforms a fixed small share
    of the row's size. Of scaled tensors the quotients are compared, and the scale of every row, or of the tensor if
    all its rows are there.
    """
    report = Report("full", touched_tensors=1)
    width = as_matrix(tensor.view)[1]
    written = output.tensors[tensor.name]
    reference = _Reference(tensor, files, rule.is_fast)
    scales = None if tensor.rescaled is None else Scales(tensor, tensor.rescaled, output)
    finding: str | None = None
    for block in blocks:
        exact, lost = reference.result(block)
        if scales is not None:
            finding = scales.check(exact, lost, block)
        if finding is None:
            found = read_rows(output, written.begin, written.dtype, width, block, torch.float64)
            divisors = scales.of(block).expand_as(exact) if scales is not None else torch.ones_like(exact)
            finding = _check_rows(reference, block, exact, lost, divisors, found, rule, report)
        if finding is not None:
            break
    else:
        finding = scales.check_whole() if scales is not None else None
    if finding is not None:
        report.add(finding)
    return report


def _check_rows(
    reference: _Reference,
    block: range,
    exact: Tensor,
    lost: Tensor,
    divisors: Tensor,
    found: Tensor,
    rule: Rule,
    report: Report,
) -> str | None:
    """Count in `report` how near the rows `found` come to `exact / divisors`; what is wrong with them, if anything."""
    tensor, base, first = reference.plan, reference.base_rows(block), block.start * found.shape[1]
    exact, lost = exact / divisors, lost / divisors
    lowest, highest = (rule.round(exact + side * lost, first) for side in (-1, 1))
    if reference.is_defined:
        # Where the order of a float64 sum would decide the rounding, the order that is promised does.
        for row, column in (lowest != highest).nonzero().tolist():
            defined = reference.by_definition(block.start + row, column, float(base[row, column]))
            exact[row, column] = defined / float(divisors[row, column])
        lowest = highest = rule.round(exact, first)
    rounded = rule.round(exact, first)
    if DTYPES[tensor.dtype].bits == 8:
        exact = exact.clamp(-DTYPES[tensor.dtype].largest, DTYPES[tensor.dtype].largest)
    larger = torch.maximum(exact.abs(), (base / divisors).abs())
    ulp = ((found - exact).abs() / spacing(larger, tensor.dtype)).nan_to_num(nan=torch.inf)
    worst = float(ulp.max()) if ulp.numel() else 0.0
    report.elements += exact.numel()
    report.equal += int((found == rounded).sum())
    if worst > report.max_ulp or report.worst is None:
        report.max_ulp, report.worst = max(worst, report.max_ulp), tensor.name
    wrong = ~((lowest <= found) & (found <= highest)) & (found != rounded)
    if not bool(wrong.any()):
        return None
    row, column = (int(place) for place in wrong.nonzero()[0])
    return (
        f"{tensor.name}: row {block.start + row}, column {column} is {float(found[row, column]):.9g}, "
        f"should be {float(exact[row, column]):.9g} ({int(wrong.sum())} wrong elements in these rows)"
    )


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

    def __init__(self, plan: TensorPlan, files: FileSet, is_fast: bool) -> None:
        """is_fast: sums may be as float32 gives them."""
        self.plan, self._files = plan, files
        self._is_fast = is_fast
        self._chain = Chain(plan.view, plan.terms, self)
        self._is_plain = all(is_plain(term.algorithm, term.factors) for term in plan.terms)
        self._pairs = [self._pair(term) if self._is_plain else None for term in plan.terms]
        self._scale = None if plan.scale is None else self._whole(plan.scale).reshape(-1, 1)

    def _pair(self, term: Term) -> tuple[Tensor, Tensor] | None:
        if term.algorithm not in LOW_RANK:
            return None
        left, right = pair(term, {name: self.whole(term, name) for name in term.factors}, 1.0)
        return left * (term.scale * term.weight), right

    def whole(self, term: TermLike, name: str) -> Tensor:
        """A factor for the chain."""
        return self._whole(_stored(term, name))

    def _whole(self, stored: Stored) -> Tensor:
        with self._files.using(stored.input) as file:
            return read_tensor(file, stored.span[0], stored.dtype, stored.shape, torch.float64)

    def rows(self, term: TermLike, name: str, rows: range) -> Tensor:
        """Rows of a factor for the chain."""
        stored = _stored(term, name)
        with self._files.using(stored.input) as file:
            return read_rows(file, stored.span[0], stored.dtype, as_matrix(stored.shape)[1], rows, torch.float64)

    def base_rows(self, block: range) -> Tensor:
        """The base's values, those of scaled layers times their scale."""
        source = self.plan.source
        with self._files.using(source.input) as file:
            size, columns = self.plan.source_size, as_matrix(self.plan.view)[1]
            stored = read_padded(file, source.span[0], source.dtype, size, columns, block, torch.float64)
        if self._scale is None:
            return stored
        return stored * (self._scale[block.start : block.stop] if len(self._scale) > 1 else self._scale)

    @property
    def is_defined(self) -> bool:
        """True if every element has one right value, that of `by_definition` rounded once."""
        return self._is_plain and not self._is_fast and DTYPES[self.plan.dtype].bits <= 16

    def result(self, block: range) -> tuple[Tensor, Tensor]:
        """(float64 values, bound on what the arithmetic of the run may lose) for some rows."""
        exact = self._chain.rows(block, self.base_rows)
        if not self._is_plain:
            size = torch.maximum(exact.abs(), self.base_rows(block).abs()).amax(1, keepdim=True)
            return exact, (size * _CHAIN_TOLERANCE).expand_as(exact)
        # roundings an element sees at most: one per product and sum, and those of the factors
        roundings = sum(two[0].shape[1] + 3 for two in self._pairs if two is not None) + 3 * len(self._pairs) + 2
        unit = _FLOAT32_UNIT if self._is_fast else _FLOAT64_UNIT
        return exact, self._magnitude(block) * (roundings * unit if self._pairs else 0.0)

    def by_definition(self, row: int, column: int, value: float) -> float:
        """One element as docs/numerics.md defines it: a sum for each region, added up, then to the base's value."""
        update = 0.0
        terms = zip(self.plan.terms, self._pairs, strict=True)
        for (rows, columns, is_product), group in itertools.groupby(terms, _region):
            if rows[0] <= row < rows[1] and columns[0] <= column < columns[1]:
                own, across = row - rows[0], column - columns[0]
                values = [value for each in group for value in self._summands(*each, own, across)]
                for summand in [_by_halves(values)] if is_product else values:
                    update += summand
        return value + update

    def _summands(self, term: Term, two: tuple[Tensor, Tensor] | None, row: int, column: int) -> list[float]:
        """What a term adds to the element at (row, column) of its region: the products, or the stored difference."""
        if two is not None:
            products: list[float] = (two[0][row] * two[1][:, column]).tolist()
            return products
        return [float(self._stored_rows(term, slice(row, row + 1))[0, column]) * (term.scale * term.weight)]

    def _magnitude(self, block: range) -> Tensor:
        """The sum of the magnitudes of everything that is added up in an element."""
        total = self.base_rows(block).abs()
        for term, two in zip(self.plan.terms, self._pairs, strict=True):
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


def _region(each: tuple[Term, tuple[Tensor, Tensor] | None]) -> tuple[tuple[int, int], tuple[int, int], bool]:
    term, two = each
    return term.rows, term.columns, two is not None


def _by_halves(values: list[float]) -> float:
    """The sum of `values`: padded with zeros to a power of two, the second half is added to the first, and again."""
    while len(values) > 1:
        half = 1 << ((len(values) - 1).bit_length() - 1)
        later = values[half:]
        values = [one + two for one, two in zip(values, later, strict=False)] + values[len(later) : half]
    return values[0]


def _stored(term: TermLike, name: str) -> Stored:
    stored = term.factors[name]
    assert isinstance(stored, Stored)
    return stored
