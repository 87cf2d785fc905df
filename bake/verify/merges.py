"""Merged tensors, made again from the models in other pieces, one after the other, and compared bit for bit.

The maths is that of `bake.merges`, which tests hold against NumPy; reading and rounding are not those of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from bake.dtypes import DTYPES
from bake.errors import Mismatch
from bake.io.arrays import read_array
from bake.io.fileset import FileSet
from bake.io.tensorfile import TensorFile
from bake.keys.factors import as_matrix
from bake.merges import METHODS
from bake.merges.merge import Chunk, Job, Merge
from bake.plan.model import MergeStep, Plan, Share, TensorPlan
from bake.verify.numeric import all_rows, check_tensor, rule_of, sampled, sampled_rows
from bake.verify.report import Report
from bake.verify.rounding import Doubles, Rule, spacing

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS = 200_000  # of all models together; another number than the run's, so other pieces
_SAMPLED_ELEMENTS = 4 * 1024 * 1024  # larger tensors are no part of a sample where all of a tensor has to be seen


def check_merged(
    plan: Plan, tensors: Sequence[TensorPlan], full: bool, output: TensorFile, files: FileSet
) -> Iterator[tuple[TensorPlan, Report]]:
    """Each tensor that is looked at, with what was found: all elements of all of them, or some rows of a sample."""
    chosen = list(tensors) if full else sampled([each for each in tensors if _is_cheap(each)] or list(tensors))
    settled = _settled(plan, files)
    for tensor in chosen:
        step = tensor.merge
        assert step is not None
        try:
            merge = settled.get(step.name)
            if merge is None:
                merge = _merge(plan, tensor)
                _survey(merge, tensor, step, files)
            yield tensor, _check(_Merged(tensor, step, merge, files), full, output, files, rule_of(plan, tensor))
        except ValueError as error:
            raise Mismatch(f"{tensor.name}: {error}", tensor=tensor.name) from None


def _is_cheap(tensor: TensorPlan) -> bool:
    """True if a few rows can be made without reading very much."""
    assert tensor.merge is not None
    return (
        METHODS[tensor.merge.method].reach in ("element", "row") or math.prod(tensor.source.shape) <= _SAMPLED_ELEMENTS
    )


def _merge(plan: Plan, tensor: TensorPlan) -> Merge:
    step = tensor.merge
    assert step is not None
    return METHODS[step.method].load()(Job(step.name, tensor.source.shape, step.roles, step.parameters, plan.seed))


def _settled(plan: Plan, files: FileSet) -> dict[str, Merge]:
    """Of methods that look at all tensors first: every merge, after that. Full name -> merge."""
    merges: dict[str, Merge] = {}
    for _, tensor in plan.tensors():
        if tensor.merge is not None and METHODS[tensor.merge.method].reach == "global":
            merges[tensor.merge.name] = _merge(plan, tensor)
            _survey(merges[tensor.merge.name], tensor, tensor.merge, files)
    if merges:
        next(iter(merges.values())).agree(list(merges.values()))
    return merges


def _survey(merge: Merge, tensor: TensorPlan, step: MergeStep, files: FileSet) -> None:
    for survey in merge.passes():
        for rows in _blocks(merge, len(step.shares)):
            survey.add(_chunk(merge, tensor, step, rows, files))


def _blocks(merge: Merge, models: int) -> list[range]:
    """All rows, in pieces."""
    height, width = merge.view
    step = height if merge.whole else max(1, _BLOCK_ELEMENTS // models // max(1, width))
    return [range(first, min(height, first + step)) for first in range(0, height, max(1, step))]


def _chunk(merge: Merge, tensor: TensorPlan, step: MergeStep, rows: range, files: FileSet) -> Chunk:
    width = merge.view[1]
    begin, end = rows.start * width, rows.stop * width
    models = [_elements(step, number, tensor.source.shape, begin, end, files) for number in range(len(step.shares))]
    return Chunk(rows.start, _for(merge, [model.reshape(len(rows), width) for model in models]))


def _for(merge: Merge, arrays: list[Doubles]) -> list[Tensor]:
    """The same numbers as the maths takes them."""
    if merge.is_plain:
        return cast("list[Tensor]", arrays)
    import torch  # which this maths has brought already

    return [torch.from_numpy(array) for array in arrays]


def _elements(step: MergeStep, number: int, shape: tuple[int, ...], begin: int, end: int, files: FileSet) -> Doubles:
    """The elements [begin, end) of one model's tensor."""
    share = step.shares[number]
    narrow = as_matrix(share.stored[0].shape)[1]
    if share.transposed or narrow < as_matrix(shape)[1]:
        stored = _stored(share, 0, sum(math.prod(each.shape) for each in share.stored), files)
        if share.transposed:
            whole = stored.reshape(share.stored[0].shape).T
        else:
            whole = _elements(step, step.models.index(0), shape, 0, math.prod(shape), files).reshape(as_matrix(shape))
            whole[:, :narrow] = stored.reshape(-1, narrow)
        return whole.reshape(-1)[begin:end]
    return _stored(share, begin, end, files)


def _stored(share: Share, begin: int, end: int, files: FileSet) -> Doubles:
    """The elements [begin, end) of what is stored, one tensor after the other."""
    parts, at = [], 0
    for stored in share.stored:
        count = math.prod(stored.shape)
        low, high = max(begin, at), min(end, at + count)
        if low < high:
            offset = stored.span[0] + (low - at) * DTYPES[stored.dtype].bits // 8
            with files.using(stored.input) as file:
                parts.append(read_array(file, offset, stored.dtype, (high - low,), np.float64))
        at += count
    return np.concatenate(parts)


class _Merged:
    """The merged values of one tensor."""

    def __init__(self, tensor: TensorPlan, step: MergeStep, merge: Merge, files: FileSet) -> None:
        self.tensor, self.merge = tensor, merge
        self._step, self._files = step, files
        self._whole: Doubles | None = None  # of methods that make them all at once

    def blocks(self) -> list[range]:
        """All rows of the merge, in pieces."""
        return _blocks(self.merge, len(self._step.shares))

    def of(self, rows: range) -> Doubles:
        """Some rows of the merge."""
        if not self.merge.whole:
            return self._blended(rows)
        if self._whole is None:
            self._whole = self._blended(range(self.merge.view[0]))
        return self._whole[rows.start : rows.stop]

    def seen(self, rows: range) -> Doubles:
        """Rows of the tensor as its plan sees it: those of the merge may be others."""
        columns, width = as_matrix(self.tensor.view)[1], self.merge.view[1]
        begin, end = rows.start * columns, rows.stop * columns
        first = begin // width
        values = self.of(range(first, -(-end // width))).reshape(-1)
        return values[begin - first * width : end - first * width].reshape(len(rows), columns).copy()

    def _blended(self, rows: range) -> Doubles:
        chunk = _chunk(self.merge, self.tensor, self._step, rows, self._files)
        return np.asarray(self.merge.blend(chunk))


def _check(merged: _Merged, full: bool, output: TensorFile, files: FileSet, rule: Rule) -> Report:
    """What is found when one merged tensor is made again."""
    tensor, merge = merged.tensor, merged.merge
    if tensor.terms or tensor.is_rescaled:
        blocks = all_rows(tensor) if full else sampled_rows(tensor)
        return check_tensor(tensor, blocks, output, files, rule, merged.seen)
    report = Report("full", touched_tensors=1)
    has_rows = merge.view[0] == as_matrix(tensor.source.shape)[0]  # a vector is one
    for rows in merged.blocks() if full or merge.whole or not has_rows else sampled_rows(tensor):
        finding = _compare(tensor, merged.of(rows), rows.start * merge.view[1], output, rule, report)
        if finding is not None:
            report.add(finding)
            break
    return report


def _compare(
    tensor: TensorPlan, values: Doubles, begin: int, output: TensorFile, rule: Rule, report: Report
) -> str | None:
    """Count in `report` how many `values`, from flat index `begin` on, are written rounded once; what else is there."""
    written = output.tensors[tensor.name]
    offset = written.begin + begin * DTYPES[written.dtype].bits // 8
    found = read_array(output, offset, written.dtype, values.shape, np.float64)
    with np.errstate(all="ignore"):
        due = rule.round(values, begin)
        ulp = np.nan_to_num(np.abs(found - values) / spacing(np.maximum(np.abs(values), np.abs(due)), tensor.dtype))
    report.elements += values.size
    report.equal += int((found == due).sum())
    worst = float(ulp.max(initial=0.0))
    if worst > report.max_ulp or report.worst is None:
        report.max_ulp, report.worst = max(worst, report.max_ulp), tensor.name
    wrong = np.argwhere(found != due)
    if not len(wrong):
        return None
    place = begin + int(wrong[0][0]) * values.shape[1] + int(wrong[0][1])
    row, column = (int(index) for index in wrong[0])
    return (
        f"{tensor.name}: element {place} is {found[row, column]:.9g}, should be {due[row, column]:.9g} "
        f"({len(wrong)} wrong elements in these rows)"
    )
