"""Where an update lands: a tensor of the base, or some of its rows or columns."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """One tensor, or a part of one, that a parameter of a module is."""

    tensor: str  # full name in the base
    rows: tuple[int, int] | None = None  # [first, past the last) row of a fused tensor; None: all
    transposed: bool = False  # the base stores (in, out)
    # the rows of the update that go here, in the base's orientation and counted through a stack; None: all of them
    part: tuple[int, int] | None = None
    stacked: bool = False  # the tensor is a stack of matrices [E, height, width]; rows count through the stack
    turn: int = 0  # the update starts at this row of the tensor and, past the last, goes on at the first


# "weight" and "bias" of one module. Usually one place each; several where the adapter's module is
# spread over tensors of the base (fused q, k, v), or lies in it in another order (swapped halves).
Parameters = dict[str, tuple[Place, ...]]


def turned_whole(places: tuple[Place, ...]) -> Place | None:
    """The whole tensor whose two halves `places` swap, as one place; None if they are anything else."""
    if len(places) != 2 or places[0].tensor != places[1].tensor:
        return None
    one, two = places
    if one.rows is None or two.rows is None or one.rows != two.part or two.rows != one.part:
        return None
    return Place(one.tensor, turn=max(one.rows[0], two.rows[0]))


SCALE = ".scale"  # what original layouts call the only parameter of an RMSNorm; everyone else: weight


def split_parameter(name: str) -> tuple[str, str]:
    """(module path, parameter) of a tensor name; a bare parameter is a module with only a weight."""
    for parameter in ("weight", "bias"):
        if name.endswith("." + parameter):
            return name[: -len(parameter) - 1], parameter
    return name.removesuffix(SCALE), "weight"
