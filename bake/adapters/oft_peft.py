"""OFT of PEFT and OneTrainer: blocks of input columns are rotated.

Q: skew-symmetric, filled row by row above its diagonal from the stored numbers
R = (I - Q)(I + Q)^-1 exactly, or the first terms of its series: I + 2Q + 2Q^2 + ... + Q^k
W' = W blockdiag(R_s)^T,  R_s = s R + (1 - s) I

A convolution's columns are in * kernel, in the order of storage. The bias is not concerned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bake.adapters.rotations import cayley, multiply_columns, towards

_TERMS = 5  # of the series, where nobody says otherwise; OneTrainer always takes as many


class Transform:
    """OFT on input columns. Source: PEFT tuners/oft/layer.py, OneTrainer modules/module/oft_utils.py."""

    block: int = 1

    def __init__(
        self,
        oft_r: Tensor,
        scaled_oft: Tensor | None = None,
        *,
        shape: tuple[int, ...],
        strength: float,
        neumann_terms: int | None = _TERMS,
        transposed: bool = True,
        limit: float | None = None,
    ) -> None:
        """Prepare the rotations, in the dtype of `oft_r`.

        oft_r: (n, b(b-1)/2), n * b = in * kernel; one row may stand for every block. scaled_oft: a mark
        of OneTrainer's: Q is divided by 2 sqrt(b - 1). shape: of the weight tensor. strength: what the
        user typed. neumann_terms: length of the series (PEFT's num_cayley_neumann_terms); None: the
        exact rotation. transposed: W R^T; False: W R, as OneTrainer does on convolutions of any kernel.
        limit: of the Frobenius norms of all Q together (PEFT's eps under coft), shared out evenly among the
        stored blocks; a longer Q is shortened. None: no limit.
        Raises ValueError if the blocks do not make up the columns.
        """
        if oft_r.dim() != 2:
            raise ValueError(f"oft_r {list(oft_r.shape)} is no list of blocks")
        count, numbers = oft_r.shape
        size = (1 + math.isqrt(1 + 8 * numbers)) // 2
        columns = math.prod(shape[1:])
        if size * (size - 1) // 2 != numbers:
            raise ValueError(f"oft_r {list(oft_r.shape)}: {numbers} numbers fill no triangle")
        if columns != count * size and (count != 1 or columns % size):
            raise ValueError(f"{count} blocks of {size} columns do not make up the {columns} columns of the weight")
        if scaled_oft is not None:
            oft_r = oft_r / (2 * math.sqrt(size - 1))
        skewed = _skew(oft_r, size)
        if limit is not None:
            skewed = _shortened(skewed, limit / math.sqrt(count))
        rotation = towards(_rotation(skewed, neumann_terms), strength)
        self._strength = strength
        self._blocks = rotation.transpose(1, 2) if transposed else rotation

    def apply(self, weight: Tensor, rows: range) -> None:
        """Overwrite the rows `rows` of the weight, (len(rows), in * kernel), with their new values."""
        if self._strength != 0:
            weight.copy_(multiply_columns(weight, self._blocks))


def _skew(numbers: Tensor, size: int) -> Tensor:
    """(n, b, b) with the numbers above the diagonal, row by row, and their negatives below."""
    above = torch.triu_indices(size, size, 1, device=numbers.device)
    filled = numbers.new_zeros(len(numbers), size, size)
    filled[:, above[0], above[1]] = numbers
    return filled - filled.transpose(1, 2)


def _shortened(skewed: Tensor, longest: float) -> Tensor:
    """Blocks of norm `longest` in place of longer ones. Source: PEFT OFTRotationModule._project_batch."""
    norms = torch.linalg.matrix_norm(skewed, keepdim=True)
    return torch.where(norms <= longest, skewed, skewed * (longest / norms))


def _rotation(skewed: Tensor, terms: int | None) -> Tensor:
    """(I - Q)(I + Q)^-1, or PEFT's series for the same with Q of the other sign; 3 terms give what 4 give."""
    if terms is None:
        return cayley(-skewed)
    total = torch.eye(skewed.shape[-1], dtype=skewed.dtype, device=skewed.device).expand_as(skewed)
    if terms < 2:
        return total
    total = total + 2 * skewed
    if terms == 2:
        return total
    power = skewed
    for _ in range(2, max(3, terms - 1)):
        power = power @ skewed
        total = total + 2 * power
    return total + power @ skewed
