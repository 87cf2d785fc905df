"""Names in messages: a few of them, and how many more there are."""

from __future__ import annotations

from collections.abc import Sequence

_LISTED = 4


def some(names: Sequence[str]) -> str:
    """The first few names, and how many there are beside them."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
