"""How much of something each tensor gets: one number, or numbers by component, block, name and depth.

A Selection is what was asked for, before any base is known; `bake.plan.ratios` says what it means there.
It is written as people know it from web UIs and mergekit, and stored in recipes in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from bake.errors import Unsupported, UsageError
from bake.keys.blocks import SCHEMES
from bake.plan.presets import ALIASES, PRESETS, RULES

_DRAWN = ("R", "U", "X")  # values that web UIs draw by chance, or vary in a plot


@dataclass(frozen=True, slots=True)
class Words:
    """Some of many, as rules name them: any of these, or with NOT none of them; no words mean all."""

    words: tuple[str, ...] = ()
    inverted: bool = False

    def __str__(self) -> str:
        return " ".join((*(["NOT"] if self.inverted else []), *self.words))


@dataclass(frozen=True, slots=True)
class Rule:
    """An elemental rule, BLOCKS:ELEMENTS:RATIO: it replaces the ratio of the tensors it is about."""

    blocks: Words  # names, or ranges such as IN05-OUT05
    elements: Words  # parts of tensor names
    ratio: float

    def __str__(self) -> str:
        return f"{self.blocks}:{self.elements}:{_written(self.ratio)}"


@dataclass(frozen=True, slots=True)
class NameRule:
    """The ratio of the tensors whose whole name a pattern fits."""

    pattern: str  # as for files: * is anything, ? one character, [ab] one of these
    ratio: float

    def __str__(self) -> str:
        return f"{self.pattern}={_written(self.ratio)}"


@dataclass(frozen=True, slots=True)
class Gradient:
    """Ratios over the depth of a model, spread evenly from its first layer to its last, straight lines between."""

    values: tuple[float, ...]
    filter: str = ""  # part of the name of the tensors it is about; "": all

    def __str__(self) -> str:
        numbers = ",".join(map(_written, self.values))
        return f"{self.filter}={numbers}" if self.filter else numbers

    def at(self, depth: float) -> float:
        """The ratio at `depth`, from 0 to 1. Source: mergekit config.py evaluate_setting."""
        scaled = depth * (len(self.values) - 1)
        first = int(scaled)
        second = min(first + 1, len(self.values) - 1)
        share = scaled - first
        return (1 - share) * self.values[first] + share * self.values[second]


@dataclass(frozen=True, slots=True)
class Selection:
    """The ratio of every tensor. What comes later here replaces what came before, wherever it says anything."""

    number: float | None = None  # of all that nothing else is about; None: 1, but 0 for what `values` cannot name
    components: tuple[tuple[str, float], ...] = ()  # unet, te (all text encoders), te1, vae, ... -> ratio
    values: tuple[float, ...] = ()  # one for each block, in a list of one of the lengths the family knows
    preset: str = ""  # what `values` are called
    scheme: str = "bake"  # one of bake.keys.blocks.SCHEMES: where `values` reach what is in no block they name
    gradients: tuple[Gradient, ...] = ()  # the first that is about a tensor counts
    rules: tuple[Rule, ...] = ()  # the last that is about a tensor counts
    names: tuple[NameRule, ...] = ()  # likewise

    def __post_init__(self) -> None:
        """Raise UsageError for numbers that are not finite and for an unknown scheme."""
        if self.scheme not in SCHEMES:
            raise UsageError(f"{self.scheme!r} is no reading of block lists; known are {', '.join(SCHEMES)}")
        for number in self._numbers():
            if not math.isfinite(number):
                raise UsageError(f"a ratio must be a finite number, not {number}")

    @classmethod
    def parse(
        cls, values: str = "", rules: str = "", names: str = "", gradient: str = "", scheme: str = "bake"
    ) -> Selection:
        """What these texts mean; all may be empty.

        values: numbers separated by commas, or a preset's name. rules: BLOCKS:ELEMENTS:RATIO, separated by
        commas or lines, or the names of those that web UIs have. names: PATTERN=RATIO, separated by commas.
        gradient: numbers separated by commas, several of them as FILTER=NUMBERS separated by semicolons.
        Raises UsageError for what is none of this, Unsupported for values that are drawn by chance.
        """
        preset = ALIASES.get(values.strip(), values.strip())
        named = preset in PRESETS
        return cls(
            values=PRESETS[preset] if named else _parse_values(values) if values.strip() else (),
            preset=preset if named else "",
            scheme=scheme,
            gradients=tuple(map(_parse_gradient, _parts(gradient, ";"))),
            rules=tuple(_parse_rule(RULES.get(part, part)) for part in _parts(rules.replace("\n", ","), ",")),
            names=tuple(map(_parse_name_rule, _parts(names, ","))),
        )

    def _numbers(self) -> list[float]:
        """Every number given."""
        given = [] if self.number is None else [self.number]
        given += [*self.values, *(ratio for _, ratio in self.components)]
        given += [value for gradient in self.gradients for value in gradient.values]
        return [*given, *(rule.ratio for rule in self.rules), *(named.ratio for named in self.names)]

    def __str__(self) -> str:
        """For people: what was asked for, short."""
        shown = {"lbw": self.preset or f"{len(self.values)} values"} if self.values else {}
        written = self.to_json()
        for key, label in (("gradients", "gradient"), ("rules", "lbwe"), ("names", "names")):
            if key in written:
                shown[label] = ",".join(written[key])
        if self.scheme != "bake":
            shown["blocks"] = self.scheme
        return " ".join(f"{key}={text}" for key, text in shown.items())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data with what was asked for, and nothing else; rules in the words of `parse`."""
        written: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                written[field.name] = value
        for key in ("gradients", "rules", "names"):
            if key in written:
                written[key] = [str(each) for each in written[key]]
        if "components" in written:
            written["components"] = dict(self.components)
        if "values" in written:
            written["values"] = list(self.values)
        return written

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Selection:
        """The selection that `to_json` gave. Raises UsageError, ValueError, TypeError or KeyError for anything else."""
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise UsageError(f"a selection has no {sorted(unknown)[0]!r}")
        number = data.get("number")
        return cls(
            number=None if number is None else float(number),
            components=tuple((str(name), float(ratio)) for name, ratio in data.get("components", {}).items()),
            values=tuple(map(float, data.get("values", ()))),
            preset=str(data.get("preset", "")),
            scheme=str(data.get("scheme", "bake")),
            gradients=tuple(map(_parse_gradient, data.get("gradients", ()))),
            rules=tuple(map(_parse_rule, data.get("rules", ()))),
            names=tuple(map(_parse_name_rule, data.get("names", ()))),
        )


def _written(value: float) -> str:
    """A number that reads as the same float64."""
    return repr(value).removesuffix(".0")


def _parts(text: str, separator: str) -> Iterable[str]:
    return (part.strip() for part in text.split(separator) if part.strip())


def _parse_values(text: str) -> tuple[float, ...]:
    if "," not in text:
        raise UsageError(
            f"{text.strip()!r} is no preset of block values; known are {', '.join(PRESETS)}. "
            f"Or write the values, separated by commas."
        )
    return tuple(_number(part, text) for part in text.split(","))


# What a merge parameter can be: a number, switch or word; a Selection of numbers; or one of these for each model.
Setting: TypeAlias = "float | bool | str | Selection | Sequence[float | Selection]"


def _parse_rule(text: str) -> Rule:
    parts = text.split(":")
    if len(parts) != 3:
        raise UsageError(f"{text!r} is not BLOCKS:ELEMENTS:RATIO, such as 'IN05-OUT05:attn:0.5', nor one of {_RULES}")
    return Rule(_parse_words(parts[0], text), _parse_words(parts[1], text), _number(parts[2], text))


_RULES = ", ".join(RULES)


def _parse_words(text: str, rule: str) -> Words:
    words = text.split()
    inverted = words[:1] == ["NOT"]
    if inverted and len(words) == 1:
        raise UsageError(f"{rule!r}: NOT is followed by what is left out")
    return Words(tuple(words[inverted:]), inverted)


def _parse_name_rule(text: str) -> NameRule:
    pattern, equals, ratio = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"{text!r} is not PATTERN=RATIO, such as '*attn2*=0.5'")
    return NameRule(pattern.strip(), _number(ratio, text))


def _parse_gradient(text: str) -> Gradient:
    name, _, numbers = text.rpartition("=")
    name = name.strip()
    return Gradient(tuple(_number(part, text) for part in numbers.split(",")), "" if name == "*" else name)


def _number(text: str, where: str) -> float:
    word = text.strip()
    if word[:1] in _DRAWN:
        raise Unsupported(f"{where!r}: {word} stands for a value drawn by chance or in a plot; write the number itself")
    try:
        return float(word)
    except ValueError:
        raise UsageError(f"{where!r}: {word!r} is not a number") from None
