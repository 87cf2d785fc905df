"""Lists of block values by name, as web UIs know them.

Source of the 26 values for merging: meh sd_meh/presets.py and supermerger scripts/mbwpresets.txt, which agree;
what they list with ten or fifteen digits is computed here from the curve it was taken from. Source of the 17
and 61 values for LoRAs: sd-webui-lora-block-weight scripts/lora_block_weight.py DEF_WEIGHT_PRESET and ELEMPRESETS.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Values = tuple[float, ...]

_STEPS = 24  # from IN00 to OUT11


def _curve(value: Callable[[float], float]) -> Values:
    """BASE 0, then `value` of 0 for IN00 to 1 for OUT11."""
    return (0.0, *(value(step / _STEPS) for step in range(_STEPS + 1)))


def _opposite(values: Values) -> Values:
    """1 minus every value, with BASE 0."""
    return (0.0, *(1 - value for value in values[1:]))


def _runs(*runs: tuple[float, int]) -> Values:
    """Values that repeat: (value, how often)."""
    return tuple(float(value) for value, count in runs for _ in range(count))


def _smoothstep(u: float) -> float:
    return 3 * u**2 - 2 * u**3


def _folded(u: float) -> float:
    """`u` reflected at 0 and 1: up, down, up."""
    return 1 - abs(u % 2 - 1)


def _fake_hermite(u: float) -> float:
    return (38 * u**3 - 57 * u**2 + 25 * u) / 6


def _true_hermite(u: float) -> float:
    return _fake_hermite(u) + (1 - u) ** 2 * (1 + 2 * u) / 24 if u > 0 else 0.0


def _times(count: int) -> Values:
    return _curve(lambda u: _folded(count * _smoothstep(u)))


def _within(part: int) -> Values:
    return _curve(lambda u: _smoothstep(_folded(part * u)))


_GRAD_A = _curve(lambda u: 1 - abs(2 * u - 1))
_SMOOTHSTEP = _curve(_smoothstep)
_COSINE = _curve(lambda u: (1 + math.cos(math.pi * u)) / 2)
_TRUE, _FAKE = _curve(_true_hermite), _curve(_fake_hermite)

PRESETS: dict[str, Values] = {
    # merging, 26 values: BASE, IN00 to IN11, M00, OUT00 to OUT11
    "GRAD_V": _opposite(_GRAD_A),
    "GRAD_A": _GRAD_A,
    "FLAT_25": _runs((0, 1), (0.25, 25)),
    "FLAT_75": _runs((0, 1), (0.75, 25)),
    "WRAP08": _runs((0, 1), (1, 4), (0, 17), (1, 4)),
    "WRAP12": _runs((0, 1), (1, 6), (0, 13), (1, 6)),
    "WRAP14": _runs((0, 1), (1, 7), (0, 11), (1, 7)),
    "WRAP16": _runs((0, 1), (1, 8), (0, 9), (1, 8)),
    "MID12_50": _runs((0, 6), (0.5, 14), (0, 6)),
    "OUT07": _runs((0, 19), (1, 7)),
    "OUT12": _runs((0, 14), (1, 12)),
    "OUT12_5": _runs((0, 13), (0.5, 1), (1, 12)),
    "RING08_SOFT": _runs((0, 6), (0.5, 1), (1, 3), (0.5, 1), (0, 5), (0.5, 1), (1, 3), (0.5, 1), (0, 5)),
    "RING08_5": _runs((0, 7), (1, 4), (0, 5), (1, 4), (0, 6)),
    "RING10_5": _runs((0, 6), (1, 5), (0, 5), (1, 5), (0, 5)),
    "RING10_3": _runs((0, 7), (1, 5), (0, 3), (1, 5), (0, 6)),
    "SMOOTHSTEP": _SMOOTHSTEP,
    "REVERSE_SMOOTHSTEP": _opposite(_SMOOTHSTEP),
    "2SMOOTHSTEP": _times(2),
    "2R_SMOOTHSTEP": _opposite(_times(2)),
    "3SMOOTHSTEP": _times(3),
    "3R_SMOOTHSTEP": _opposite(_times(3)),
    "4SMOOTHSTEP": _times(4),
    "4R_SMOOTHSTEP": _opposite(_times(4)),
    "HALF_SMOOTHSTEP": _within(2),
    "HALF_R_SMOOTHSTEP": _opposite(_within(2)),
    "ONE_THIRD_SMOOTHSTEP": _within(3),
    "ONE_THIRD_R_SMOOTHSTEP": _opposite(_within(3)),
    "ONE_FOURTH_SMOOTHSTEP": _within(4),
    "ONE_FOURTH_R_SMOOTHSTEP": _opposite(_within(4)),
    "COSINE": _COSINE,
    "REVERSE_COSINE": _opposite(_COSINE),
    "TRUE_CUBIC_HERMITE": _TRUE,
    "TRUE_REVERSE_CUBIC_HERMITE": _opposite(_TRUE),
    "FAKE_CUBIC_HERMITE": _FAKE,
    "FAKE_REVERSE_CUBIC_HERMITE": _opposite(_FAKE),
    "ALL_A": _runs((0, 26)),
    "ALL_B": _runs((1, 26)),
    # LoRAs for SD1, 17 values: BASE, the six of IN01 to IN08 that have attention, M00, OUT03 to OUT11
    "NONE": _runs((0, 17)),
    "ALL": _runs((1, 17)),
    "ALL0.5": _runs((0.5, 17)),
    "INS": _runs((1, 4), (0, 13)),
    "IND": _runs((1, 1), (0, 3), (1, 3), (0, 10)),
    "INALL": _runs((1, 7), (0, 10)),
    "MIDD": _runs((1, 1), (0, 3), (1, 8), (0, 5)),
    "OUTD": _runs((1, 1), (0, 7), (1, 4), (0, 5)),
    "OUTS": _runs((1, 1), (0, 11), (1, 5)),
    "OUTALL": _runs((1, 1), (0, 7), (1, 9)),
    # LoRAs for Flux, 61 values
    "FLUXALL": _runs((1, 61)),
}

_PARTS = {2: "HALF", 3: "ONE_THIRD", 4: "ONE_FOURTH"}
# supermerger's spelling -> meh's
ALIASES = {
    "REVERSE-SMOOTHSTEP": "REVERSE_SMOOTHSTEP",
    **{f"SMOOTHSTEP*{count}": f"{count}SMOOTHSTEP" for count in _PARTS},
    **{f"R_SMOOTHSTEP*{count}": f"{count}R_SMOOTHSTEP" for count in _PARTS},
    **{f"SMOOTHSTEP/{part}": f"{word}_SMOOTHSTEP" for part, word in _PARTS.items()},
    **{f"R_SMOOTHSTEP/{part}": f"{word}_R_SMOOTHSTEP" for part, word in _PARTS.items()},
}

# Elemental rules by name.
RULES = {
    "ATTNDEEPON": "IN05-OUT05:attn:1",
    "ATTNDEEPOFF": "IN05-OUT05:attn:0",
    "PROJDEEPOFF": "IN05-OUT05:proj:0",
}
