"""What a value in a recipe may be. Each kind reads a node and says the same as a JSON Schema, so that both agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from bake.errors import BakeError
from bake.io.jsontext import shortened
from bake.keys.nearest import nearest_names
from bake.recipes.document import Entries, Items, Mark, Node, Scalar
from bake.sizes import parse_size

Schema = dict[str, Any]
_LONGEST_PATH = 4096


class Kind(Protocol):
    """One kind of value."""

    def read(self, node: Node) -> Any:
        """The value of a node; raises UsageError, with its place, for what is of another kind."""

    def schema(self) -> Schema:
        """The JSON Schema of such values."""


def described(node: Node) -> str:
    """What stands at a node, for messages."""
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Entries):
        return "a mapping"
    return "nothing" if node.value is None else shortened(node.text)


def expect(node: Node, what: str) -> NoReturn:
    """Raise the UsageError that something else was expected here."""
    node.mark.refuse(f"{what} was expected, here is {described(node)}")


@dataclass(frozen=True, slots=True)
class Text:
    """Words. Numbers and switches are taken as they are written."""

    what: str = "a text"

    def read(self, node: Node) -> str:
        if not isinstance(node, Scalar) or node.value is None or not node.text.strip():
            expect(node, self.what)
        return node.text

    def schema(self) -> Schema:
        return {"type": ["string", "number", "boolean"], "pattern": r"\S"}


@dataclass(frozen=True, slots=True)
class File:
    """A file or folder; relative ones start from the folder of the recipe."""

    def read(self, node: Node) -> Path:
        name = Text("a file or folder").read(node)
        if len(name) > _LONGEST_PATH:
            node.mark.refuse(f"a path of {len(name)} characters; no system has such")
        return node.mark.file.parent / name

    def schema(self) -> Schema:
        return {**Text().schema(), "maxLength": _LONGEST_PATH}


@dataclass(frozen=True, slots=True)
class Word:
    """One of some words."""

    choices: tuple[str, ...]

    def read(self, node: Node) -> str:
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            expect(node, f"one of {', '.join(self.choices)}")
        if node.text not in self.choices:
            near = nearest_names(node.text, self.choices, 1)
            hint = f"; is it {near[0]}?" if near else ""
            node.mark.refuse(f"{shortened(node.text)} is not one of {', '.join(self.choices)}{hint}")
        return node.text

    def schema(self) -> Schema:
        return {"enum": list(self.choices)}


@dataclass(frozen=True, slots=True)
class Switch:
    """True or false."""

    def read(self, node: Node) -> bool:
        value = node.value if isinstance(node, Scalar) else None
        if not isinstance(value, bool):
            expect(node, "true or false")
        return bool(value)

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number within bounds."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # `low` itself is not allowed
    whole: bool = False

    def read(self, node: Node) -> float:
        value = node.value if isinstance(node, Scalar) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            expect(node, f"a {'whole ' if self.whole else ''}number")
        if not math.isfinite(value):
            node.mark.refuse(f"{described(node)} is not a finite number")
        if self.whole and value != int(value):
            expect(node, "a whole number")
        if not self.low <= value <= self.high or (self.above and value == self.low):
            node.mark.refuse(f"{described(node)} is out of range; it can be {self._span}")
        return int(value) if self.whole else float(value)

    @property
    def _span(self) -> str:
        low = [] if math.isinf(self.low) else [f"{'above' if self.above else 'from'} {self.low:g}"]
        high = [] if math.isinf(self.high) else [f"up to {self.high:g}"]
        return " and ".join(low + high)

    def schema(self) -> Schema:
        bounds: Schema = {"type": "integer" if self.whole else "number"}
        if math.isfinite(self.low):
            bounds["exclusiveMinimum" if self.above else "minimum"] = self.low
        if math.isfinite(self.high):
            bounds["maximum"] = self.high
        return bounds


@dataclass(frozen=True, slots=True)
class Size:
    """A number of bytes, like 512MiB or 4G."""

    none: bool = False  # the word none is allowed, for 0

    def read(self, node: Node) -> int:
        text = Text(f"a size such as 512MiB or 4G{', or none' if self.none else ''}").read(node)
        if self.none and text == "none":
            return 0
        try:
            return parse_size(text)
        except ValueError as error:
            node.mark.refuse(str(error))

    def schema(self) -> Schema:
        size = r"\s*\d+(\.\d+)?\s*[kKmMgGtT]?([iI]?[bB])?\s*"
        return {
            "type": ["string", "number"],
            "pattern": f"^(none|{size})$" if self.none else f"^{size}$",
            "minimum": 0,
        }


@dataclass(frozen=True, slots=True)
class ListOf:
    """Values of one kind; a single one needs no list around it."""

    item: Kind
    single: bool = False
    least: int = 0

    def read(self, node: Node) -> tuple[Any, ...]:
        if not isinstance(node, Items):
            if not self.single:
                expect(node, "a list")
            return (self.item.read(node),)
        if len(node.items) < self.least:
            node.mark.refuse("the list is empty")
        return tuple(self.item.read(each) for each in node.items)

    def schema(self) -> Schema:
        several: Schema = {"type": "array", "items": self.item.schema()}
        several |= {"minItems": self.least} if self.least else {}
        return {"anyOf": [self.item.schema(), several]} if self.single else several


@dataclass(frozen=True, slots=True)
class MapOf:
    """Values of one kind by names that are free."""

    value: Kind

    def read(self, node: Node) -> dict[str, Any]:
        if not isinstance(node, Entries):
            expect(node, "a mapping")
        return {name: self.value.read(each) for name, each in node.entries.items()}

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": self.value.schema()}


@dataclass(frozen=True, slots=True)
class Either:
    """One of several kinds, told apart by what YAML makes of them: a scalar, a list, a mapping."""

    scalar: Kind
    items: Kind | None = None
    mapping: Kind | None = None

    def read(self, node: Node) -> Any:
        if isinstance(node, Items) and self.items is not None:
            return self.items.read(node)
        if isinstance(node, Entries) and self.mapping is not None:
            return self.mapping.read(node)
        return self.scalar.read(node)

    def schema(self) -> Schema:
        return {"anyOf": [kind.schema() for kind in (self.scalar, self.items, self.mapping) if kind is not None]}


@dataclass(frozen=True, slots=True)
class Shared:
    """Another kind that stands in several places; the schema spells it out once."""

    name: str
    kind: Kind

    def read(self, node: Node) -> Any:
        return self.kind.read(node)

    def schema(self) -> Schema:
        return {"$ref": f"#/$defs/{self.name}"}


@dataclass(frozen=True, slots=True)
class OrNothing:
    """Another kind, or nothing."""

    kind: Kind

    def read(self, node: Node) -> Any:
        return None if isinstance(node, Scalar) and node.value is None else self.kind.read(node)

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "null"}, self.kind.schema()]}


@dataclass(frozen=True, slots=True)
class Unread:
    """A mapping that is read later, when it is known what it may hold."""

    def read(self, node: Node) -> Node:
        return node

    def schema(self) -> Schema:
        return {"type": "object"}


@dataclass(frozen=True, slots=True)
class Made:
    """Another kind, and what is made of its values. `make` may raise a UsageError without a place."""

    kind: Kind
    make: Callable[[Any, Mark], Any]

    def read(self, node: Node) -> Any:
        value = self.kind.read(node)
        try:
            return self.make(value, node.mark)
        except BakeError as error:
            raise placed(error, node.mark) from None

    def schema(self) -> Schema:
        return self.kind.schema()


def placed(error: BakeError, mark: Mark) -> BakeError:
    """The same refusal with the place in the recipe, unless it has one."""
    if "line" in error.details:
        return error
    return type(error)(f"{mark}: {error.message}", **{**error.details, **mark.details})


@dataclass(frozen=True, slots=True)
class Field:
    """A key of a mapping."""

    key: str
    kind: Kind
    meaning: str
    required: bool = False
    needs: str = ""  # a key that this one says nothing without


@dataclass(frozen=True, slots=True)
class Record:
    """A mapping with known keys; its value has those that are given."""

    what: str
    fields: tuple[Field, ...]
    others: Kind | None = None  # of keys that are not known; None: there are none
    rules: Mapping[str, Any] = field(default_factory=dict)  # what the schema says beside, of keys that exclude others

    def read(self, node: Node) -> dict[str, Any]:
        if not isinstance(node, Entries):
            expect(node, f"{self.what}, a mapping,")
        kinds = {each.key: each.kind for each in self.fields}
        found = {}
        for key, value in node.entries.items():
            kind = kinds.get(key, self.others)
            if kind is None:
                refuse_key(node, key, kinds, self.what)
            found[key] = kind.read(value)
        for each in self.fields:
            if each.required and each.key not in found:
                node.mark.refuse(f"{self.what} needs {each.key}: {each.meaning}")
            if each.needs and each.key in found and each.needs not in found:
                node.keys[each.key].refuse(f"{each.key} says nothing without {each.needs}")
        return found

    def schema(self) -> Schema:
        properties = {each.key: {"description": each.meaning, **each.kind.schema()} for each in self.fields}
        rest = False if self.others is None else self.others.schema()
        found: Schema = {"type": "object", "properties": properties, "additionalProperties": rest}
        required = [each.key for each in self.fields if each.required]
        needed = {each.key: [each.needs] for each in self.fields if each.needs}
        return {
            **found,
            **({"required": required} if required else {}),
            **({"dependentRequired": needed} if needed else {}),
            **self.rules,
        }


def refuse_key(node: Entries, key: str, known: Collection[str], what: str) -> NoReturn:
    """Raise the UsageError that `what` has no such key."""
    near = nearest_names(key, known, 1)
    hint = f"is it {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
    node.keys[key].refuse(f"{what} has no {shortened(key)}; {hint}")
