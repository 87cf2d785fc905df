"""The known names that come nearest to an unknown one, for people to recognise a misspelling or another version."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

_SHORTLIST = 40  # names compared letter by letter; among thousands that would take seconds
_CUTOFF = 0.6  # below this share of common letters a name is no suggestion


def nearest_names(wanted: str, known: Iterable[str], count: int) -> list[str]:
    """At most `count` of the `known` names, the nearest to `wanted` first; equal input gives equal order.

    Names are shortlisted by what they share with `wanted` at both ends, then compared letter by letter.
    """
    backwards = wanted[::-1]

    def shared_ends(name: str) -> int:
        return _shared(wanted, name) + _shared(backwards, name[::-1])

    shortlist = sorted(known, key=lambda name: (-shared_ends(name), abs(len(name) - len(wanted)), name))[:_SHORTLIST]
    return difflib.get_close_matches(wanted, shortlist, n=count, cutoff=_CUTOFF)


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common at the start."""
    return len(os.path.commonprefix((one, other)))  # noqa: RUF071 - characters are meant, not folders
