"""YAML into nodes with places: what YAML 1.2 says, and nothing that runs code or fills the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bake.errors import InputError
from bake.recipes.document import MOST_BYTES, Entries, Items, Node, Scalar, parse_document, read_document

FILE = Path("folder") / "recipe.yaml"


def parsed(text: str | bytes) -> Node:
    return parse_document(text.encode() if isinstance(text, str) else text, FILE)


def plain(node: Node) -> Any:
    """A node as Python data."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return {name: plain(value) for name, value in node.entries.items()}


def test_nodes_know_where_they_stand() -> None:
    found = parsed("base: a.safetensors\nloras:\n  - b.safetensors\n  - {path: c, weight: 0.5}\n")
    assert isinstance(found, Entries)
    assert [str(mark) for mark in found.keys.values()] == [f"{FILE}:1:1", f"{FILE}:2:1"]
    loras = found.entries["loras"]
    assert isinstance(loras, Items)
    assert [(item.mark.line, item.mark.column) for item in loras.items] == [(3, 5), (4, 5)]
    second = loras.items[1]
    assert isinstance(second, Entries)
    assert (second.entries["weight"].mark.line, second.entries["weight"].mark.column) == (4, 23)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-0.5", -0.5),
        ("1e-5", 1e-5),
        (".5", 0.5),
        ("18446744073709551615", 18446744073709551615),
        (".inf", float("inf")),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("yes", "yes"),  # YAML 1.1 would have true
        ("no", "no"),
        ("1:30", "1:30"),  # YAML 1.1 would have 90
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("a.safetensors:0.7:te=0.5", "a.safetensors:0.7:te=0.5"),
        ("|\n  1\n", "1\n"),
    ],
)
def test_scalars_are_what_yaml_1_2_says(text: str, value: object) -> None:
    found = plain(parsed(f"key: {text}"))["key"]
    assert found == value
    assert type(found) is type(value)


def test_aliases_and_merge_keys_are_written_out() -> None:
    found = plain(parsed("a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\nd: {<<: [*a, {z: 4, x: 5}]}\n"))
    assert found == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 3}, "d": {"x": 1, "y": 2, "z": 4}}


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("", "1:1", "empty"),
        ("# nothing\n", "1:1", "empty"),
        ("a: [1, 2\nb: 3\n", "2:2", "while parsing a flow sequence"),
        ("a: 1\n b: 2\n", "2:3", "mapping values are not allowed here"),
        ("a: 'open\n", "2:1", "while scanning a quoted scalar"),
        ("\tb: 1\n", "1:1", "cannot start any token"),
        ("a: *nowhere\n", "1:4", "undefined alias"),
        ("a: 1\n---\nb: 2\n", "2:1", "single document"),
        ("a: 1\nb: 2\na: 3\n", "3:1", "'a' stands here twice; first in line 1"),
        ("a: !!python/object/apply:os.system ['true']\n", "1:4", "tags"),
        ("!!python/object:x {}\n", "1:1", "tags"),
        ("a: !env HOME\n", "1:4", "tags"),
        ("? [1, 2]\n: 3\n", "1:3", "a key is one word"),
        ("a: {<<: 3}\n", "1:9", "<< takes in mappings"),
        ("a: &a [*a]\n", "1:4", "larger or deeper"),
        (BOMB, None, "larger or deeper"),
        ("[" * 300, "1:25", "nested deeper"),
        ('a: "\\x00"\n', "1:4", "a control character"),
        ('a: "\\uD800"\n', "1:4", "a control character"),
        ('a: "\\UFFFFFFFF"\n', None, "not valid YAML"),
        ("%YAML 1" + "1" * 5000 + ".1\n---\na: 1\n", None, "not valid YAML"),
        (b"a: \xff\n", "1:4", "not UTF-8"),
        (b"b: 1\na: \x07\n", "2:4", "a character that YAML does not allow"),
    ],
)
def test_what_a_recipe_may_not_be_is_refused_with_its_place(text: str | bytes, place: str | None, says: str) -> None:
    with pytest.raises(InputError, match=says) as refused:
        parsed(text)
    assert refused.value.exit_code == 3
    if place is not None:
        assert refused.value.message.startswith(f"{FILE}:{place}: "), refused.value.message
    assert refused.value.message.startswith(f"{FILE}:")
    assert len(refused.value.message) < 400


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert plain(parsed(b"\xef\xbb\xbfa: 1\n")) == {"a": 1}


def test_a_file_that_is_far_too_large_or_none_is_refused(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(InputError, match="a recipe has 1048576 at most"):
        read_document(large)
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(InputError):
            read_document(path)


words = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Z"]), max_size=8)
documents = st.recursive(
    st.one_of(words, st.integers(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=10,
)


@given(st.dictionaries(words, documents, max_size=5).filter(bool))
def test_what_pyyaml_writes_is_read_as_it_was(document: dict[str, Any]) -> None:
    text = yaml.safe_dump(document)
    if "<<" not in text:
        assert plain(parsed(text)) == document
