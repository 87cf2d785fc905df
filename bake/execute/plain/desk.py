"""The buffers of one worker."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Desk:
    """Arrays by name. They grow to the largest that was asked for and are used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}
        self._arrays: dict[tuple[str, DTypeLike, tuple[int, ...]], NDArray[Any]] = {}

    def array(self, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
        """The buffer `name` as an array; it holds what was last done with it."""
        key = (name, dtype, shape)
        found = self._arrays.get(key)
        if found is None:
            kind = np.dtype(dtype)
            count = math.prod(shape) * kind.itemsize
            if name not in self._buffers or len(self._buffers[name]) < count:
                self._buffers[name] = np.empty(count, np.uint8)
                self._arrays = {other: array for other, array in self._arrays.items() if other[0] != name}
            found = self._arrays[key] = self._buffers[name][:count].view(kind).reshape(shape)
        return found
