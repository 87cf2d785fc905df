"""Sizes in and out of text."""

from __future__ import annotations

import pytest

from bake.sizes import format_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("4k", 4096), ("512MiB", 2**29), ("512 MB", 2**29), ("1.5G", 3 * 2**29), ("2TiB", 2**41)],
)
def test_a_size_is_read_in_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-4k", "4 apples", "1e3", "0x10"])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (2_132_651_196, "2.13 GB"),
        (4e15, "4e+03 TB"),
    ],
)
def test_bytes_are_shown_in_decimal_units(count: float, text: str) -> None:
    assert format_bytes(count) == text
