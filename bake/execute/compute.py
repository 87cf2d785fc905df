"""One chunk of one tensor: widen, apply every term, check, round once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor

from bake.adapters.chain import Chain, TermLike
from bake.dtypes import DTYPES
from bake.errors import InputError, NonFinite
from bake.execute.chunk import Chunk
from bake.execute.device import Desk, Device
from bake.execute.rounding import Rounding, has_nonfinite, put, settle_wide, take
from bake.execute.survival import NOTHING, Survival, sampled
from bake.io.fileset import FileSet
from bake.io.payload import read_padded, read_rows, read_tensor, torch_dtype
from bake.keys.factors import as_matrix
from bake.plan.model import Stored, TensorPlan

# Rows of a tensor -> their values in float64, on the device, in memory of their own.
Rows: TypeAlias = Callable[[range], Tensor]


class Work(ABC):
    """What is to be done to one tensor on one device, ready for any chunk of it."""

    has_free_grid = False  # any chunks give the same bytes; else they follow from the tensor's shape alone

    def __init__(
        self, plan: TensorPlan, files: FileSet, device: Device, rounding: Rounding, merged: Rows | None = None
    ) -> None:
        """merged: the base's values, where they are made of several models' and stored nowhere."""
        self.plan = plan
        self.device = device
        self._files = files
        self._rounding = rounding
        self._merged = merged
        self._scale = None if plan.scale is None else self.load(plan.scale, torch.float64).reshape(-1, 1)

    def fuse(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk) -> Survival:
        """Write the finished chunk into `out` and return what survived of the update.

        raw: the base's values, (rows, columns) in the stored dtype, merged ones in float64. out: likewise in the
        output dtype. Both are on the device; the desk is the calling worker's. Raises NonFinite if the result is not
        finite or overflows the output dtype.
        """
        if raw.numel() == 0:
            return NOTHING
        raw = self.opened(raw, range(chunk.first, chunk.last))
        if self.plan.keeps_nonfinite and has_nonfinite(raw):
            return self._fuse_around(raw, out, chunk, desk)
        return self._fuse_finite(raw, out, chunk, desk)

    def _fuse_finite(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk) -> Survival:
        """`fuse` where nothing may be NaN or infinite."""
        survival = self._fuse(raw, out, chunk, desk)
        if has_nonfinite(out):
            survival = self._beyond(raw, out, chunk, desk)
        clamped = self._clamped(raw, out, chunk) if out.element_size() == 1 else 0
        return replace(survival, clamped=clamped) if clamped else survival

    def _fuse_around(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk) -> Survival:
        """`fuse` where the base holds NaN or infinity: these elements stay, if they make no other one so."""
        broken = ~torch.isfinite(self._values(raw, chunk)).reshape(-1)
        kept = ~torch.isfinite(widened(raw)).reshape(-1)
        if bool((broken & ~kept).any()):
            raise NonFinite(
                f"{self.plan.name}: NaN or infinity in the base spreads to other elements: the adapter computes each "
                f"from a whole row or block",
                tensor=self.plan.name,
            )
        places = broken.nonzero().view(-1)
        stored = take(raw, places)
        finite = raw.clone()
        put(finite, places, torch.zeros_like(stored))
        survival = self._fuse_finite(finite, out, chunk, desk)
        cast = stored.to(out.dtype)
        if not torch.equal(cast.to(torch.float64).nan_to_num(), stored.to(torch.float64).nan_to_num()):
            raise NonFinite(
                f"{self.plan.name}: the base holds infinity, which {self.plan.dtype} has no number for",
                tensor=self.plan.name,
            )
        put(out, places, cast)
        return survival

    def opened(self, raw: Tensor, rows: range) -> Tensor:
        """The base's values of these rows of the tensor: `raw`, or what scaled layers mean by it, in float64.

        The product is exact where the scale is no float64.
        """
        if self._scale is None:
            return raw
        scale = self._scale[rows.start : rows.stop] if len(self._scale) > 1 else self._scale
        return widened(raw) * scale

    def base(self, rows: range) -> Tensor:
        """The base's values of any rows of the tensor, in the stored dtype, or float64 as `opened` and merges have."""
        if self._merged is not None:
            return self._merged(rows)
        source, columns = self.plan.source, as_matrix(self.plan.view)[1]
        tag, dtype = source.dtype, torch_dtype(source.dtype)
        with self._files.using(source.input) as file:
            stored = read_padded(file, source.span[0], tag, self.plan.source_size, columns, rows, dtype)
        return self.opened(self.device.upload(stored), rows)

    def interval(self, raw: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """(the new values, float32 bounds on what they are away from the defined ones, in units of SPREAD).

        float32, or float64 and None: then the values are the defined ones. Both may be overwritten.
        """
        return self._values(raw, chunk), None

    def exactly(self, places: Tensor, raw: Tensor, chunk: Chunk) -> Tensor:
        """The defined values (n,), in float64, of the elements at flat `places` of the chunk."""
        return self._values(raw, chunk).reshape(-1)[places]

    def _clamped(self, raw: Tensor, out: Tensor, chunk: Chunk) -> int:
        """How many 8-bit numbers stand for larger ones. Raises NonFinite if one of those is infinite."""
        target = DTYPES[self.plan.dtype]
        if not bool((out.to(torch.float32).abs() == target.largest).any()):
            return 0
        values = self._values(raw, chunk)
        if not bool(torch.isfinite(values).all()):
            self.refuse(raw, chunk)
        return int((values.abs() >= target.overflow).sum())

    @abstractmethod
    def _fuse(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk) -> Survival: ...

    @abstractmethod
    def _values(self, raw: Tensor, chunk: Chunk) -> Tensor:
        """The new values of the chunk in float64, not yet rounded; for finding out what is wrong with them."""

    def _round(self, values: Tensor, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk) -> Survival:
        """Round the float64 `values` of the chunk into `out`."""
        rows = sampled(chunk.first)
        update = values[rows] - raw[rows].to(torch.float64)
        if out.element_size() < 4:
            near, other = desk.computed("near", torch.float32, raw.shape), desk.computed("other", out.dtype, raw.shape)
            settle_wide(values, near, self._rounding, out, other, self._flat(chunk))
        else:
            out.copy_(values)
        return lost(update, raw, out, chunk)

    def _flat(self, chunk: Chunk) -> int:
        """The flat index, in the whole tensor, of a chunk's first element."""
        return chunk.first * chunk.columns

    def _beyond(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk) -> Survival:
        """Called where `out` is not finite: a better result, or NonFinite."""
        self.refuse(raw, chunk)

    def refuse(self, raw: Tensor, chunk: Chunk) -> NoReturn:
        """Raise the NonFinite that says whose fault a result is that the output dtype cannot hold."""
        name, target = self.plan.name, DTYPES[self.plan.dtype]
        if not bool(torch.isfinite(widened(raw)).all()):
            if self._merged is not None:
                raise NonFinite(f"{name}: the result is not finite: the parameters are far too large", tensor=name)
            holder = "the adapter's tensor for it" if self.plan.replaced else "the base"
            can_stay = not (self.plan.replaced or self.plan.keeps_nonfinite)
            advice = ". --allow-nonfinite-base leaves such elements as they are" if can_stay else ""
            raise NonFinite(
                f"{name}: {holder} holds NaN or infinity, so nothing can be made of it{advice}", tensor=name
            )
        values = self._values(raw, chunk)
        if bool(torch.isfinite(values).all()):
            advice = "Lower the weight" if self.plan.terms else "Choose other parameters"
            raise NonFinite(
                f"{name}: the result reaches {float(values.abs().max()):.6g}, {self.plan.dtype} ends at "
                f"{target.largest:g}. {advice}, or write a wider dtype (--dtype bf16 or fp32).",
                tensor=name,
            )
        raise NonFinite(
            f"{name}: the update is not finite: an adapter holds NaN or infinity, or its weight is far too large",
            tensor=name,
        )

    def load(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """A whole factor in `dtype`, on the device."""
        with self._files.using(stored.input) as file:
            return self.device.upload(read_tensor(file, stored.span[0], stored.dtype, stored.shape, dtype))

    def load_rows(self, stored: Stored, rows: range, dtype: torch.dtype) -> Tensor:
        """Contiguous rows of a factor seen as a matrix, likewise."""
        columns = as_matrix(stored.shape)[1]
        with self._files.using(stored.input) as file:
            return self.device.upload(read_rows(file, stored.span[0], stored.dtype, columns, rows, dtype))


class Converted(Work):
    """A tensor without terms that is stored in another dtype, padded with zeros, or an adapter's own."""

    has_free_grid = True

    def _fuse(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk) -> Survival:
        if raw.dtype == out.dtype or out.element_size() >= 4:
            out.copy_(raw)
        elif raw.dtype == torch.float64:
            self._round(raw, raw, out, chunk, desk)
        else:
            near = desk.computed("near", torch.float32, raw.shape)
            near.copy_(raw)
            self._rounding.narrow(near, out, self._flat(chunk))
        return NOTHING

    def _values(self, raw: Tensor, chunk: Chunk) -> Tensor:
        return widened(raw)

    def interval(self, raw: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        if raw.dtype == torch.float64:
            return raw, None
        near = raw.to(torch.float32, copy=True)
        return near, torch.zeros_like(near)

    def exactly(self, places: Tensor, raw: Tensor, chunk: Chunk) -> Tensor:
        return take(raw, places).to(torch.float64)


class Chained(Work):
    """Terms that transform the weight, or whose updates are no thin products: in float64, one after the other."""

    def __init__(
        self, plan: TensorPlan, files: FileSet, device: Device, rounding: Rounding, merged: Rows | None = None
    ) -> None:
        super().__init__(plan, files, device, rounding, merged)
        try:
            self._chain = Chain(plan.view, plan.terms, self)
        except ValueError as error:
            raise InputError(f"{plan.name}: {error}", tensor=plan.name) from None
        except NonFinite as refusal:
            raise NonFinite(f"{plan.name}: {refusal.message}", tensor=plan.name) from None

    def whole(self, term: TermLike, name: str) -> Tensor:
        """A factor for the chain."""
        return self.load(_stored(term, name), torch.float64)

    def rows(self, term: TermLike, name: str, rows: range) -> Tensor:
        """Rows of a factor for the chain."""
        return self.load_rows(_stored(term, name), rows, torch.float64)

    def _values(self, raw: Tensor, chunk: Chunk) -> Tensor:
        mine = range(chunk.first, chunk.last)

        def base(rows: range) -> Tensor:
            if rows.start >= mine.start and rows.stop <= mine.stop:
                return widened(raw[rows.start - mine.start : rows.stop - mine.start])
            return widened(self.base(rows))

        return self._chain.rows(mine, base)

    def _fuse(self, raw: Tensor, out: Tensor, chunk: Chunk, desk: Desk) -> Survival:
        return self._round(self._values(raw, chunk), raw, out, chunk, desk)


def widened(values: Tensor) -> Tensor:
    """`values` in float64, in memory of their own."""
    if values.element_size() < 4:
        values = values.to(torch.float32)  # straight from 16 bits it takes three times as long
    return values.to(torch.float64, copy=True)


def lost(update: Tensor, raw: Tensor, out: Tensor, chunk: Chunk) -> Survival:
    """What is left of an update of the sampled rows of a chunk, given the chunk before and after.

    The base counts as it would be stored without the update: what rounding it loses is not the update's.
    """
    before, after = (values[sampled(chunk.first)] for values in (raw, out))
    if before.dtype != after.dtype:
        before = before.to(after.dtype)
    return survival_of(update, after.to(update.dtype) - before.to(update.dtype))


def survival_of(update: Tensor, written: Tensor) -> Survival:
    """What is left of an update of which `written` was written."""
    lost = float((update - written).square().sum())
    return Survival(float(update.square().sum()), lost, float((update * written).sum()))


def _stored(term: TermLike, name: str) -> Stored:
    stored = term.factors[name]
    assert isinstance(stored, Stored)
    return stored
