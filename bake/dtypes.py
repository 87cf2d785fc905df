"""The stored dtypes of the safetensors format, as a table that needs neither torch nor NumPy."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Literal

Kind = Literal["float", "int", "bool", "complex"]


@dataclass(frozen=True, slots=True)
class DType:
    """One stored dtype."""

    tag: str  # as the header spells it, e.g. "BF16"
    bits: int  # per element; below 8 several elements share a byte
    kind: Kind
    torch: str | None  # attribute name in the torch module; None where torch has no such dtype
    mantissa: int = 0  # explicitly stored significand bits of a float that bake can compute with
    largest: float = 0.0  # largest finite value of such a float

    @property
    def computable(self) -> bool:
        """True for floats that widen exactly to float32 or float64 and can be rounded back."""
        return self.mantissa > 0

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number; below it the spacing of values stays the same."""
        return _SMALLEST_EXPONENTS[self.tag]

    @property
    def overflow(self) -> float:
        """Numbers of this magnitude and above round to infinity (or saturate, in fp8)."""
        return self.largest + 2.0 ** (math.frexp(self.largest)[1] - 2 - self.mantissa)


# Rows fall from wide to narrow: the order in which the safetensors library lays tensors out.
_ROWS = (
    DType("U64", 64, "int", "uint64"),
    DType("I64", 64, "int", "int64"),
    DType("F64", 64, "float", "float64", 52, 1.7976931348623157e308),
    DType("C64", 64, "complex", "complex64"),
    DType("F32", 32, "float", "float32", 23, 3.4028234663852886e38),
    DType("U32", 32, "int", "uint32"),
    DType("I32", 32, "int", "int32"),
    DType("BF16", 16, "float", "bfloat16", 7, 3.3895313892515355e38),
    DType("F16", 16, "float", "float16", 10, 65504.0),
    DType("U16", 16, "int", "uint16"),
    DType("I16", 16, "int", "int16"),
    DType("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz"),
    DType("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz"),
    DType("F8_E8M0", 8, "float", "float8_e8m0fnu"),
    DType("F8_E4M3", 8, "float", "float8_e4m3fn", 3, 448.0),
    DType("F8_E5M2", 8, "float", "float8_e5m2", 2, 57344.0),
    DType("I8", 8, "int", "int8"),
    DType("U8", 8, "int", "uint8"),
    DType("F6_E3M2", 6, "float", None),
    DType("F6_E2M3", 6, "float", None),
    DType("F4", 4, "float", None),
    DType("BOOL", 8, "bool", "bool"),
)
_SMALLEST_EXPONENTS = {"F64": -1022, "F32": -126, "BF16": -126, "F16": -14, "F8_E4M3": -6, "F8_E5M2": -14}
DTYPES = {row.tag: row for row in _ROWS}
RANK = {row.tag: place for place, row in enumerate(_ROWS)}

# What users type, and what the header says.
OUTPUT_DTYPES = {
    "fp32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
    "fp8_e4m3fn": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2",
    # with a scale for each layer, see bake.keys.scaled
    "fp8_e4m3fn_scaled": "F8_E4M3",
    "fp8_e5m2_scaled": "F8_E5M2",
    "fp8_e4m3fn_scaled_old": "F8_E4M3",
}

SMALLEST_SCALE = 2.0**-126  # of a scaled layer: a scale is a normal float32, also where all values are zero


def tensor_bytes(tag: str, elements: int) -> int | None:
    """Bytes that `elements` values of dtype `tag` take; None if they do not fill whole bytes."""
    bits = DTYPES[tag].bits * elements
    return None if bits % 8 else bits // 8


_STRUCT = {
    **{"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "U64": "<Q", "I32": "<i", "U32": "<I"},
    **{"I16": "<h", "U16": "<H", "I8": "<b", "U8": "<B", "BOOL": "<?"},
}


def decode_scalar(tag: str, raw: bytes) -> float:
    """The first value stored in `raw`, as a Python float: alpha comes in every dtype there is."""
    if tag == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw[:2])[0])
    if tag == "F8_E5M2":  # the upper byte of a half
        return float(struct.unpack("<e", b"\0" + raw[:1])[0])
    if tag == "F8_E4M3":
        return _decode_e4m3(raw[0])
    layout = _STRUCT.get(tag)
    if layout is None:
        raise ValueError(f"cannot read a number of dtype {tag}")
    return float(struct.unpack(layout, raw[: struct.calcsize(layout)])[0])


def _decode_e4m3(byte: int) -> float:
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, fraction = (byte >> 3) & 0xF, byte & 0x7
    if exponent == 0xF and fraction == 0x7:
        return float("nan")
    if exponent == 0:
        return float(sign * fraction * 2.0**-9)
    return float(sign * (1 + fraction / 8) * 2.0 ** (exponent - 7))
