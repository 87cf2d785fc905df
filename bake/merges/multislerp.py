"""Multi-slerp: the weighted mean of the models' directions, at the weighted mean of their lengths.

mergekit (merge_methods/multislerp.py) goes on from that mean direction by the weighted mean of what the directions are
beside it. With the same weights that mean is zero, for any models and weights, so nothing is left of that step but
its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bake.merges.combination import Combination, Matrix, cosines, dot, lengths, times
from bake.merges.linear import added_up

_SMALLEST_MEAN = 1e-8


class MultiSlerp(Combination):
    """m / |m| * sum(w |W|), m = sum(w W / |W|). Models: [base], two or more. weight: any numbers.

    Where m is zero: of two models the weighted sum, of more it is undefined, a ValueError.
    """

    def shares(self, inner: Matrix) -> Sequence[float]:
        weights = self.job.numbers("weight")
        if self.job.values["normalize"]:
            weights = tuple(weight / added_up(weights) for weight in weights)
        sizes = lengths(inner)
        mean = math.sqrt(max(0.0, dot(weights, times(cosines(inner), weights))))
        if mean < _SMALLEST_MEAN:
            if len(weights) == 2 or not any(sizes):
                return weights
            raise ValueError("the weighted directions of the models cancel out; other weights give them a mean")
        length = dot(weights, sizes)
        return [weight * length / mean / size if size else 0.0 for weight, size in zip(weights, sizes, strict=True)]
