"""Patterns from a stranger's file: PEFT's meaning, in bounded time."""

from __future__ import annotations

import pytest

from bake.errors import Unsupported
from bake.identify.patterns import Patterns


def test_the_first_match_counts() -> None:
    patterns = Patterns({r".*\.mlp\..*": 1, "up_proj": 2, "down_proj": 3, r"layers\.[01]\..*": 4})
    assert patterns.find("model.layers.0.mlp.up_proj") == 1
    assert patterns.find("up_proj") == 2
    assert patterns.find("layers.1.attn.down_proj") == 3
    assert patterns.find("model.layers.1.attn") == 4
    assert patterns.find("model.layers.2.attn", "default") == "default"


def test_names_match_whole_or_from_a_dot_on() -> None:
    patterns = Patterns({"q_proj": 1})
    assert patterns.find("a.q_proj") == 1
    assert patterns.find("my_q_proj") is None
    assert patterns.find("q_proj.a") is None


def test_it_is_a_mapping() -> None:
    patterns = Patterns({"a": 1.0, "b": 2.0})
    assert (dict(patterns), len(patterns), patterns["b"]) == ({"a": 1.0, "b": 2.0}, 2, 2.0)
    assert not Patterns()


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(a|aa)(a|aa)(a|aa)(a|aa)(a|aa)", "a?" * 30 + "a" * 30, ".*.*.*x", "(x" * 500, "[a]" * 400],
)
def test_patterns_that_could_run_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(Unsupported):
        Patterns({pattern: 1})


def test_the_worst_that_passes_comes_to_an_end() -> None:
    patterns = Patterns({r"(.*)(.*)(a?)!": 1})
    assert patterns.find("a." * 128) is None


def test_a_very_long_path_is_refused_not_searched() -> None:
    with pytest.raises(Unsupported, match="too long"):
        Patterns({".*x": 1}).find("a." * 200)


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.(0|1|2)\.self_attn\.(q|k)_proj",
        r".*\.gate_up_proj",
        r"^transformer_blocks\.[0-9]+\.attn",
        "single",
    ],
)
def test_what_trainers_write_passes(pattern: str) -> None:
    assert len(Patterns({pattern: 1})) == 1


def test_thousands_of_plain_names_are_looked_up_not_tried() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(40) for expert in range(100)]
    patterns = Patterns({name: float(place) for place, name in enumerate(names)})
    assert [patterns.find("base." + name) for name in names] == [float(place) for place in range(len(names))]
