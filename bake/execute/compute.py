"""One chunk of one tensor: widen, add every update, check, round once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.adapters import DELTAS, LOW_RANK
from bake.dtypes import DTYPES
from bake.errors import NonFinite
from bake.execute.chunk import Chunk
from bake.execute.device import Device
from bake.io.fileset import FileSet
from bake.io.payload import read_rows, read_tensor
from bake.io.tensorfile import TensorFile
from bake.keys.factors import as_matrix
from bake.plan.model import Stored, TensorPlan, Term

_SAMPLED_ROWS = 16  # every 16th row of a chunk is used to measure what survived the rounding


class Work:
    """The updates of one tensor, with their factors loaded, ready for any chunk of it."""

    def __init__(self, plan: TensorPlan, files: FileSet, device: Device) -> None:
        """Load the low-rank factors of `plan`; stored differences are read chunk by chunk."""
        self.plan = plan
        self.dtype = torch.float64 if "F64" in (plan.dtype, plan.source.dtype) else torch.float32
        self._files = files
        self._device = device
        self._steps: list[_LowRank | _ByRows] = []
        for region, group in itertools.groupby(plan.terms, key=_region):
            terms = list(group)
            if terms[0].algorithm in LOW_RANK:
                self._steps.append(self._joined(terms, *region[1:]))
            else:
                self._steps += [_ByRows(term, self) for term in terms]

    def _joined(self, terms: Sequence[Term], rows: tuple[int, int], columns: tuple[int, int]) -> _LowRank:
        """Several low-rank updates of one region as one: factors side by side, so one product adds them all."""
        pairs = [self._pair(term) for term in terms]
        left = torch.cat([pair[0] for pair in pairs], dim=1)
        right = torch.cat([pair[1] for pair in pairs], dim=0)
        return _LowRank(rows, columns, self._device.upload(left), self._device.upload(right))

    def _pair(self, term: Term) -> tuple[Tensor, Tensor]:
        factors = {name: self.load(stored) for name, stored in term.factors.items()}
        left, right = LOW_RANK[term.algorithm](**factors, scale=term.scale)
        if term.rank_limit is not None:
            left, right = left[:, : term.rank_limit], right[: term.rank_limit]
        return (right.T, left.T) if term.transposed else (left, right)

    def load(self, stored: Stored) -> Tensor:
        """A whole factor in the compute dtype."""
        with self._files.using(stored.input) as file:
            return read_tensor(file, stored.span[0], stored.dtype, stored.shape, self.dtype)

    def file(self, stored: Stored, within: ExitStack) -> TensorFile:
        return within.enter_context(self._files.using(stored.input))

    def upload(self, tensor: Tensor) -> Tensor:
        return self._device.upload(tensor)

    def add(self, total: Tensor, rows: range) -> None:
        """Add every update's part for `rows` of the tensor to `total`, in the plan's order."""
        for step in self._steps:
            step.add(total, rows)

    def fuse(self, raw: Tensor, out: Tensor, chunk: Chunk, scratch: Tensor) -> Survival:
        """Write the finished chunk into `out` and return what survived of the update.

        raw: the base's values, (rows, columns) in the stored dtype, on the host. out: likewise in the
        output dtype. scratch: at least that many elements in the compute dtype, on the device.
        Raises NonFinite if the result is not finite or overflows the output dtype.
        """
        total = scratch[: chunk.elements].view(raw.shape)
        total.copy_(raw)
        self.add(total, range(chunk.first, chunk.last))
        self._check_finite(total, raw)
        target = DTYPES[self.plan.dtype]
        if target.bits == 8:  # a cast beyond the largest value saturates on some devices and not on others
            total.clamp_(-target.largest, target.largest)
        out.copy_(total if self._device.is_cpu else total.to(out.dtype))
        return self._survival(raw, out, chunk)

    def _check_finite(self, total: Tensor, raw: Tensor) -> None:
        if total.numel() == 0:
            return
        low, high = torch.aminmax(total)
        target = DTYPES[self.plan.dtype]
        limit = float("inf") if target.bits == 8 else target.overflow
        if -limit < float(low) and float(high) < limit:
            return
        name, source = self.plan.name, raw.to(torch.float64)
        if not bool(torch.isfinite(source).all()):
            raise NonFinite(f"{name}: the base holds NaN or infinity here, so nothing can be added", tensor=name)
        if bool(torch.isfinite(total).all()):
            worst = max(abs(float(low)), abs(float(high)))
            raise NonFinite(
                f"{name}: the result reaches {worst:.6g}, {self.plan.dtype} ends at {target.largest:g}. "
                f"Lower the weight, or write a wider dtype (--dtype bf16 or fp32).",
                tensor=name,
            )
        raise NonFinite(f"{name}: the update is not finite; an adapter holds NaN or infinity", tensor=name)

    def _survival(self, raw: Tensor, out: Tensor, chunk: Chunk) -> Survival:
        """Sums over every 16th row, in float64: |update|^2 and |update - (out - base)|^2.

        The base counts as it would be stored without the update: what rounding it loses is not the update's.
        """
        if not self._steps:
            return Survival(0.0, 0.0)
        rows = range(chunk.first, chunk.last, _SAMPLED_ROWS)
        update = self._device.scratch(len(rows) * chunk.columns, self.dtype).view(len(rows), chunk.columns).zero_()
        self.add(update, rows)
        exact = update.cpu().double()
        written = out[::_SAMPLED_ROWS].double() - raw[::_SAMPLED_ROWS].to(out.dtype).double()
        return Survival(float(exact.square().sum()), float((exact - written).square().sum()))


@dataclass(frozen=True, slots=True)
class Survival:
    """How much of an update is left after rounding, as two sums of squares."""

    update: float
    lost: float

    def __add__(self, other: Survival) -> Survival:
        return Survival(self.update + other.update, self.lost + other.lost)

    @property
    def share(self) -> float | None:
        """1 - |lost| / |update|; None where nothing was to be added."""
        return None if self.update == 0 else max(0.0, 1.0 - (self.lost / self.update) ** 0.5)


def _region(term: Term) -> tuple[bool, tuple[int, int], tuple[int, int]]:
    return term.algorithm in LOW_RANK, term.rows, term.columns


def _overlapping(rows: range, region: tuple[int, int]) -> tuple[slice, range] | None:
    """(which of the wanted `rows` lie in `region`, these rows counted from its start)."""
    begin = max(0, -(-(region[0] - rows.start) // rows.step))
    end = min(len(rows), -(-(region[1] - rows.start) // rows.step))
    if begin >= end:
        return None
    part = rows[begin:end]
    return slice(begin, end), range(part.start - region[0], part.stop - region[0], part.step)


@dataclass(frozen=True, slots=True)
class _LowRank:
    """left @ right, added to one region of the tensor."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    left: Tensor  # (rows, rank)
    right: Tensor  # (rank, columns)

    def add(self, total: Tensor, rows: range) -> None:
        part = _overlapping(rows, self.rows)
        if part is not None:
            wanted, own = part
            total[wanted, self.columns[0] : self.columns[1]].addmm_(
                self.left[own.start : own.stop : own.step], self.right
            )


class _ByRows:
    """A stored difference: only the rows of the chunk are ever read."""

    def __init__(self, term: Term, work: Work) -> None:
        self.term, self.work = term, work

    def add(self, total: Tensor, rows: range) -> None:
        part = _overlapping(rows, self.term.rows)
        if part is None:
            return
        wanted, own = part
        with ExitStack() as open_files:
            factors = {
                name: self._rows_of(self.work.file(stored, open_files), stored, own)
                for name, stored in self.term.factors.items()
            }
        update = DELTAS[self.term.algorithm](**factors, scale=self.term.scale)
        first, last = self.term.columns
        total[wanted, first:last].add_(self.work.upload(update))

    def _rows_of(self, file: TensorFile, stored: Stored, own: range) -> Tensor:
        columns = as_matrix(stored.shape)[1]
        if self.term.transposed:
            whole = read_tensor(file, stored.span[0], stored.dtype, as_matrix(stored.shape), self.work.dtype)
            return whole.T[own.start : own.stop : own.step]
        return read_rows(file, stored.span[0], stored.dtype, columns, own, self.work.dtype)
