"""JSON that a stranger may have written: one object, within limits, in which no two readers can see two things."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

from bake.errors import InputError

_DEEPEST = 300  # containers in containers; a bake on top of 140 others has as many
_LONGEST = 80  # characters of a name in a message


def parse_object(
    text: bytes, what: str, refusal: type[InputError] = InputError, *, constants: bool = True, **details: Any
) -> dict[str, Any]:
    """The JSON object that `text` holds.

    what: whose text it is, for messages. constants: NaN and Infinity count as numbers, as Python writes them.
    Raises `refusal` (with `details`) for text that is not UTF-8 or not JSON, for anything but an object, for one that
    names something twice, and for one that nobody could write down again: with half a character, or nested too deep.
    """

    def refuse(why: str, **more: Any) -> NoReturn:
        raise refusal(f"{what} {why}", **details, **more)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            refuse(f"names {shortened(twice)} twice", name=twice)
        return found

    def constant(token: str) -> float:
        if not constants:
            refuse(f"holds {token}, which JSON does not know")
        return float(token)

    def integer(token: str) -> float:
        return -0.0 if token == "-0" else int(token)  # Python reads 0, other readers a number that is no integer

    parse_int = integer if b"-0" in text else None  # it costs time
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_int=parse_int)
        if b"\\ud" in text.lower():  # an escaped lone surrogate parses, but no writer could store it
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON, giant numbers
        refuse(f"is not valid JSON: {error}")
    if not isinstance(found, dict):
        refuse("is not a JSON object")
    if is_deep(found):
        refuse("is nested deeper than any writer does it")
    return found


def is_deep(value: Any) -> bool:
    """True if containers are nested so deep that writing the value down again might fail."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [item for container in level for item in _items(container) if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _items(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container if isinstance(container, list) else ()


def shortened(value: Any) -> str:
    """`value` for a message: quoted, if it is a text, and never longer than a line."""
    text = repr(value[: 2 * _LONGEST]) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
