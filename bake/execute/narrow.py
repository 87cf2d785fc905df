"""Rounding once. torch rounds float64 to a 16- or 8-bit dtype by way of float32, which is twice."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` rounded once to `dtype`, to nearest, ties to even.

    float64 on its way to less than float32 is first rounded to odd: a float32 that is inexact gets an odd
    last bit, so that it lies on no tie of the narrower dtype and on the right side of it.
    Source: Boldo and Melquiond, Emulation of a FMA and correctly rounded sums, 2008, theorem 1.
    """
    if values.dtype != torch.float64 or dtype.itemsize >= 4:
        return values.to(dtype)
    if dtype == torch.float16 and values.is_cpu:  # NumPy does it in one step; a few values take a hundredth of the time
        with np.errstate(over="ignore"):
            return torch.from_numpy(values.numpy().astype(np.float16))
    nearest = values.to(torch.float32)
    exact = nearest.to(torch.float64)
    bits = nearest.view(torch.int32)
    bits = torch.where(exact.abs() > values.abs(), bits - 1, bits)  # towards zero
    bits = torch.where((exact != values) & values.isfinite(), bits | 1, bits)
    return bits.view(torch.float32).to(dtype)
