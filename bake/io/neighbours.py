"""Names for what lies beside an output for a while, as long as the file system takes them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_LONGEST = 255  # bytes of a name, on nearly every file system
_DIGITS = 16


def neighbour(place: Path, suffix: str) -> Path:
    """`.NAME.suffix` beside `place`; of a name too long for that, its beginning and some digits of its SHA-256."""
    name = os.fsencode(f".{place.name}{suffix}")
    if len(name) > _LONGEST:
        digits = hashlib.sha256(os.fsencode(place.name)).hexdigest()[:_DIGITS]
        room = _LONGEST - len(os.fsencode(suffix)) - _DIGITS - 1
        name = os.fsencode(f"{name[:room].decode('utf-8', 'ignore')}-{digits}{suffix}")
    return place.with_name(os.fsdecode(name))
