"""One chunk of one tensor: widen, apply every term, check, round once."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.adapters import LOW_RANK, STORED, is_plain
from bake.adapters.chain import Chain, TermLike, pair
from bake.dtypes import DTYPES
from bake.errors import InputError, NonFinite
from bake.execute.chunk import Chunk
from bake.execute.device import Device
from bake.execute.narrow import narrow
from bake.io.fileset import FileSet
from bake.io.payload import read_padded, read_rows, read_tensor
from bake.io.tensorfile import TensorFile
from bake.keys.factors import as_matrix
from bake.plan.model import Stored, TensorPlan, Term

_SAMPLED_ROWS = 16  # every 16th row of a chunk is used to measure what survived the rounding


def work_on(plan: TensorPlan, files: FileSet, device: Device) -> Work:
    """The terms of one tensor with their factors loaded, ready for any chunk of it.

    Raises InputError if the factors of a term contradict each other.
    """
    if all(is_plain(term.algorithm, term.factors) for term in plan.terms):
        return Sum(plan, files, device)
    return Chained(plan, files, device)


class Work(ABC):
    """The terms of one tensor, ready for any chunk of it."""

    dtype: torch.dtype  # compute dtype

    def __init__(self, plan: TensorPlan, files: FileSet, device: Device) -> None:
        self.plan = plan
        self._files = files
        self._device = device

    def fuse(self, raw: Tensor, out: Tensor, chunk: Chunk, scratch: Tensor) -> Survival:
        """Write the finished chunk into `out` and return what survived of the update.

        raw: the base's values, (rows, columns) in the stored dtype, on the host. out: likewise in the
        output dtype. scratch: bytes on the device, enough for the chunk in the compute dtype of a Sum.
        Raises NonFinite if the result is not finite or overflows the output dtype.
        """
        total = self._total(raw, chunk, scratch)
        self._check_finite(total, raw)
        target = DTYPES[self.plan.dtype]
        if target.bits == 8:  # a cast beyond the largest value saturates on some devices and not on others
            total.clamp_(-target.largest, target.largest)
        out.copy_(total if total.dtype == torch.float32 and self._device.is_cpu else narrow(total, out.dtype))
        return self._survival(total, raw, out, chunk) if self.plan.terms else Survival(0.0, 0.0)

    @abstractmethod
    def _total(self, raw: Tensor, chunk: Chunk, scratch: Tensor) -> Tensor:
        """The new values of the chunk, not yet rounded."""

    @abstractmethod
    def _survival(self, total: Tensor, raw: Tensor, out: Tensor, chunk: Chunk) -> Survival:
        """Sums in float64: |update|^2 and |update - (out - base)|^2.

        The base counts as it would be stored without the update: what rounding it loses is not the update's.
        """

    def _load(self, stored: Stored) -> Tensor:
        """A whole factor in the compute dtype, on the device."""
        with self._files.using(stored.input) as file:
            return self._device.upload(read_tensor(file, stored.span[0], stored.dtype, stored.shape, self.dtype))

    def _rows_of(self, file: TensorFile, stored: Stored, rows: range) -> Tensor:
        columns = as_matrix(stored.shape)[1]
        return self._device.upload(read_rows(file, stored.span[0], stored.dtype, columns, rows, self.dtype))

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
            holder = "the adapter's tensor for it" if self.plan.replaced else "the base"
            raise NonFinite(f"{name}: {holder} holds NaN or infinity, so nothing can be made of it", tensor=name)
        if bool(torch.isfinite(total).all()):
            worst = max(abs(float(low)), abs(float(high)))
            raise NonFinite(
                f"{name}: the result reaches {worst:.6g}, {self.plan.dtype} ends at {target.largest:g}. "
                f"Lower the weight, or write a wider dtype (--dtype bf16 or fp32).",
                tensor=name,
            )
        raise NonFinite(f"{name}: the update is not finite; an adapter holds NaN or infinity", tensor=name)


class Sum(Work):
    """Products of thin matrices and stored differences, added in float32."""

    def __init__(self, plan: TensorPlan, files: FileSet, device: Device) -> None:
        """Load the low-rank factors of `plan`; stored differences are read chunk by chunk."""
        super().__init__(plan, files, device)
        self.dtype = torch.float64 if "F64" in (plan.dtype, plan.source.dtype) else torch.float32
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
        return _LowRank(rows, columns, left, right)

    def _pair(self, term: Term) -> tuple[Tensor, Tensor]:
        factors = {name: self._load(stored) for name, stored in term.factors.items()}
        return pair(term, factors, term.scale * term.weight)

    def _total(self, raw: Tensor, chunk: Chunk, scratch: Tensor) -> Tensor:
        total = scratch.view(self.dtype)[: chunk.elements].view(raw.shape)
        total.copy_(raw)
        self.add(total, range(chunk.first, chunk.last))
        return total

    def add(self, total: Tensor, rows: range) -> None:
        """Add every update's part for `rows` of the tensor to `total`, in the plan's order."""
        for step in self._steps:
            step.add(total, rows)

    def stored_rows(self, term: Term, rows: range) -> Tensor:
        """Rows of the one stored factor of `term`, oriented as its target."""
        (stored,) = term.factors.values()
        with ExitStack() as open_files:
            file = open_files.enter_context(self._files.using(stored.input))
            own = range(rows.start + term.part[0], rows.stop + term.part[0], rows.step)
            if term.transposed:
                whole = read_tensor(file, stored.span[0], stored.dtype, as_matrix(stored.shape), self.dtype)
                return self._device.upload(whole.T[own.start : own.stop : own.step])
            return self._rows_of(file, stored, own)

    def _survival(self, total: Tensor, raw: Tensor, out: Tensor, chunk: Chunk) -> Survival:
        """Over every 16th row: the update alone has to be computed once more."""
        rows = range(chunk.first, chunk.last, _SAMPLED_ROWS)
        update = self._device.scratch(len(rows) * chunk.columns, self.dtype).view(len(rows), chunk.columns).zero_()
        self.add(update, rows)
        exact = update.cpu().double()
        return _lost(exact, raw[::_SAMPLED_ROWS], out[::_SAMPLED_ROWS])


class Chained(Work):
    """Terms that transform the weight, or whose updates are no thin products: in float64, one after the other."""

    dtype = torch.float64

    def __init__(self, plan: TensorPlan, files: FileSet, device: Device) -> None:
        super().__init__(plan, files, device if device.has_float64 else Device("cpu"))
        try:
            self._chain = Chain(plan.view, plan.terms, self)
        except ValueError as error:
            raise InputError(f"{plan.name}: {error}", tensor=plan.name) from None

    def whole(self, term: TermLike, name: str) -> Tensor:
        """A factor for the chain."""
        return self._load(_stored(term, name))

    def rows(self, term: TermLike, name: str, rows: range) -> Tensor:
        """Rows of a factor for the chain."""
        stored = _stored(term, name)
        with self._files.using(stored.input) as file:
            return self._rows_of(file, stored, rows)

    def _total(self, raw: Tensor, chunk: Chunk, scratch: Tensor) -> Tensor:
        mine, columns = range(chunk.first, chunk.last), chunk.columns

        def base(rows: range) -> Tensor:
            if rows.start >= mine.start and rows.stop <= mine.stop:
                return self._device.upload(raw[rows.start - mine.start : rows.stop - mine.start].double())
            with self._files.using(self.plan.source.input) as file:
                size, stored = self.plan.source_size, self.plan.source
                found = read_padded(file, stored.span[0], stored.dtype, size, columns, rows, self.dtype)
            return self._device.upload(found)

        return self._chain.rows(mine, base)

    def _survival(self, total: Tensor, raw: Tensor, out: Tensor, chunk: Chunk) -> Survival:
        return _lost(total.cpu() - raw.double(), raw, out)


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


def _lost(update: Tensor, raw: Tensor, out: Tensor) -> Survival:
    written = out.double() - raw.to(out.dtype).double()
    return Survival(float(update.square().sum()), float((update - written).square().sum()))


def _stored(term: TermLike, name: str) -> Stored:
    stored = term.factors[name]
    assert isinstance(stored, Stored)
    return stored


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

    def __init__(self, term: Term, work: Sum) -> None:
        self.term, self.work = term, work

    def add(self, total: Tensor, rows: range) -> None:
        part = _overlapping(rows, self.term.rows)
        if part is None:
            return
        wanted, own = part
        region = total[wanted, slice(*self.term.columns)]
        stored = self.work.stored_rows(self.term, own)
        region.copy_(STORED[self.term.algorithm](region, stored, self.term.scale * self.term.weight))
