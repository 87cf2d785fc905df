"""The scales of scaled fp8 tensors as they were written, against the values that were divided by them."""

from __future__ import annotations

import numpy as np

from bake.dtypes import DTYPES, SMALLEST_SCALE
from bake.io.arrays import read_array
from bake.io.tensorfile import TensorFile
from bake.keys.factors import as_matrix
from bake.plan.model import Rescaling, TensorPlan
from bake.verify.rounding import Doubles, spacing


class Scales:
    """The scales of one tensor: one, or one for each row."""

    def __init__(self, tensor: TensorPlan, rescaled: Rescaling, output: TensorFile) -> None:
        self._tensor, self._by_row = tensor, rescaled.by_row
        info = output.tensors[rescaled.name]
        self._written = read_array(output, info.begin, info.dtype, info.shape, np.float64).reshape(-1, 1)
        self._largest = DTYPES[tensor.dtype].largest
        self._rows = 0
        self._due = self._reach = 0.0

    def of(self, block: range) -> Doubles:
        """The scales of some rows, to be broadcast over them."""
        return self._written[block.start : block.stop] if self._by_row else self._written

    def check(self, exact: Doubles, lost: Doubles, block: range) -> str | None:
        """What is wrong with the scales of these rows; None if nothing is, as far as the rows tell."""
        written = self.of(block)
        if not (np.isfinite(written) & (written > 0)).all():
            return f"{self._tensor.name}: its scale is not a positive number"
        due, reach = np.abs(exact).max(axis=1, keepdims=True), lost.max(axis=1, keepdims=True)
        if self._by_row:
            return self._difference(written, due, reach)
        self._rows += len(block)
        self._due, self._reach = max(self._due, float(due.max())), max(self._reach, float(reach.max()))
        return None

    def check_whole(self) -> str | None:
        """The same for the scale of the whole tensor, once every row was seen."""
        if self._by_row or self._rows < as_matrix(self._tensor.view)[0]:
            return None
        due, reach = (np.array([[value]]) for value in (self._due, self._reach))
        return self._difference(self._written, due, reach)

    def _difference(self, written: Doubles, due: Doubles, reach: Doubles) -> str | None:
        due, reach = due / self._largest, reach / self._largest
        wrong = ~(np.abs(written - due) <= reach + spacing(due, "F32")) & (due > SMALLEST_SCALE)
        if not wrong.any():
            return None
        place = int(wrong.argmax())
        return (
            f"{self._tensor.name}: its scale is {float(written[place, 0]):.9g}, should be {float(due[place, 0]):.9g} "
            f"for its largest value"
        )
