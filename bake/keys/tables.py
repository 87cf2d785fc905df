"""One table per family says how two layouts spell the same rows; this turns it into places, both ways.

A row of a table is a stretch of tensor rows, cut into parts where one layout holds them in one
tensor and the other in several, or in another order. Each spelling says which parts it is, in its
order. Whatever the base uses, its parts are found first, and every other spelling is put together
from them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from bake.keys.places import Parameters, Place

Shape = tuple[int, ...]
Layout = Literal["original", "diffusers"]

# (rows, columns) of a weight that holds several parts -> rows of each, in its order; None: not this row's tensor.
Rule = Callable[[int, int], Sequence[int] | None]


class Spelling(NamedTuple):
    """One name of a row of a table."""

    pattern: str  # module path; "#" is the number of a block, and the same in all spellings
    parts: str  # which parts this module is, a letter each, in its own order


class Row(NamedTuple):
    """The same rows in both layouts."""

    original: tuple[Spelling, ...]
    diffusers: tuple[Spelling, ...]
    rule: Rule | None = None  # sizes of the parts, where the base holds several in one tensor


class Table:
    """The rows of a family, found by the spelling of any module in them."""

    def __init__(self, *rows: Row) -> None:
        self.rows: list[tuple[Spelling, ...]] = []
        self.rules: list[Rule | None] = []
        self.by_pattern: dict[str, list[tuple[int, str]]] = {}  # pattern -> (place of its row, its parts)
        self.layouts: dict[Layout, list[tuple[Spelling, ...]]] = {"original": [], "diffusers": []}  # by place
        for row in rows:
            self.layouts["original"].append(_first_of_each_part(row.original))
            self.layouts["diffusers"].append(_first_of_each_part(row.diffusers))
            spellings = tuple(dict.fromkeys(_with_short_outputs((*row.original, *row.diffusers))))
            for pattern, parts in spellings:
                self.by_pattern.setdefault(pattern, []).append((len(self.rows), parts))
            self.rows.append(spellings)
            self.rules.append(row.rule)


def same(original: str, diffusers: str | None = None) -> Row:
    """One module in both layouts. Each argument: its names there, separated by spaces; one for both if they agree."""
    return Row(_names(original, "a"), _names(original if diffusers is None else diffusers, "a"))


def fused(original: str, *parts: str, rule: Rule | None = None) -> Row:
    """One module in the original layout, several in diffusers' (`parts`, in order of their rows); equal by default."""
    letters = "abcdefgh"[: len(parts)]
    split = tuple(spelling for letter, names in zip(letters, parts, strict=True) for spelling in _names(names, letter))
    return Row(_names(original, letters), split, rule or _equal(len(parts)))


def swapped(original: str, diffusers: str, rule: Rule | None = None) -> Row:
    """One module in both layouts, whose halves are exchanged: (shift, scale) here, (scale, shift) there."""
    return Row(_names(original, "ab"), _names(diffusers, "ba"), rule or _equal(2))


def within(original: str, diffusers: str, *rows: Row) -> tuple[Row, ...]:
    """`rows` below a block that the layouts call `original` and `diffusers`."""

    def below(block: str, spellings: Iterable[Spelling]) -> tuple[Spelling, ...]:
        return tuple(Spelling(f"{block}.{pattern}", parts) for pattern, parts in spellings)

    return tuple(Row(below(original, row.original), below(diffusers, row.diffusers), row.rule) for row in rows)


def also(row: Row, spelling: str, parts: str) -> Row:
    """`row` with a further spelling, that only adapters use, for some of its parts."""
    return row._replace(original=(*row.original, Spelling(spelling, parts)))


def qkv_and_rest(rows: int, columns: int) -> Sequence[int] | None:
    """The rule of a single block's first layer: q, k and v as tall as the input is wide, then the MLP."""
    rest = rows - 3 * columns
    return [columns, columns, columns, rest] if rest > 0 else None


def _names(text: str, parts: str) -> tuple[Spelling, ...]:
    return tuple(Spelling(name, parts) for name in text.split())


def _with_short_outputs(spellings: Iterable[Spelling]) -> Iterable[Spelling]:
    """The spellings, and "to_out" beside each "to_out.0": diffusers counted it later, ComfyUI never did."""
    for pattern, parts in spellings:
        yield Spelling(pattern, parts)
        if pattern.endswith(".to_out.0"):
            yield Spelling(pattern.removesuffix(".0"), parts)


def _first_of_each_part(spellings: Iterable[Spelling]) -> tuple[Spelling, ...]:
    """The names that together are the whole row once: where there are several for one part, the first."""
    chosen: list[Spelling] = []
    for spelling in spellings:
        if not any(set(spelling.parts) & set(other.parts) for other in chosen):
            chosen.append(spelling)
    return tuple(chosen)


def _equal(count: int) -> Rule:
    def sizes(rows: int, columns: int) -> Sequence[int] | None:
        return [rows // count] * count if rows % count == 0 else None

    return sizes


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def aliases(table: Table, modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> dict[str, Parameters]:
    """The other spellings of `modules`, by `table`; modules that it does not list have only their own.

    shapes: full tensor name -> shape; the weight of a fused module tells where its parts begin.
    """
    others: dict[str, Parameters] = {}
    for (place, numbers), (located, _) in _rows_of(table, modules, shapes).items():
        for pattern, parts in table.rows[place]:
            path = _filled(pattern, numbers)
            if path not in modules and all(part in located for part in parts):
                others[path] = _assemble([located[part] for part in parts], shapes)
    return others


def in_layout(
    table: Table, modules: Mapping[str, Parameters], shapes: Mapping[str, Shape], layout: Layout
) -> dict[str, Parameters]:
    """`modules` by their names in one layout, each of their rows once; what has no name there keeps its own.

    That is what the table does not list, and parts of a fused module whose other parts are missing.
    """
    spoken: dict[str, Parameters] = {}
    renamed: set[str] = set()
    for (place, numbers), (located, owners) in _rows_of(table, modules, shapes).items():
        spellings = table.layouts[layout][place]
        if all(part in located for spelling in spellings for part in spelling.parts):
            renamed.update(owners)
            for pattern, parts in spellings:
                spoken[_filled(pattern, numbers)] = _assemble([located[part] for part in parts], shapes)
    return {module: parameters for module, parameters in modules.items() if module not in renamed} | spoken


def find_path(table: Table, path: str, flat: bool) -> str | None:
    """The dotted spelling in `table` that `path` is, or that it is when dots are written "_"; None if there is none."""
    if not flat:
        return path if any(pattern in table.by_pattern for pattern, _ in _patterns(path)) else None
    for pattern in table.by_pattern:
        found = _flat_regex(pattern).fullmatch(path)
        if found is not None:
            return _filled(pattern, found.groups())
    return None


def is_in_layout(table: Table, path: str, layout: Layout) -> bool:
    """True if `path` is a name of that layout, or one that the table does not list at all."""
    listed = [(pattern, place) for pattern, _ in _patterns(path) for place, _ in table.by_pattern.get(pattern, ())]
    return not listed or any(
        pattern == spelling.pattern for pattern, place in listed for spelling in table.layouts[layout][place]
    )


@functools.cache
def _flat_regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern.replace(".", "_")).replace(re.escape("#"), r"(\d+)"))


# (row of the table, numbers) -> (part -> parameter -> its place, the modules that hold the parts)
_Rows = dict[tuple[int, tuple[str, ...]], tuple[dict[str, dict[str, Place]], list[str]]]


def _rows_of(table: Table, modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> _Rows:
    """The rows of the table that `modules` fill, in whole or in part."""
    found: _Rows = {}
    for module, parameters in modules.items():
        for pattern, numbers in _patterns(module):
            for place, parts in table.by_pattern.get(pattern, ()):
                located = _locate(parts, parameters, table.rules[place], shapes)
                if located is not None:
                    parts_found, owners = found.setdefault((place, numbers), ({}, []))
                    owners.append(module)
                    for part, where in located.items():
                        parts_found.setdefault(part, where)
                    break  # of several rows for one name, the first that its shape fits
    return found


def _patterns(module: str) -> Iterable[tuple[str, tuple[str, ...]]]:
    """(pattern, numbers) under which a table may list `module`: as it is, its first or first two numbers open."""
    yield module, ()
    first = _NUMBER.search(module)
    if first is not None:
        begun = f"{module[: first.start()]}#"
        yield begun + module[first.end() :], (first[0],)
        second = _NUMBER.search(module, first.end())
        if second is not None:
            between = module[first.end() : second.start()]
            yield f"{begun}{between}#{module[second.end() :]}", (first[0], second[0])


def _filled(pattern: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        pattern = pattern.replace("#", number, 1)
    return pattern


def _locate(
    parts: str, parameters: Parameters, rule: Rule | None, shapes: Mapping[str, Shape]
) -> dict[str, dict[str, Place]] | None:
    """part -> parameter -> where it lies, for one module of the base; None if its shape is not the row's."""
    if len(parts) == 1:
        return {parts: {parameter: places[0] for parameter, places in parameters.items()}}
    weight = shapes[parameters["weight"][0].tensor] if "weight" in parameters else ()
    sizes = rule(weight[0], weight[1]) if rule is not None and len(weight) > 1 else None
    if sizes is None or any(shapes[places[0].tensor][:1] != weight[:1] for places in parameters.values()):
        return None
    located: dict[str, dict[str, Place]] = {}
    first = 0
    for part, size in zip(parts, sizes, strict=True):
        rows = (first, first + size)
        located[part] = {parameter: Place(places[0].tensor, rows) for parameter, places in parameters.items()}
        first += size
    return located


def _assemble(parts: Sequence[dict[str, Place]], shapes: Mapping[str, Shape]) -> Parameters:
    """The parameters of a module that is made of `parts`, in order."""
    if len(parts) == 1:
        return {parameter: (place,) for parameter, place in parts[0].items()}
    return {
        parameter: _joined([part[parameter] for part in parts], shapes)
        for parameter in parts[0]
        if all(parameter in part and shapes[part[parameter].tensor] for part in parts)
    }


def _joined(places: Iterable[Place], shapes: Mapping[str, Shape]) -> tuple[Place, ...]:
    """Where an update goes that lies in `places` one after the other; neighbours in one tensor become one place."""
    runs: list[tuple[str, int, int]] = []  # tensor, first row, past the last row
    for place in places:
        tensor = place.tensor
        first, last = place.rows or (0, shapes[tensor][0])
        if runs and runs[-1][0] == tensor and runs[-1][2] == first:
            runs[-1] = (tensor, runs[-1][1], last)
        else:
            runs.append((tensor, first, last))
    joined = []
    begin = 0
    for tensor, first, last in runs:
        end = begin + last - first
        whole = (first, last) == (0, shapes[tensor][0])
        joined.append(Place(tensor, None if whole else (first, last), False, (begin, end) if len(runs) > 1 else None))
        begin = end
    return tuple(joined)
