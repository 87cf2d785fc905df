"""The elements of one tensor in every model that is merged, in float64, by NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bake.execute.merging.maths import is_narrow, pieces, refusal_of_model
from bake.execute.plain.desk import Desk
from bake.execute.plain.rounding import TooLarge, widen_all
from bake.io.arrays import as_bytes, read_array, stored_dtype
from bake.io.fileset import FileSet
from bake.keys.factors import as_matrix
from bake.plan.model import Plan, Share, Stored, TensorPlan

Doubles = NDArray[np.float64]


class ArrayReader:
    """Reads runs of elements of one tensor from every model. NaN and infinity are the caller's affair."""

    def __init__(self, plan: Plan, tensor: TensorPlan, files: FileSet, forgets: bool) -> None:
        """forgets: what was read shall not stay in memory."""
        assert tensor.merge is not None
        self._plan, self._tensor, self._step, self._files = plan, tensor, tensor.merge, files
        self._forgets = forgets

    def elements(self, begin: int, end: int, desk: Desk) -> list[Doubles]:
        """The elements [begin, end) of every model: (1, end - begin) each, until the next ones are read."""
        return [self._elements(number, begin, end, desk) for number in range(len(self._step.shares))]

    def _elements(self, number: int, begin: int, end: int, desk: Desk) -> Doubles:
        share, found = self._step.shares[number], desk.array(f"model {number}", np.float64, (1, end - begin))
        if self._is_whole(share):
            np.copyto(found[0], self._whole(share).reshape(-1)[begin:end])
        else:
            for stored, first, place in pieces(share, begin, end):
                self._read(stored, first, found[0, place], desk)
        return found

    def _is_whole(self, share: Share) -> bool:
        """True if it can only be read as a whole."""
        return share.transposed or is_narrow(share, self._tensor.source.shape)

    def _whole(self, share: Share) -> Doubles:
        """A whole tensor that is stored the other way round, or whose rows go on with the first model's.

        Both kinds are small, see `bake.execute.merging.reader`.
        """
        found = np.concatenate([self._loaded(stored) for stored in share.stored])
        if share.transposed:
            return found.T
        if is_narrow(share, self._tensor.source.shape):
            first = self._step.shares[self._step.models.index(0)]
            wide = self._whole(first).reshape(as_matrix(self._tensor.source.shape)).copy()
            wide[:, : as_matrix(share.stored[0].shape)[1]] = found.reshape(len(wide), -1)
            return wide
        return found

    def _loaded(self, stored: Stored) -> Doubles:
        with self._files.using(stored.input) as file:
            return read_array(file, stored.span[0], stored.dtype, stored.shape, np.float64)

    def _read(self, stored: Stored, first: int, out: Doubles, desk: Desk) -> None:
        """Fill `out` with elements of one stored tensor, from its element `first` on."""
        raw = desk.array("stored", stored_dtype(stored.dtype), out.shape)
        data = as_bytes(raw)
        begin = stored.span[0] + first * raw.itemsize
        with self._files.using(stored.input) as file:
            file.read_into(begin, data)
            if self._forgets:
                file.forget(begin, begin + len(data))
        try:
            widen_all(raw, stored.dtype, out, desk)
        except TooLarge:  # some halves are not finite
            np.copyto(out, raw)

    def check(self, models: Sequence[Doubles], begin: int, end: int) -> None:
        """Raise NonFinite if one of the `models`, as read for these elements, holds NaN or infinity."""
        for number, share in enumerate(self._step.shares):
            if self._is_whole(share):
                found = [stored for stored in share.stored if not np.isfinite(self._loaded(stored)).all()]
            else:
                parts = pieces(share, begin, end)
                found = [part.stored for part in parts if not np.isfinite(models[number][0, part.place]).all()]
            if found:
                raise refusal_of_model(self._plan, found[0])
