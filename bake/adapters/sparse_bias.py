"""The remainder that LyCORIS' `extract` keeps beside a LoRA: the few largest elements that the LoRA misses.

Called a bias by LyCORIS, but it belongs to the weight: scale * coo(bias_indices, bias_values, bias_size).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Update:
    """The update of one weight; any rows."""

    def __init__(
        self,
        bias_indices: Tensor,
        bias_values: Tensor,
        bias_size: Tensor,
        *,
        scale: float,
        transposed: bool = False,
    ) -> None:
        """Put the values into the order of their rows.

        bias_indices: (2, count), row and column of each value, int16 in files, any dtype here. bias_values: (count).
        bias_size: (2), out and in * kernel. scale: alpha / rank * weight; LyCORIS writes alpha = rank. transposed:
        the update is for a tensor stored (in, out). Raises ValueError if an index lies outside the size (int16
        wraps beyond 32767). Source: LyCORIS utils/__init__.py, extract_diff.
        """
        height, width = (int(number) for number in bias_size.tolist())
        row, column = bias_indices.long()
        if bool(((row < 0) | (row >= height) | (column < 0) | (column >= width)).any()):
            raise ValueError(f"bias_indices point outside a matrix of bias_size [{height}, {width}]")
        if transposed:
            row, column, height = column, row, width
        self._height = height
        self._row, order = row.sort(stable=True)
        self._column, self._values = column[order], bias_values[order] * scale

    def add_to(self, block: Tensor, rows: range) -> None:
        """Add the rows `rows` of the update to `block`, (len(rows), in * kernel) in the dtype of `bias_values`.

        Raises ValueError if there are no such rows.
        """
        if rows.stop > self._height:
            raise ValueError(f"bias_size has {self._height} rows; row {rows.stop - 1} was asked for")
        edges = torch.tensor([rows.start, rows.stop], device=self._row.device)
        here = slice(*torch.searchsorted(self._row, edges).tolist())
        places = self._row[here] - rows.start, self._column[here]
        block.index_put_(places, self._values[here], accumulate=True)
