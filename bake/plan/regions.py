"""Which rows and columns of a tensor an update covers, and which of its own rows go there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bake.identify.updates import Update
from bake.keys.factors import as_matrix
from bake.keys.places import Place


class Region(NamedTuple):
    """The part of a tensor, seen as a matrix, that an update covers."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    part: tuple[int, int]  # rows of the update, oriented as the tensor
    height: int  # of the whole update, likewise
    transposed: bool  # the factors give (columns, rows)


class Misfit(Exception):
    """An update has another shape than its target; says which."""


def check_parts(update: Update, places: Sequence[Place]) -> None:
    """Raise Misfit if `places` do not take up all rows of the update."""
    rows = [place.part for place in places if place.part is not None]
    height = update.extent[0]
    if rows and height is not None and sum(last - first for first, last in rows) != height:
        there = " and ".join(dict.fromkeys(place.tensor for place in places))
        raise Misfit(f"the update has {height} rows, {there} together {max(last for _, last in rows)}")


def fit(
    update: Update, place: Place, shape: tuple[int, ...], stored_in_out: bool, narrower: Iterable[int]
) -> list[Region]:
    """Where the update goes: one region, or several for scattered rows.

    shape: of the tensor. stored_in_out: its layer stores (in, out). narrower: numbers of columns, from
    the left, that an update may have where it has fewer than the tensor. Raises Misfit if it does not fit.
    """
    height, width = as_matrix(shape)
    rows = place.rows or (0, height)
    if update.row_numbers:
        return _scattered(update, shape)
    turned = update.transposed != place.transposed
    fitted = _whole(update, place, rows, width, turned or stored_in_out)
    if fitted is None and stored_in_out and not turned:
        fitted = _whole(update, place, rows, width, False)  # the layer that is Conv1D is another one
    for columns in narrower if fitted is None else ():
        fitted = fitted or _whole(update, place, rows, columns, False)
    if fitted is not None and _fits_channels(update, shape, fitted):
        return [fitted]
    part = f" rows {rows[0]} to {rows[1]}" if place.rows is not None else ""
    is_flipped = _whole(update, place, rows, width, not turned) is not None
    hint = " (it would fit transposed)" if is_flipped and fitted is None else ""
    raise Misfit(f"the update is {_described(update)}, {place.tensor}{part} is {list(shape)}{hint}")


def _whole(update: Update, place: Place, rows: tuple[int, int], width: int, transposed: bool) -> Region | None:
    """The update on `rows` and the first `width` columns of the place; None if its extent differs."""
    room = rows[1] - rows[0]
    if transposed:
        fits = all(size is None or size == there for size, there in zip(update.extent, (width, room), strict=True))
        return Region(rows, (0, width), (0, room), room, True) if fits and place.part is None else None
    height, columns = update.extent
    part = place.part or (0, height or room)
    if part[1] - part[0] != room or (columns is not None and columns != width):
        return None
    if height is not None and part[1] > height:
        return None
    return Region(rows, (0, width), part, height or part[1], False)


def _fits_channels(update: Update, shape: tuple[int, ...], region: Region) -> bool:
    """True if the update has as many numbers as there are input channels, where it stores one for each."""
    inputs = region.rows[1] - region.rows[0] if region.transposed else region.columns[1] - region.columns[0]
    if update.column_block is not None and inputs % update.column_block:
        return False
    channels = inputs if region.transposed or len(shape) < 3 else shape[1]
    return update.channels is None or update.channels == channels


def _described(update: Update) -> str:
    if update.channels is not None:
        return f"for {update.channels} input channels"
    if update.column_block is not None:
        return f"for columns in blocks of {update.column_block}"
    return " x ".join("any" if size is None else str(size) for size in update.extent)


def _scattered(update: Update, shape: tuple[int, ...]) -> list[Region]:
    """Rows that an adapter names by number, as runs of neighbours."""
    numbers, width = update.row_numbers, as_matrix(shape)[1]
    if update.extent != (len(numbers), width) or max(numbers) >= shape[0]:
        raise Misfit(
            f"{len(numbers)} rows up to number {max(numbers)}, stored as {list(update.extent)}; "
            f"the base's tensor is {list(shape)}"
        )
    regions: list[Region] = []
    for place, number in enumerate(numbers):
        if regions and regions[-1].rows[1] == number:
            last = regions[-1]
            regions[-1] = last._replace(rows=(last.rows[0], number + 1), part=(last.part[0], place + 1))
        else:
            regions.append(Region((number, number + 1), (0, width), (place, place + 1), len(numbers), False))
    return regions
