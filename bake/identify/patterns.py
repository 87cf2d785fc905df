"""The rank and alpha patterns of an adapter's configuration, matched in bounded time.

Such patterns are regular expressions from a stranger's file, and Python's engine can be made to run for
ever. Nearly all of them are plain module names, which are looked up; the rest must be simple enough that
matching is polynomial with a small exponent, and is refused otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bake.errors import Unsupported

_PLAIN = re.compile(r"[\w.-]*")
_LONGEST = 1000  # characters of a pattern
_LONGEST_PATH = 256  # characters of a module path that a pattern is tried on
_REPEATS = 2  # * + {} in one pattern
_CHOICES = 4  # groups and ? in one pattern
_REPEATED_GROUP = re.compile(r"\)[*+?{]")


class Patterns(Mapping[str, float]):
    """Pattern -> value, in the order of the file; the first that matches counts."""

    def __init__(self, found: Mapping[str, float] | None = None) -> None:
        """Raises re.error for a pattern that is no regular expression, Unsupported for one that is too complex."""
        self._values = dict(found or {})
        self._places = {pattern: place for place, pattern in enumerate(self._values)}
        self._compiled = [
            (place, pattern, _compile(pattern))
            for pattern, place in self._places.items()
            if not _PLAIN.fullmatch(pattern)
        ]

    def __getitem__(self, pattern: str) -> float:
        return self._values[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def find(self, module: str, default: Any = None) -> Any:
        """The value for the module at this dotted path.

        A pattern stands for the whole path or for its last names. A dot in a plain name is a dot; to
        PEFT it is any character, which makes no difference for the paths that models have.
        Source: PEFT utils/other.py get_pattern_key.
        """
        first = len(self._values)
        chosen = None
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", module))):
            place = self._places.get(module[start:], first)
            if place < first:
                first, chosen = place, module[start:]
        for place, pattern, regex in self._compiled:
            if place >= first:
                break
            if len(module) > _LONGEST_PATH:
                raise Unsupported(f"a module path of {len(module)} characters is too long for the pattern {pattern!r}")
            if regex.match(module):
                chosen = pattern
                break
        return default if chosen is None else self._values[chosen]


def _compile(pattern: str) -> re.Pattern[str]:
    """As PEFT reads it. The check comes first: the deepest patterns overflow the compiler itself."""
    repeats = sum(map(pattern.count, "*+{"))
    choices = sum(map(pattern.count, "(?"))
    nested = _REPEATED_GROUP.search(pattern) is not None
    if len(pattern) > _LONGEST or repeats > _REPEATS or choices > _CHOICES or nested:
        raise Unsupported(
            f"the pattern {pattern[:80]!r} for ranks or alphas is more complex than bake matches: at most {_REPEATS} "
            f"repeats, {_CHOICES} groups, no repeated group, {_LONGEST} characters. Write the module names out.",
            pattern=pattern,
        )
    return re.compile(rf"(.*\.)?({pattern})$")
