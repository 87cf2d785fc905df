"""The dtype table against torch."""

from __future__ import annotations

import math

import pytest
import torch

from bake.dtypes import DTYPES, OUTPUT_DTYPES, RANK, decode_scalar, tensor_bytes

COMPUTABLE = [row.tag for row in DTYPES.values() if row.computable]


@pytest.mark.parametrize("row", [row for row in DTYPES.values() if row.torch], ids=lambda row: row.tag)
def test_the_torch_dtype_has_the_size_the_table_says(row) -> None:
    dtype = getattr(torch, row.torch, None)
    if dtype is None:
        pytest.skip(f"this torch has no {row.torch}")
    assert torch.empty((), dtype=dtype).element_size() * 8 == row.bits


@pytest.mark.parametrize("tag", COMPUTABLE)
def test_limits_of_the_floats_are_those_of_torch(tag: str) -> None:
    row = DTYPES[tag]
    limits = torch.finfo(getattr(torch, row.torch))
    assert row.largest == limits.max
    assert 2.0**row.smallest_exponent == limits.tiny
    assert 2.0**-row.mantissa == limits.eps


@pytest.mark.parametrize("tag", ["F16", "BF16"])
def test_overflow_is_the_first_number_that_rounds_to_infinity(tag: str) -> None:
    dtype = getattr(torch, DTYPES[tag].torch)
    limit = DTYPES[tag].overflow
    assert math.isinf(float(torch.tensor(limit, dtype=torch.float32).to(dtype)))
    below = torch.nextafter(torch.tensor(limit, dtype=torch.float32), torch.tensor(0.0))
    assert math.isfinite(float(below.to(dtype)))


@pytest.mark.parametrize("tag", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_every_bit_pattern_of_a_short_float_is_decoded_as_torch_does(tag: str) -> None:
    size = DTYPES[tag].bits // 8
    patterns = torch.arange(2 ** (8 * size)).to(torch.int64)
    stored = patterns.to(torch.uint8 if size == 1 else torch.uint16)
    values = stored.view(getattr(torch, DTYPES[tag].torch)).to(torch.float64).tolist()
    for pattern, expected in zip(patterns.tolist(), values, strict=True):
        found = decode_scalar(tag, pattern.to_bytes(size, "little"))
        assert found == expected or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize(
    ("tag", "value"),
    [("F64", -2.5), ("F32", 1.5), ("I64", 7), ("U64", 7), ("I32", -3), ("U32", 3), ("I16", -3), ("U8", 8), ("I8", -8)],
)
def test_numbers_of_the_wide_dtypes_are_decoded(tag: str, value: float) -> None:
    stored = torch.tensor(value, dtype=getattr(torch, DTYPES[tag].torch)).numpy().tobytes()
    assert decode_scalar(tag, stored) == value


def test_packed_dtypes_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="F4"):
        decode_scalar("F4", b"\0")


def test_packed_dtypes_must_fill_bytes() -> None:
    assert tensor_bytes("F4", 4) == 2
    assert tensor_bytes("F4", 3) is None
    assert tensor_bytes("F6_E2M3", 4) == 3


def test_rows_fall_from_wide_to_narrow() -> None:
    ordered = sorted(DTYPES.values(), key=lambda row: RANK[row.tag])
    wide = [row.bits for row in ordered if row.tag != "BOOL"]
    assert wide == sorted(wide, reverse=True)


def test_output_dtypes_are_computable() -> None:
    assert all(DTYPES[tag].computable for tag in OUTPUT_DTYPES.values())
