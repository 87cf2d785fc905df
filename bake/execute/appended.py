"""Rows that follow those of the base: vectors stored in other inputs, cast to the tensor's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from bake.dtypes import DTYPES
from bake.errors import NonFinite
from bake.io.files import write_at
from bake.io.fileset import FileSet
from bake.io.payload import read_tensor, torch_dtype
from bake.plan.model import Stored, TensorPlan


def write_appended(tensor: TensorPlan, files: FileSet, output: int, data_start: int) -> int:
    """Write the appended vectors of `tensor` behind the rows of its source; return how many bytes.

    output: descriptor of the draft. data_start: byte at which its data section begins.
    Raises NonFinite for vectors that are not finite, or too large for the dtype.
    """
    rows = torch.cat([_cast(stored, tensor, files) for stored in tensor.appended])
    data = rows.reshape(-1).view(torch.uint8).numpy().data
    write_at(output, data, data_start + tensor.span[1] - len(data))
    return len(data)


def _cast(stored: Stored, tensor: TensorPlan, files: FileSet) -> Tensor:
    """The vectors of `stored` as rows of `tensor`, rounded once to its dtype."""
    width = torch.float64 if stored.dtype == "F64" else torch.float32
    with files.using(stored.input) as file:
        values = read_tensor(file, stored.span[0], stored.dtype, stored.as_rows, width)
    target = DTYPES[tensor.dtype]
    if target.bits == 8:  # a cast beyond the largest value saturates on some devices and not on others
        fits = bool(torch.isfinite(values).all())
        values = values.clamp(-target.largest, target.largest)
    else:
        fits = bool((values.abs() < target.overflow).all())
    if not fits:
        raise NonFinite(
            f"{tensor.name}: the embedding {stored.name!r} holds NaN, infinity or more than {tensor.dtype} can store",
            tensor=tensor.name,
        )
    return values.to(torch_dtype(tensor.dtype))
