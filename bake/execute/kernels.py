"""The loops in C, where they were built: see setup.py. Without them NumPy does the same, in several times as long."""

from __future__ import annotations

import importlib
import os
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Loops(Protocol):
    """What bake/execute/_kernels.c offers. Arrays lie side by side in memory; dtypes have the names of safetensors."""

    def widen(self, stored: NDArray[Any], tag: str, out: NDArray[Any], /) -> bool:
        """Set float32 or float64 `out` to stored numbers; False if some half is not finite."""

    def narrow(self, values: NDArray[Any], tag: str, out: NDArray[np.uint16], /) -> bool:
        """Round float32 or float64 `values` once; False if some result is not finite."""

    def settle(
        self,
        stored: NDArray[Any],
        source: str,
        update: NDArray[np.float32],
        tall: NDArray[np.float32] | None,
        wide: NDArray[np.float32],
        target: str,
        out: NDArray[np.uint16],
        places: NDArray[np.intp],
        /,
    ) -> int:
        """Round stored + update; how many `places` are open, or -1 if a number may be too large.

        The bound of an element is its row's `tall` times its column's `wide`, or, without `tall`, its own in `wide`.
        """

    def add_products(
        self,
        places: NDArray[np.intp],
        columns: int,
        left: NDArray[np.float64],
        right: NDArray[np.float32],
        tall: NDArray[np.float32],
        wide: NDArray[np.float32],
        rank: int,
        first: tuple[int, int],
        totals: NDArray[np.float64],
        norms: NDArray[np.float64] | None,
        /,
    ) -> None:
        """Add sums of products to the totals of flat places in rows of so many columns: as docs/numerics.md has them.

        left: (rows, rank), right: (columns, rank), tall and wide: their norms, first: row and column that their
        first ones are for. With `norms`: in any order, and the products of the norms are added to those.
        """

    def finish(
        self,
        stored: NDArray[Any],
        source: str,
        places: NDArray[np.intp],
        totals: NDArray[np.float64],
        norms: NDArray[np.float64] | None,
        share: float,
        target: str,
        out: NDArray[np.uint16],
        /,
    ) -> int:
        """Write stored + total, rounded once, at each place; -1 if some result is not finite.

        With `norms` a total may be `share` of its norm away: how many places that leaves open, which are moved to
        the front of `places`.
        """


class Products(Protocol):
    """What bake/execute/_products.c offers, likewise."""

    DEPTH: int
    """Products that are added up before they are added to the others."""
    WIDTH: int
    """Columns of a tile: the right factor comes tile by tile, (tiles, rank, WIDTH), with zeros at the end."""

    def fuse(
        self,
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        stored: NDArray[Any],
        source: str,
        tall: NDArray[np.float32],
        wide: NDArray[np.float32],
        target: str,
        out: NDArray[np.uint16],
        places: NDArray[np.intp],
        samples: NDArray[np.float32],
        sample: int,
        step: int,
        /,
    ) -> int:
        """Round stored + left @ right; how many `places` are open, or -1 if a number may be too large.

        tall, wide: as for `Loops.settle`. samples: set to the update of row `sample` and every `step`-th after it.
        """


def _found(name: str) -> Any:
    if os.environ.get("BAKE_KERNELS") == "numpy":  # for comparing the two
        return None
    try:
        return importlib.import_module(f"bake.execute.{name}")
    except ImportError:
        return None


compiled: Loops | None = _found("_kernels")
products: Products | None = _found("_products")  # not for every compiler that makes the others
