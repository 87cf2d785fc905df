"""What every run of a merge goes by, whatever it computes with: the maths, the stored elements, the refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from bake.dtypes import DTYPES
from bake.errors import NonFinite
from bake.keys.factors import as_matrix
from bake.merges import METHODS
from bake.merges.merge import Job, Merge
from bake.plan.model import Plan, Share, Stored, TensorPlan


def merge_of(plan: Plan, tensor: TensorPlan) -> Merge:
    """The maths of one tensor. It brings torch, unless `Merge.is_plain`."""
    step = tensor.merge
    assert step is not None
    job = Job(step.name, tensor.source.shape, step.roles, step.parameters, plan.seed)
    return METHODS[step.method].load()(job)


def is_narrow(share: Share, shape: tuple[int, ...]) -> bool:
    """True if a model's rows are shorter than those of the output, a tensor of this shape."""
    return as_matrix(share.stored[0].shape)[1] < as_matrix(shape)[1]


class Piece(NamedTuple):
    """Neighbouring elements of one stored tensor."""

    stored: Stored
    first: int  # of its elements
    place: slice  # of the elements that were asked for


def pieces(share: Share, begin: int, end: int) -> Iterator[Piece]:
    """What the elements [begin, end) of a model consist of: it may have them in several tensors, one by one."""
    at = 0  # flat index of the first element of `stored`
    for stored in share.stored:
        count = math.prod(stored.shape)
        low, high = max(begin, at), min(end, at + count)
        if low < high:
            yield Piece(stored, low - at, slice(low - begin, high - begin))
        at += count


def refusal_of_model(plan: Plan, stored: Stored) -> NonFinite:
    """What is said of a stored tensor that is not finite."""
    model = plan.owner_of(stored.input).name
    return NonFinite(
        f"{stored.name}: {model} holds NaN or infinity, which cannot be merged: repair that model, or leave its "
        f"component out (--only).",
        tensor=stored.name,
        model=model,
    )


def refusal_of_result(tensor: TensorPlan, largest: float) -> NonFinite:
    """What is said of results that cannot be stored; largest: of their magnitudes, NaN or infinite if one is."""
    name, target = tensor.name, DTYPES[tensor.dtype]
    if math.isfinite(largest):
        return NonFinite(
            f"{name}: the result reaches {largest:.6g}, {tensor.dtype} ends at {target.largest:g}. Choose other "
            f"parameters, or write a wider dtype (--dtype bf16 or fp32).",
            tensor=name,
        )
    return NonFinite(f"{name}: the result is not finite: the parameters are far too large", tensor=name)
