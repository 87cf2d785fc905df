"""Hypothesis strategies: tensors, headers, JSON documents, and the ways in which they can be broken."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st

from bake.dtypes import DTYPES

WHOLE_BYTES = [tag for tag, row in DTYPES.items() if row.bits % 8 == 0]

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
metadata = st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=4)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) with distinct names."""
    found = draw(st.lists(st.tuples(names, st.sampled_from(WHOLE_BYTES), shapes), max_size=8))
    return list({name: (name, dtype, shape) for name, dtype, shape in found}.values())


def container(entries: Any, data: bytes = b"", pad: bytes = b"") -> bytes:
    """A file around a header given as data or as text."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    text += pad
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int) -> dict[str, Any]:
    """A correct header entry."""
    size = math.prod(shape) * DTYPES[dtype].bits // 8
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}


_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), _texts, st.sampled_from(sorted(DTYPES))
)
documents = st.recursive(
    _leaves, lambda inside: st.lists(inside, max_size=4) | st.dictionaries(_texts, inside, max_size=4), max_leaves=12
)


@st.composite
def spoiled(draw: st.DrawFn, document: Any) -> Any:
    """`document` with one of the values in it replaced by an arbitrary one."""
    if not isinstance(document, (dict, list)) or not document or draw(st.integers(0, 4)) == 0:
        return draw(documents)
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = draw(st.sampled_from(keys))
    changed = spoiled(document[key])
    if isinstance(document, dict):
        return {**document, key: draw(changed)}
    return [*document[:key], draw(changed), *document[key + 1 :]]
