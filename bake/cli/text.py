"""Text from a stranger's file, on its way to a terminal."""

from __future__ import annotations

import unicodedata

_CONTROL = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories
_LONGEST = 10_000  # characters of a message


def printable(text: str, lines: bool = False) -> str:
    """`text` with control characters spelled out: names from a stranger's file must not drive the terminal.

    lines: it may have several, and is cut where no screen could show it all.
    """
    if lines:
        short = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
        return "\n".join(map(printable, short.split("\n")))
    return "".join(
        char if unicodedata.category(char) not in _CONTROL else char.encode("unicode_escape").decode() for char in text
    )
