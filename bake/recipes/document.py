"""YAML that a stranger may have written, into nodes that know where they stand.

Scalars are read as YAML 1.2 has them (`no` and `1:30` are words, 1e-5 is a number), and what could run code or fill the
memory is refused: tags, deep nesting, and aliases that make a small file a large one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import yaml

from bake.errors import InputError, UsageError
from bake.io.files import read_bytes, reading, status_of
from bake.io.jsontext import shortened

MOST_BYTES = 2**20
_DEEPEST = 24  # mappings and lists in each other; the format needs seven
_MOST_NODES = 100_000  # aliases written out
_MERGE_KEY = "<<"
_NULLS = ("", "~", "null", "Null", "NULL")
_SWITCHES = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,6})?")
_WHOLE = re.compile(r"[-+]?[0-9]+")
_LONGEST_NUMBER = 400  # characters; more say nothing about a float64
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a recipe, counted from 1 as editors do."""

    file: Path
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"

    @property
    def details(self) -> dict[str, Any]:
        """The place for programs."""
        return {"recipe": str(self.file), "line": self.line, "column": self.column}

    def refuse(self, message: str) -> NoReturn:
        """Raise a UsageError about what stands here."""
        raise UsageError(f"{self}: {message}", **self.details)


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value."""

    mark: Mark
    text: str
    is_plain: bool  # written without quotes, so that it may be a number

    @property
    def value(self) -> int | float | bool | str | None:
        """What the text is, as YAML 1.2 has it. Numbers may be too large to be finite; hexadecimal ones are words."""
        if not self.is_plain:
            return self.text
        if self.text in _NULLS:
            return None
        if self.text in _SWITCHES:
            return _SWITCHES[self.text]
        if len(self.text) <= _LONGEST_NUMBER and _NUMBER.fullmatch(self.text):
            return int(self.text) if _WHOLE.fullmatch(self.text) else float(self.text)
        return {".inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}.get(self.text.lower(), self.text)


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    mark: Mark
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Entries:
    """Keys and their values, in the order of the file."""

    mark: Mark
    entries: dict[str, Node]
    keys: dict[str, Mark]  # where each key stands


Node: TypeAlias = "Scalar | Items | Entries"


def read_document(path: Path) -> Node:
    """The one document in the file at `path`.

    Raises InputError for files that cannot be read or are no YAML, and for what recipes may not have: tags, several
    documents, keys that stand twice, control characters, more of anything than MOST_BYTES and its kin.
    """
    with reading(path) as descriptor:
        size = status_of(descriptor, path).st_size
        if size > MOST_BYTES:
            raise InputError(f"{path}: {size} bytes; a recipe has {MOST_BYTES} at most", path=str(path))
        content = read_bytes(descriptor, 0, size, path)
    return parse_document(content, path)


def parse_document(content: bytes, path: Path) -> Node:
    """The document in the bytes of a file; see `read_document`."""
    text = _decoded(content, path)
    try:
        loader = _Loader(text, path)
    except yaml.reader.ReaderError as error:
        raise _malformed(_position(text, error.position, path), "a character that YAML does not allow") from None
    try:
        composed = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        why = ", ".join(part for part in (error.context, error.problem) if part)
        raise _malformed(_placed(error.problem_mark or error.context_mark, path), f"not valid YAML: {why}") from None
    except (ValueError, OverflowError) as error:  # an escape of no character, a number of thousands of digits
        raise _malformed(_placed(loader.get_mark(), path), f"not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if composed is None:
        raise _malformed(Mark(path, 1, 1), "the file is empty")
    return _Converter(path).node(composed)


def _malformed(mark: Mark, why: str) -> InputError:
    return InputError(f"{mark}: {why}", path=str(mark.file), **mark.details)


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig")
        raise _malformed(_position(before, len(before), path), "not UTF-8 text") from None


def _position(text: str, place: int, path: Path) -> Mark:
    before = text[:place]
    return Mark(path, before.count("\n") + 1, place - before.rfind("\n"))


def _placed(mark: Any, path: Path) -> Mark:
    return Mark(path, 1, 1) if mark is None else Mark(path, mark.line + 1, mark.column + 1)


class _Loader(yaml.SafeLoader):
    """Composes nodes, within limits; constructs nothing."""

    def __init__(self, text: str, path: Path) -> None:
        super().__init__(text)
        self._path = path
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark = _placed(event.start_mark, self._path)
        if getattr(event, "tag", None) is not None and not isinstance(event, yaml.AliasEvent):
            raise _malformed(mark, f"tags such as {shortened(str(event.tag))} are not read; write the value itself")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _malformed(mark, "nested deeper than any recipe is")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Converter:
    """PyYAML's nodes into ours, aliases written out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0

    def node(self, found: yaml.Node, depth: int = 0) -> Node:
        mark = _placed(found.start_mark, self._path)
        self._count += 1
        if self._count > _MOST_NODES or depth > _DEEPEST:  # an alias may stand inside what it means
            raise _malformed(mark, "with its aliases written out the file is larger or deeper than any recipe is")
        if isinstance(found, yaml.MappingNode):
            return self._mapping(found, mark, depth)
        if isinstance(found, yaml.SequenceNode):
            return Items(mark, tuple(self.node(item, depth + 1) for item in found.value))
        return self._scalar(found, mark)

    def _scalar(self, found: yaml.Node, mark: Mark) -> Scalar:
        if _CONTROLS.search(found.value):
            raise _malformed(mark, "a control character, or half of one")
        return Scalar(mark, found.value, found.style is None)  # type: ignore[attr-defined]

    def _mapping(self, found: yaml.MappingNode, mark: Mark, depth: int) -> Entries:
        entries: dict[str, Node] = {}
        keys: dict[str, Mark] = {}
        merged: list[Entries] = []
        for key, value in found.value:
            place = _placed(key.start_mark, self._path)
            if not isinstance(key, yaml.ScalarNode):
                raise _malformed(place, "a key is one word, no list and no mapping")
            name = self._scalar(key, place).text
            if name in keys:
                raise _malformed(place, f"{shortened(name)} stands here twice; first in line {keys[name].line}")
            keys[name] = place
            if name == _MERGE_KEY and key.style is None:
                merged = list(self._merged(self.node(value, depth + 1)))
            else:
                entries[name] = self.node(value, depth + 1)
        for other in merged:  # what stands here itself counts, then the first of those that are taken in
            for name, node in other.entries.items():
                entries.setdefault(name, node)
                keys.setdefault(name, other.keys[name])
        return Entries(mark, entries, keys)

    def _merged(self, node: Node) -> Iterator[Entries]:
        """The mappings that << takes in."""
        for each in node.items if isinstance(node, Items) else (node,):
            if not isinstance(each, Entries):
                raise _malformed(each.mark, "<< takes in mappings, as in <<: *name")
            yield each
