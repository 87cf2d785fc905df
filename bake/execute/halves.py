"""The order in which docs/numerics.md has products added up."""

from __future__ import annotations

from typing import Any


def sum_by_halves(values: Any) -> Any:
    """The sum of each row of `values` (n, rank), float64, a NumPy array or a tensor of torch; uses `values` up.

    Padded with zeros to a power of two the second half is added to the first, until one column is left.
    """
    count = values.shape[1]
    while count > 1:
        half = 1 << (count - 1).bit_length() - 1
        values[:, : count - half] += values[:, half:count]
        count = half
    return values[:, 0] if values.shape[1] else values.sum(1)
