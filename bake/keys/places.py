"""Where an update lands: a tensor of the base, or some of its rows."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """The part of a base tensor that one parameter of a module is."""

    tensor: str  # full name in the base
    rows: tuple[int, int] | None = None  # [first, past the last) row of a fused tensor; None: all
    transposed: bool = False  # the base stores (in, out)


Parameters = dict[str, Place]  # "weight" and "bias" of one module


def split_parameter(name: str) -> tuple[str, str]:
    """(module path, parameter) of a tensor name; a bare parameter is a module with only a weight."""
    for parameter in ("weight", "bias"):
        if name.endswith("." + parameter):
            return name[: -len(parameter) - 1], parameter
    return name, "weight"
