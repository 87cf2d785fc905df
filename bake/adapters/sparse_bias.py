"""The remainder that LyCORIS' `extract` keeps beside a LoRA: the few largest elements that the LoRA misses.

Called a bias by LyCORIS, but it belongs to the weight: scale * coo(bias_indices, bias_values, bias_size).
"""

from __future__ import annotations

from torch import Tensor


def delta(bias_indices: Tensor, bias_values: Tensor, bias_size: Tensor, *, rows: range, scale: float) -> Tensor:
    """Return the rows `rows` of the update, dense, as (len(rows), in * kernel), in the dtype of `bias_values`.

    bias_indices: (2, count), row and column of each value, int16 in files, any dtype here. bias_values: (count).
    bias_size: (2), out and in * kernel. scale: alpha / rank * weight; LyCORIS writes alpha = rank. Raises
    ValueError if an index lies outside the size (int16 wraps beyond 32767) or `rows` do.
    Source: LyCORIS utils/__init__.py, extract_diff.
    """
    out, columns = (int(number) for number in bias_size.tolist())
    row, column = bias_indices.long()
    if bool(((row < 0) | (row >= out) | (column < 0) | (column >= columns)).any()):
        raise ValueError(f"bias_indices point outside a matrix of bias_size [{out}, {columns}]")
    if len(rows) and rows[-1] >= out:
        raise ValueError(f"bias_size has {out} rows; row {rows[-1]} was asked for")
    place = row - rows.start
    here = (row >= rows.start) & (row < rows.stop) & (place % rows.step == 0)
    update = bias_values.new_zeros((len(rows), columns))
    return update.index_put_((place[here] // rows.step, column[here]), bias_values[here] * scale, accumulate=True)
