"""How many singular values are kept.

kohya's resize_lora.py keeps one more than its criteria ask for, in all three; here the criterion is what counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _fixed(values: Tensor, parameter: float, square: float) -> int:
    return int((values > 0).sum())


def _ratio(values: Tensor, parameter: float, square: float) -> int:
    return int((values > values[0] / parameter).sum())


def _cumulative(values: Tensor, parameter: float, square: float) -> int:
    return _first_to_reach(values, parameter * float(values.sum()))


def _quantile(values: Tensor, parameter: float, square: float) -> int:
    return int((values.cumsum(0) < parameter * values.sum()).sum())


def _frobenius(values: Tensor, parameter: float, square: float) -> int:
    return _first_to_reach(values.square(), parameter * parameter * square)


def _threshold(values: Tensor, parameter: float, square: float) -> int:
    return int((values > parameter).sum())


def _first_to_reach(parts: Tensor, wanted: float) -> int:
    """How many of `parts` it takes for their sum to be `wanted`, as far as float64 can tell."""
    sums = parts.cumsum(0)
    return int((sums < wanted * (1 - 1e-14)).sum()) + 1


# rule -> how many of the falling `values` it keeps; parameter: the rule's; square: |matrix|^2, of all values
_RULES: dict[str, Callable[[Tensor, float, float], int]] = {
    "fixed": _fixed,  #           all that are not zero
    "ratio": _ratio,  #           larger than the largest / parameter; kohya sv_ratio, LyCORIS ratio is 1 / parameter
    "cumulative": _cumulative,  # the fewest that sum up to a share of all; kohya sv_cumulative
    "quantile": _quantile,  #     those whose sum stays below that share; LyCORIS quantile
    "fro": _frobenius,  #         the fewest whose Frobenius norm is a share of the matrix's; kohya sv_fro
    "threshold": _threshold,  #   larger than parameter; LyCORIS threshold
}


def kept(values: Tensor, rule: str, parameter: float, square: float, limit: int) -> int:
    """Return how many of the singular `values` are kept: at least 1, at most `limit`; 0 of a matrix that is zero.

    values: falling, all of them or, for rules that need no more, the largest. square: the sum of the squares of all.
    """
    if not len(values) or values[0] == 0:
        return 0
    nonzero = int((values > 0).sum())
    return max(1, min(_RULES[rule](values.to(torch.float64), parameter, square), limit, nonzero))
