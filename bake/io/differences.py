"""Differences between stored tensors, in a form that compresses well. Exact, whatever the bits mean.

Words are subtracted as integers that wrap around, and signs folded into the lowest bit, so that numbers that moved by
a few units in the last place, up or down, leave small words. Their bytes are sorted by significance: the upper ones
are nearly all zero, and the lower ones, which hardly compress, do not lie between them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def difference(stored: bytes, like: bytes, width: int) -> bytes:
    """What `restored` makes `stored` of, beside `like`: as many bytes.

    width: bytes of a word, 1, 2, 4 or 8, of which both hold the same whole number.
    """
    words = (_words(stored, width) - _words(like, width)).view(f"<i{width}")
    folded: NDArray[Any] = (words << 1) ^ (words >> (8 * width - 1))
    planes: NDArray[np.uint8] = folded.view(np.uint8).reshape(-1, width).T
    return planes.tobytes()


def restored(found: bytes, like: bytes, width: int) -> bytes:
    """The inverse of `difference`: what was stored."""
    folded = np.ascontiguousarray(np.frombuffer(found, np.uint8).reshape(width, -1).T).reshape(-1).view(f"<u{width}")
    words = ((folded >> 1) ^ (0 - (folded & 1))) + _words(like, width)
    return bytes(words)


def _words(data: bytes, width: int) -> NDArray[Any]:
    return np.frombuffer(data, f"<u{width}")
