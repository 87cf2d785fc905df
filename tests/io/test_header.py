"""Headers: what is written is read back by everybody, and nothing malformed gets through."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from strategies import container, entry, metadata, tensor_lists

from bake.dtypes import DTYPES
from bake.errors import HeaderError
from bake.io.header import MAX_HEADER_BYTES, build_header, header_length, lay_out, parse_header


def parse(content: bytes):
    length = header_length(content[:8], len(content), "file")
    return parse_header(content[8 : 8 + length], len(content), "file")


GOOD = {"a": entry("F32", [2, 3], 0), "b": entry("BF16", [4], 24)}
DATA = bytes(32)


def test_a_header_gives_names_dtypes_shapes_and_spans() -> None:
    header = parse(container({"__metadata__": {"format": "pt"}, **GOOD}, DATA))
    assert header.metadata == {"format": "pt"}
    assert header.tensors["a"] == ("F32", (2, 3), 0, 24)
    assert header.tensors["b"] == ("BF16", (4,), 24, 32)


def test_tensors_come_in_the_order_of_their_bytes_not_of_the_json() -> None:
    header = parse(container({"b": GOOD["b"], "a": GOOD["a"]}, DATA))
    assert list(header.tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "too short"),
        (b"\0" * 7, "too short"),
        (container(GOOD, DATA)[:20], "truncated"),
        (container(GOOD, DATA[:-1]), "truncated"),
        (container(GOOD, DATA + b"\0"), "unknown bytes"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + bytes(10), "not a safetensors file"),
        ((2**64 - 1).to_bytes(8, "little") + bytes(10), "not a safetensors file"),
        (container(b"[]"), "begin"),
        (container(b" {}"), "begin"),
        (container(b"{"), "JSON"),
        (container(b'{"a": ' + b"[" * 100_000), "JSON"),
        (container(b'{"a": ' + b"9" * 5000 + b"}"), "JSON"),
        (container(b'{"\xff": 1}'), "JSON"),
        (container(b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "JSON"),
        (container(b'{"a": NaN}'), "NaN"),
        (container(b'{"__metadata__": {}, "__metadata__": {}}'), "twice"),
        (container(b'{"__metadata__": {"k": "1", "k": "2"}}'), "twice"),
        (container({"__metadata__": {"k": 1}}), "__metadata__"),
        (container({"__metadata__": []}), "__metadata__"),
        (container({"a": 1}), "not a JSON object"),
        (container({"a": {**GOOD["a"], "dtype": "F33"}}, DATA), "unknown dtype"),
        (container({"a": {**GOOD["a"], "dtype": "f32"}}, DATA), "unknown dtype"),
        (container({"a": {**GOOD["a"], "dtype": ["F32"]}}, DATA), "unknown dtype"),
        (container({"a": {**GOOD["a"], "shape": [2.0, 3]}}, DATA), "not a shape"),
        (container({"a": {**GOOD["a"], "shape": [-2, -3]}}, DATA), "not a shape"),
        (container({"a": {**GOOD["a"], "shape": [True, 6]}}, DATA), "not a shape"),
        (container({"a": {**GOOD["a"], "shape": [1] * 65 + [6]}}, DATA), "not a shape"),
        (container({"a": {**GOOD["a"], "shape": [2**40, 2**40]}}, DATA), "takes"),
        (container({"a": {**GOOD["a"], "data_offsets": [0, 23]}}, DATA[:23]), "takes"),
        (container({"a": {**GOOD["a"], "data_offsets": [24, 0]}}, DATA), "offsets"),
        (container({"a": {**GOOD["a"], "data_offsets": [0]}}, DATA), "offsets"),
        (container({"a": {**GOOD["a"], "data_offsets": [-24, 0]}}, DATA), "offsets"),
        (container(b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[-0,3]}}', b"abc"), "offsets"),
        (container(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "not a shape"),
        (container({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"\0"), "takes"),
        (container({"a": GOOD["a"], "b": {**GOOD["b"], "data_offsets": [20, 28]}}, DATA[:28]), "overlaps"),
        (container({"a": GOOD["a"], "b": {**GOOD["a"]}}, DATA[:24]), "overlaps"),
        (container({"a": GOOD["a"], "b": {**GOOD["b"], "data_offsets": [25, 33]}}, bytes(33)), "hole"),
        (container({"b": GOOD["b"]}, DATA), "hole"),
    ],
)
def test_a_malformed_header_is_refused_with_what_is_wrong(content: bytes, complaint: str) -> None:
    with pytest.raises(HeaderError, match=complaint):
        parse(content)


def test_the_same_name_twice_is_refused_although_the_library_takes_the_last() -> None:
    one = json.dumps(entry("U8", [1], 0))
    with pytest.raises(HeaderError, match="'a' twice"):
        parse(container(f'{{"a": {one}, "a": {one}}}'.encode(), b"\0"))


def test_the_name_of_the_tensor_at_fault_is_in_the_details() -> None:
    with pytest.raises(HeaderError) as caught:
        parse(container({"a": GOOD["a"], "b": {**GOOD["b"], "dtype": "X"}}, DATA))
    assert caught.value.details["tensor"] == "b"


@given(tensor_lists(), metadata)
def test_a_built_header_is_read_back_by_bake_and_by_the_library(tensors, extra) -> None:
    placed = lay_out(tensors)
    header = build_header(placed, extra)
    end = max((info.end for info in placed.values()), default=0)
    content = header + bytes(end)
    assert parse(content).tensors == dict(placed)
    assert parse(content).metadata == extra
    assert len(header) % 8 == 0
    assert len(placed) == len(tensors)


@given(tensor_lists())
def test_every_tensor_is_aligned_to_its_item_size(tensors) -> None:
    for info in lay_out(tensors).values():
        assert info.begin % (DTYPES[info.dtype].bits // 8) == 0


@given(st.lists(st.sampled_from(["F32", "F16", "U8"]), min_size=1, max_size=6))
def test_an_order_that_aligns_is_kept(dtypes) -> None:
    tensors = [(f"t{place}", dtype, (8,)) for place, dtype in enumerate(dtypes)]
    assert list(lay_out(tensors)) == [name for name, _, _ in tensors]


def test_a_written_file_opens_in_the_safetensors_library(tmp_path: Path) -> None:
    placed = lay_out([("odd", "U8", (3,)), ("wide", "F32", (2,)), ("empty", "F16", (0, 4)), ("scalar", "I64", ())])
    end = max(info.end for info in placed.values())
    path = tmp_path / "file.safetensors"
    path.write_bytes(build_header(placed, {"format": "pt", "a": "1"}) + bytes(end))
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {"odd", "wide", "empty", "scalar"}
        assert file.metadata() == {"format": "pt", "a": "1"}


def test_a_header_starts_as_web_uis_insist_and_does_not_depend_on_the_order_of_metadata() -> None:
    placed = lay_out([("a", "F32", (1,))])
    one = build_header(placed, {"b": "1", "a": "2"})
    assert one == build_header(placed, {"a": "2", "b": "1"})
    assert one[8:10] == b'{"'
    assert build_header(placed, {})[8:10] == b'{"'


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_header_or_a_typed_refusal(noise: bytes) -> None:
    with contextlib.suppress(HeaderError):
        parse(noise)


@given(st.data())
def test_what_bake_accepts_the_library_accepts(data) -> None:
    """A valid file with one byte of its header changed: bake is never laxer than the reference reader."""
    good = container({"__metadata__": {"k": "v"}, **GOOD}, DATA)
    place = data.draw(st.integers(8, len(good) - len(DATA) - 1))
    broken = bytearray(good)
    broken[place] = data.draw(st.integers(0, 255))
    try:
        parse(bytes(broken))
    except HeaderError:
        return
    from safetensors import deserialize

    try:
        deserialize(bytes(broken))
    except SafetensorError as error:
        raise AssertionError(f"bake accepts what the library refuses: {error}") from None
