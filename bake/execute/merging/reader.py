"""The rows of one tensor in every model that is merged, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from bake.execute.device import Desk, Device
from bake.execute.merging.maths import is_narrow, pieces, refusal_of_model
from bake.execute.rounding import has_nonfinite
from bake.io.fileset import FileSet
from bake.io.payload import as_bytes, read_tensor
from bake.keys.factors import as_matrix
from bake.merges.merge import Chunk
from bake.plan.model import Plan, Share, Stored, TensorPlan


class Reader:
    """Reads chunks of one tensor from every model."""

    def __init__(
        self, plan: Plan, tensor: TensorPlan, files: FileSet, columns: int, device: Device, forgets: bool
    ) -> None:
        """columns: of the matrix that chunks are rows of. forgets: what was read shall not stay in memory."""
        assert tensor.merge is not None
        self._plan, self._tensor, self._step, self._files = plan, tensor, tensor.merge, files
        self._columns, self._device, self._forgets = columns, device, forgets

    def chunk(self, first: int, last: int, desk: Desk) -> Chunk:
        """Rows [first, last) of every model; raises NonFinite if a model holds NaN or infinity there."""
        models: list[Tensor] = []
        for number, share in enumerate(self._step.shares):
            found = desk.computed(f"model {number}", torch.float64, (last - first, self._columns))
            if share.transposed or is_narrow(share, self._tensor.source.shape):
                places = slice(first * self._columns, last * self._columns)
                found.view(-1).copy_(self._whole(number).reshape(-1)[places])
            else:
                self._read(share, first * self._columns, found, desk)
            models.append(found)
        return Chunk(first, models)

    def _whole(self, number: int) -> Tensor:
        """A whole tensor that is stored the other way round, or whose rows go on with the first model's.

        The former are square projections of text encoders, the latter first layers of UNets: both are small.
        """
        share = self._step.shares[number]
        parts = [self._loaded(stored) for stored in share.stored]
        found = torch.cat(parts)
        if share.transposed:
            return found.t()
        if is_narrow(share, self._tensor.source.shape):
            wide = self._whole(self._step.models.index(0)).reshape(as_matrix(self._tensor.source.shape)).clone()
            wide[:, : as_matrix(share.stored[0].shape)[1]] = found.reshape(len(wide), -1)
            return wide
        return found

    def _loaded(self, stored: Stored) -> Tensor:
        with self._files.using(stored.input) as file:
            found = read_tensor(file, stored.span[0], stored.dtype, stored.shape, torch.float64)
        if has_nonfinite(found):
            raise refusal_of_model(self._plan, stored)
        return self._device.upload(found)

    def _read(self, share: Share, begin: int, out: Tensor, desk: Desk) -> None:
        """Fill `out` with the model's elements from flat index `begin` on, which may lie in several stored tensors."""
        flat = out.view(-1)
        for stored, first, place in pieces(share, begin, begin + len(flat)):
            self._read_part(stored, first, flat[place], desk)

    def _read_part(self, stored: Stored, first: int, out: Tensor, desk: Desk) -> None:
        """Fill `out` with elements of one stored tensor, from its element `first` on."""
        raw = desk.on_host("stored", stored.dtype, tuple(out.shape))
        data = as_bytes(raw)
        begin = stored.span[0] + first * raw.element_size()
        with self._files.using(stored.input) as file:
            file.read_into(begin, data)
            if self._forgets:
                file.forget(begin, begin + len(data))
        if has_nonfinite(raw):
            raise refusal_of_model(self._plan, stored)
        self._widen(raw, out, desk)

    def _widen(self, raw: Tensor, out: Tensor, desk: Desk) -> None:
        if not self._device.is_cpu:
            out.copy_(raw)
            self._device.wait()  # the buffer is filled anew for the next model
        elif raw.element_size() < 4:  # straight from 16 bits it takes three times as long
            near = desk.computed("near", torch.float32, tuple(out.shape))
            out.copy_(near.copy_(raw))
        else:
            out.copy_(raw)
