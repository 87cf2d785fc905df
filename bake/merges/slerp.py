"""Slerp: from A to B along the arc between their directions.

By the angle t between the flattened tensors, sin((1 - alpha) t) / sin t of A and sin(alpha t) / sin t of B. `raw`
takes these of A and B as they are (mergekit merge_methods/slerp.py); `interpolate` of their directions, times the
interpolated length (sd-mecha merge_methods/linear.py). mergekit goes straight from cosines of 0.9995 on, where the arc
differs from the straight line by 1e-4; here only where there is no arc: parallel or opposite tensors, or zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bake.merges.combination import Combination, Matrix

_SMALLEST_SINE = 1e-8


class Slerp(Combination):
    """A and B on an arc. Models: a, b. alpha: any number. norms: raw or interpolate."""

    def shares(self, inner: Matrix) -> Sequence[float]:
        alpha = self.job.number("alpha")
        found = arc(inner[0][0], inner[0][1], inner[1][1], alpha)
        if found is None:
            return 1 - alpha, alpha
        of_a, of_b = found
        if self.job.values["norms"] == "raw":
            return of_a, of_b
        a, b = math.sqrt(inner[0][0]), math.sqrt(inner[1][1])
        length = a + (b - a) * alpha
        return of_a * length / a, of_b * length / b


def arc(aa: float, ab: float, bb: float, share: float) -> tuple[float, float] | None:
    """The coefficients of two vectors at `share` of the way between them; None where there is no arc.

    aa, ab, bb: their inner products.
    """
    size = math.sqrt(aa) * math.sqrt(bb)
    cosine = max(-1.0, min(1.0, ab / size)) if size else 1.0
    sine = math.sqrt((1 - cosine) * (1 + cosine))
    if sine < _SMALLEST_SINE:
        return None
    angle = math.atan2(sine, cosine)
    return math.sin((1 - share) * angle) / sine, math.sin(share * angle) / sine
