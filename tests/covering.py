"""What places say about a base, computed row by row, for comparison with what independent converters say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import dits
import numpy as np
import pytest
from numpy.typing import NDArray

from bake.keys.modules import ModuleIndex
from bake.keys.places import Parameters, Place, split_parameter

Shape = tuple[int, ...]
Rows = dict[str, NDArray[np.int64]]  # tensor -> a number for each of its rows


def modules_of(shapes: Mapping[str, Shape], prefix: str = "") -> dict[str, dict[str, str]]:
    """module -> parameter -> tensor, for the tensors of one component as an adapter of that layout names them."""
    found: dict[str, dict[str, str]] = {}
    for name in shapes:
        if name.startswith(prefix):
            module, parameter = split_parameter(name[len(prefix) :])
            found.setdefault(module, {})[parameter] = name
    return found


def span(place: Place, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    return place.rows or (0, shapes[place.tensor][0] if shapes[place.tensor] else 1)


def height(places: Sequence[Place], shapes: Mapping[str, Shape]) -> int:
    """Rows that an update has that goes to `places`; copies of one tensor take the whole update each."""
    heights = [last - first for first, last in (span(place, shapes) for place in places)]
    return sum(heights) if places[0].part is not None else heights[0]


def gather(places: tuple[Place, ...], rows: Rows, shapes: Mapping[str, Shape]) -> NDArray[np.int64]:
    """The numbers of the base's rows that meet rows 0, 1, ... of an update that goes to `places`."""
    update = np.full(height(places, shapes), -1)
    for place in places:
        first, last = place.part or (0, len(update))
        begin, end = span(place, shapes)
        assert place.part is None or (update[first:last] == -1).all(), place
        update[first:last] = rows[place.tensor][begin:end]
    assert (update >= 0).all(), places
    return update


def cover(
    spellings: Mapping[str, Parameters], base: Mapping[str, Shape], other: Mapping[str, Shape], prefix: str = ""
) -> tuple[set[str], set[str]]:
    """(tensors of `other` without a place, tensors of `base` that nothing reached) for a full adapter named as `other`.

    Checks that every other tensor fits its places, and that no row of the base is reached twice or by halves.
    """
    reached = {name: np.zeros(shape[0] if shape else 1, np.int64) for name, shape in base.items()}
    homeless = set()
    for module, tensors in modules_of(other, prefix).items():
        for parameter, name in tensors.items():
            places = spellings.get(module, {}).get(parameter)
            if places is None:
                homeless.add(name)
                continue
            assert height(places, base) == (other[name][0] if other[name] else 1), (name, places)
            gather(places, {place.tensor: np.arange(len(reached[place.tensor])) for place in places}, base)
            for place in places:
                assert np.prod(base[place.tensor][1:]) == np.prod(other[name][1:]), (name, place)
                begin, end = span(place, base)
                reached[place.tensor][begin:end] += 1
    assert {name for name, counts in reached.items() if counts.max() > 1} == set()
    assert {name for name, counts in reached.items() if counts.min() != counts.max()} == set()
    return homeless, {name for name, counts in reached.items() if counts.max() == 0}


def converted(name: str, shapes: Mapping[str, Shape]) -> tuple[dict[str, Shape], Rows, Rows]:
    """(shapes, row numbers of the original, row numbers of the same tensors after diffusers' conversion).

    name: of a row of dits.MODELS, which names diffusers' converter. Skips where diffusers is not installed.
    """
    torch = pytest.importorskip("torch")
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils", reason="diffusers is not installed")
    numbers, tensors, first = {}, {}, 0
    for tensor, shape in shapes.items():
        shape = shape or (1,)
        numbers[tensor] = np.arange(first, first + shape[0])
        first += shape[0]
        rows = torch.from_numpy(numbers[tensor]).to(torch.int32).view(-1, *(1,) * (len(shape) - 1))
        # Expanded, not repeated: full-width models cost nothing. The last layer is copied by its swap.
        tensors[tensor] = rows.expand(shape if "final_layer" not in tensor else rows.shape)
    theirs = getattr(single_file, dits.MODELS[name][3])(dict(tensors))
    theirs = {tensor: values for tensor, values in theirs.items() if values is not None}
    flat = {tensor: values.reshape(len(values), -1)[:, 0].numpy().astype(np.int64) for tensor, values in theirs.items()}
    columns = {tensor: shapes[tensor][1:] for tensor in shapes}
    whose = {int(numbers[tensor][row]): tensor for tensor in shapes for row in range(len(numbers[tensor]))}
    return {t: (len(rows), *columns[whose[int(rows[0])]]) for t, rows in flat.items()}, numbers, flat


def flat_collisions(index: ModuleIndex) -> None:
    """Raise AssertionError if two different modules of a component flatten alike."""
    for component in index.components:
        index._flat_names(component.name)
