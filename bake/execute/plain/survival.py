"""What rounding leaves of an update, by NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.execute.plain.desk import Desk
from bake.execute.plain.rounding import Bits, Floats, narrow, widen
from bake.execute.survival import Survival
from bake.io.arrays import stored_dtype
from bake.plan.model import TensorPlan


def survival_of(plan: TensorPlan, update: NDArray[Any], before: Floats, out: Bits, desk: Desk) -> Survival:
    """What is left of an `update` of some rows, given the values `before`, which are used up, and the bits after."""
    target = plan.dtype
    if plan.source.dtype != target:  # what rounding the base loses is not the update's
        bits = np.empty(before.shape, np.uint16)
        narrow(before, target, bits, desk)
        widen(bits.view(stored_dtype(target)), target, before)
    written = np.empty_like(before)
    widen(np.ascontiguousarray(out).view(stored_dtype(target)), target, written)
    written -= before
    missing = update - written
    return Survival(float(np.vdot(update, update)), float(np.vdot(missing, missing)), float(np.vdot(update, written)))
