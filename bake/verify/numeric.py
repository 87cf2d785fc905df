"""Touched tensors, recomputed in float64 from the base and the adapters and compared element by element."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bake.dtypes import DTYPES
from bake.io.arrays import read_array
from bake.io.fileset import FileSet
from bake.io.tensorfile import TensorFile
from bake.keys.factors import as_matrix, is_plain
from bake.plan.model import Plan, Stored, TensorPlan, Term
from bake.verify.report import Report
from bake.verify.rounding import Doubles, Rule, round_once, spacing
from bake.verify.scales import Scales
from bake.verify.updates import is_simple, rows_after

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
        return check_tensor(tensor, blocks, output, files, rule_of(plan, tensor))

    if full:
        with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1), "bake verify") as pool:
            try:
                yield from zip(tensors, pool.map(check, tensors), strict=True)
            finally:
                pool.shutdown(cancel_futures=True)
    else:  # a few rows of each are too little work to share: threads would only wait for Python's lock
        yield from ((tensor, check(tensor)) for tensor in sampled(tensors))


def rule_of(plan: Plan, tensor: TensorPlan) -> Rule:
    """How the elements of a tensor of `plan` are rounded."""
    if plan.rounding != "stochastic":
        return Rule(tensor.dtype, None, plan.rounding == "fast")
    from bake.draws import key_of  # brings torch

    return Rule(tensor.dtype, key_of(plan.seed, tensor.name))


def check_tensor(
    tensor: TensorPlan,
    blocks: list[range],
    output: TensorFile,
    files: FileSet,
    rule: Rule,
    merged: Callable[[range], Doubles] | None = None,
) -> Report:
    """What is found when `blocks` of rows of one touched tensor are compared with their float64 recomputation.

    merged: the base's values of any rows, where they are made of several models' and stored nowhere.
    A sum stored in 16 bits or fewer is wrong if it is not the float64 value rounded once. Anything else is if no
    value within reach of the float64 value rounds to it. Within reach is what float64 arithmetic in another order
    may lose: for sums the bound of Higham, Accuracy and Stability, section 3.1; for transforms a fixed small share
    of the row's size. Of scaled tensors the quotients are compared, and the scale of every row, or of the tensor if
    all its rows are there.
    """
    report = Report("full", touched_tensors=1)
    width = as_matrix(tensor.view)[1]
    written = output.tensors[tensor.name]
    reference = _Reference(tensor, files, rule.is_fast, merged)
    scales = None if tensor.rescaled is None else Scales(tensor, tensor.rescaled, output)
    finding: str | None = None
    for block in blocks:
        with np.errstate(all="ignore"):
            exact, lost = reference.result(block)
            if scales is not None:
                finding = scales.check(exact, lost, block)
            if finding is None:
                found = _rows(output, written.begin, written.dtype, width, block)
                divisors = np.ones_like(exact) if scales is None else np.broadcast_to(scales.of(block), exact.shape)
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
    exact: Doubles,
    lost: Doubles,
    divisors: Doubles,
    found: Doubles,
    rule: Rule,
    report: Report,
) -> str | None:
    """Count in `report` how near the rows `found` come to `exact / divisors`; what is wrong with them, if anything."""
    tensor, base, first = reference.plan, reference.base_rows(block), block.start * found.shape[1]
    if tensor.keeps_nonfinite:
        kept = ~np.isfinite(base) & ~np.isfinite(exact)
        if not np.array_equal(found[kept], base[kept], equal_nan=True):
            return f"{tensor.name}: NaN or infinity of the base in rows {block.start} to {block.stop} did not stay"
        exact, lost, base, found = (np.where(kept, 0.0, values) for values in (exact, lost, base, found))
    exact, lost = exact / divisors, lost / divisors
    lowest, highest = (rule.round(exact + side * lost, first) for side in (-1, 1))
    if reference.is_defined:
        # Where the order of a float64 sum would decide the rounding, the order that is promised does.
        for row, column in np.argwhere(lowest != highest).tolist():
            defined = reference.by_definition(block.start + row, column, float(base[row, column]))
            exact[row, column] = defined / float(divisors[row, column])
        lowest = highest = rule.round(exact, first)
    rounded = rule.round(exact, first)
    if DTYPES[tensor.dtype].bits == 8:
        exact = np.clip(exact, -DTYPES[tensor.dtype].largest, DTYPES[tensor.dtype].largest)
    larger = np.maximum(np.abs(exact), np.abs(base / divisors))
    ulp = np.nan_to_num(np.abs(found - exact) / spacing(larger, tensor.dtype), nan=np.inf)
    worst = float(ulp.max(initial=0.0))
    report.elements += exact.size
    report.equal += int((found == rounded).sum())
    if worst > report.max_ulp or report.worst is None:
        report.max_ulp, report.worst = max(worst, report.max_ulp), tensor.name
    wrong = ~((lowest <= found) & (found <= highest)) & (found != rounded)
    if not wrong.any():
        return None
    row, column = (int(place) for place in np.argwhere(wrong)[0])
    return (
        f"{tensor.name}: row {block.start + row}, column {column} is {float(found[row, column]):.9g}, "
        f"should be {float(exact[row, column]):.9g} ({int(wrong.sum())} wrong elements in these rows)"
    )


def _rows(file: TensorFile, begin: int, tag: str, columns: int, rows: range) -> Doubles:
    """Contiguous rows of a stored tensor seen as a matrix of `columns` columns; begin: its first byte."""
    offset = begin + rows.start * columns * DTYPES[tag].bits // 8
    return read_array(file, offset, tag, (len(rows), columns), np.float64)


def check_appended(tensor: TensorPlan, output: TensorFile, files: FileSet, report: Report) -> None:
    """Compare the rows behind those of the base with the stored vectors, rounded once; note it in `report`."""
    found = output.tensors[tensor.name]
    begin = found.begin + (found.end - found.begin) // tensor.shape[0] * tensor.source.shape[0]
    for stored in tensor.appended:
        with files.using(stored.input) as file:
            due = read_array(file, stored.span[0], stored.dtype, stored.as_rows, np.float64)
        written = read_array(output, begin, found.dtype, stored.as_rows, np.float64)
        begin += (found.end - found.begin) // tensor.shape[0] * stored.as_rows[0]
        report.embeddings += 1
        if not np.array_equal(written, round_once(due, found.dtype)):
            report.add(f"{output.path}: the rows of {tensor.name} for {stored.name} are not the adapter's vectors")


class _Reference:
    """One tensor's float64 result, by rows."""

    def __init__(
        self, plan: TensorPlan, files: FileSet, is_fast: bool, merged: Callable[[range], Doubles] | None
    ) -> None:
        """is_fast: sums may be as float32 gives them. merged: the base's values where they are not stored."""
        self.plan, self._files, self._merged = plan, files, merged
        self._is_fast = is_fast
        self._is_plain = all(is_plain(term.algorithm, term.factors) for term in plan.terms)
        self._pairs = [self._pair(term) if self._is_plain else None for term in plan.terms]
        self._scale = None if plan.scale is None else self._whole(plan.scale).reshape(-1, 1)
        self._chain: Callable[[range], Doubles] | None = None
        if not self._is_plain and is_simple(plan.terms):
            self._chain = rows_after(plan, files, self.base_rows)
        elif not self._is_plain:
            from bake.verify.chains import chain_of  # brings torch

            self._chain = chain_of(plan, files, self.base_rows)

    def _pair(self, term: Term) -> tuple[Doubles, Doubles] | None:
        """The two factors of a thin product, the left one scaled; None for a stored difference."""
        if term.algorithm == "full":
            return None
        if term.algorithm == "lora" and term.factors.keys() == {"up", "down"}:
            left, right = (self._whole(term.factors[name]) for name in ("up", "down"))
            expert, experts = (int(term.settings.get(name) or 0) for name in ("expert", "experts"))
            if experts:
                rank = len(right) // experts
                left, right = left[:, expert::experts], right[expert * rank :][:rank]
            left, right = left[:, : term.rank_limit], right[: term.rank_limit]
            if term.transposed:
                left, right = right.T, left.T
            left = left[slice(*term.part)]
        else:
            from bake.verify.chains import thin_pair  # brings torch

            left, right = thin_pair(term, self._files)
        return left * (term.scale * term.weight), right

    def _whole(self, stored: Stored) -> Doubles:
        """A stored tensor as a matrix."""
        with self._files.using(stored.input) as file:
            return read_array(file, stored.span[0], stored.dtype, as_matrix(stored.shape), np.float64)

    def base_rows(self, block: range) -> Doubles:
        """The base's values, those of scaled layers times their scale."""
        if self._merged is not None:
            return self._merged(block)
        source, size = self.plan.source, self.plan.source_size
        values = np.zeros((len(block), as_matrix(self.plan.view)[1]))
        stored = range(block.start, min(block.stop, size[0]))
        if stored:
            with self._files.using(source.input) as file:
                values[: len(stored), : size[1]] = _rows(file, source.span[0], source.dtype, size[1], stored)
        if self._scale is not None:
            values *= self._scale[block.start : block.stop] if len(self._scale) > 1 else self._scale
        return values

    @property
    def is_defined(self) -> bool:
        """True if every element has one right value, that of `by_definition` rounded once."""
        return self._is_plain and not self._is_fast and DTYPES[self.plan.dtype].bits <= 16

    def result(self, block: range) -> tuple[Doubles, Doubles]:
        """(float64 values, bound on what the arithmetic of the run may lose) for some rows."""
        if self._chain is not None:
            exact = self._chain(block)
            sizes = np.maximum(np.abs(exact), np.abs(self.base_rows(block)))
            if self.plan.keeps_nonfinite:
                sizes[~np.isfinite(sizes)] = 0.0
            size = sizes.max(axis=1, keepdims=True, initial=0.0)
            return exact, np.broadcast_to(size * _CHAIN_TOLERANCE, exact.shape)
        exact = self.base_rows(block)
        magnitude = np.abs(exact)
        for term, two in zip(self.plan.terms, self._pairs, strict=True):
            first, last = max(block.start, term.rows[0]), min(block.stop, term.rows[1])
            if first < last:
                mine = slice(first - term.rows[0], last - term.rows[0])
                place = slice(first - block.start, last - block.start), slice(*term.columns)
                if two is not None:
                    exact[place] += two[0][mine] @ two[1]
                    magnitude[place] += np.abs(two[0][mine]) @ np.abs(two[1])
                else:
                    difference = self._stored_rows(term, mine) * (term.scale * term.weight)
                    exact[place] += difference
                    magnitude[place] += np.abs(difference)
        # roundings an element sees at most: one per product and sum, and those of the factors
        roundings = sum(two[0].shape[1] + 3 for two in self._pairs if two is not None) + 3 * len(self._pairs) + 2
        unit = _FLOAT32_UNIT if self._is_fast else _FLOAT64_UNIT
        return exact, magnitude * (roundings * unit if self._pairs else 0.0)

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

    def _summands(self, term: Term, two: tuple[Doubles, Doubles] | None, row: int, column: int) -> list[float]:
        """What a term adds to the element at (row, column) of its region: the products, or the stored difference."""
        if two is not None:
            products: list[float] = (two[0][row] * two[1][:, column]).tolist()
            return products
        return [float(self._stored_rows(term, slice(row, row + 1))[0, column]) * (term.scale * term.weight)]

    def _stored_rows(self, term: Term, mine: slice) -> Doubles:
        """These rows, counted from the first of the term's region, of a stored difference."""
        (stored,) = term.factors.values()
        own = range(mine.start + term.part[0], mine.stop + term.part[0])
        if term.transposed:
            return self._whole(stored).T[own.start : own.stop]
        with self._files.using(stored.input) as file:
            return _rows(file, stored.span[0], stored.dtype, as_matrix(stored.shape)[1], own)


def _region(each: tuple[Term, tuple[Doubles, Doubles] | None]) -> tuple[tuple[int, int], tuple[int, int], bool]:
    term, two = each
    return term.rows, term.columns, two is not None


def _by_halves(values: list[float]) -> float:
    """The sum of `values`: padded with zeros to a power of two, the second half is added to the first, and again."""
    while len(values) > 1:
        half = 1 << ((len(values) - 1).bit_length() - 1)
        later = values[half:]
        values = [one + two for one, two in zip(values, later, strict=False)] + values[len(later) : half]
    return values[0]
