"""Sizes as people write them ("4GiB", "512M") and as they read them ("2.13 GB")."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes meant by `text`; every unit is binary, so "4G", "4GB" and "4GiB" are the same.

    Raises ValueError for anything else.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a size; write it like 512MiB or 4G")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def format_bytes(count: float) -> str:
    """`count` bytes for reading, in decimal units as file managers show them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
