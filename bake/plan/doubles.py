"""Adapters that count twice: fused into the base before, as its record says, or named more than once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bake.errors import AlreadyFused, InputError
from bake.io.adapter import AdapterFile
from bake.io.digest import known_digest
from bake.io.jsontext import parse_object
from bake.plan.recipe import AdapterChoice, Recipe, is_text_encoder
from bake.plan.record import RECIPE_KEY

_LONGEST_NAME = 255  # in messages


class _Weight(NamedTuple):
    te: float  # for the text encoders
    unet: float  # for everything else

    def __str__(self) -> str:
        return f"{self.unet:g}" if self.te == self.unet else f"{self.unet:g} (te {self.te:g})"


@dataclass(frozen=True, slots=True)
class _Fused:
    """An adapter that a record says was fused, or that is going to be."""

    name: str
    size: int  # bytes
    sha256: str
    weight: _Weight
    is_selected: bool  # the weight is multiplied by others, tensor by tensor
    is_merged: bool = False  # models were merged after it


def warn_of_doubles(
    recipe: Recipe, records: Iterable[tuple[str, bool]], uses: Sequence[tuple[AdapterFile, AdapterChoice]]
) -> tuple[str, ...]:
    """What the user should know about adapters that are in the base already, for Plan.warnings.

    records: the recipes that the base's files carry, each with whether that file is merged with others first. Only
    files of a recorded size are hashed. Raises AlreadyFused instead if the recipe is strict.
    """
    earlier = [fused for text, is_merged in records for fused in _recorded(text, is_merged)]
    sizes = {fused.size for fused in earlier}
    now = _identified(recipe, [use for use in uses if use[0].file.size in sizes])
    warnings = []
    for sha256 in dict.fromkeys(fused.sha256 for fused in now):
        before = [fused for fused in earlier if fused.sha256 == sha256]
        if before:
            warnings.append(_warning(before, [fused for fused in now if fused.sha256 == sha256]))
    if warnings and recipe.strict:
        raise AlreadyFused(
            f"{' '.join(warnings)} Leave it out, or fuse it once more without --strict.",
            adapters=list(dict.fromkeys(fused.name for fused in now)),
        )
    return tuple(warnings)


def note_repeated(
    recipe: Recipe, uses: Sequence[tuple[AdapterFile, AdapterChoice]], contents: Sequence[str]
) -> Iterator[str]:
    """What the user should know about adapters that are named more than once; contents: their content keys."""
    now = _identified(recipe, [use for use, key in zip(uses, contents, strict=True) if contents.count(key) > 1])
    for sha256 in dict.fromkeys(fused.sha256 for fused in now):
        same = [fused for fused in now if fused.sha256 == sha256]
        if len(same) > 1:
            names = " and ".join(dict.fromkeys(fused.name for fused in same))
            yield f"{names}: the same adapter {len(same)} times, at {_listed(same)}, which makes {_sum(same)}"


def _identified(recipe: Recipe, uses: Iterable[tuple[AdapterFile, AdapterChoice]]) -> list[_Fused]:
    return [
        _Fused(
            source.name,
            source.file.size,
            known_digest(source.file.path).sha256,
            _reaching(choice.weight_for("te1"), choice.weight_for("unet"), recipe.only),
            choice.selection is not None,
        )
        for source, choice in uses
    ]


def _recorded(text: str, is_merged: bool) -> Iterator[_Fused]:
    """The adapters that a stored recipe names, and those in it. What bake did not write is passed over."""
    try:
        left: list[tuple[Any, bool]] = [(parse_object(text.encode("utf-8", "replace"), RECIPE_KEY), is_merged)]
    except InputError:
        return
    while left:
        found, is_merged = left.pop()
        if isinstance(found, list):
            left += [(each, is_merged) for each in found]
        elif isinstance(found, dict):
            left += [(value, is_merged or "method" in found) for value in found.values()]
            for entry in found["adapters"] if isinstance(found.get("adapters"), list) else ():
                try:
                    yield _entry(entry, found["settings"]["only"], is_merged)
                except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
                    continue


def _entry(entry: Any, only: Sequence[str], is_merged: bool) -> _Fused:
    weights, *_ = entry["files"]
    te, unet = (float(entry.get(key, entry["weight"])) for key in ("te", "unet"))
    if not (math.isfinite(te) and math.isfinite(unet)):
        raise ValueError("a weight is no number")
    return _Fused(
        str(entry["name"])[:_LONGEST_NAME],
        int(weights["size"]),
        str(weights["sha256"]),
        _reaching(te, unet, only),
        "selection" in entry,
        is_merged,
    )


def _reaching(te: float, unet: float, only: Sequence[str]) -> _Weight:
    """The weights, where only some components are fused into."""
    encoders = [name == "te" or is_text_encoder(name) for name in only]
    return _Weight(te if not only or any(encoders) else 0.0, unet if not all(encoders) or not only else 0.0)


def _warning(before: Sequence[_Fused], now: Sequence[_Fused]) -> str:
    name = now[0].name
    others = [fused.name for fused in before if fused.name != name]
    called = f" (as {others[0]})" if others else ""
    text = f"{name} is in the base already{called}, at {_listed(before)}: with {_listed(now)} now it counts "
    text += f"{_sum([*before, *now])} in all"
    if any(fused.is_selected for fused in (*before, *now)):
        text += ", where block weights leave it whole"
    if any(fused.is_merged for fused in before):
        text += ", if the merges after it had left it whole"
    return f"{text}."


def _listed(fused: Sequence[_Fused]) -> str:
    return " and ".join(str(each.weight) for each in fused)


def _sum(fused: Sequence[_Fused]) -> _Weight:
    """What the weights make together, without the noise of binary fractions."""
    te, unet = (round(math.fsum(each.weight[place] for each in fused), 12) for place in range(2))
    return _Weight(te, unet)
