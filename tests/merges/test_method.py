"""What a method says of itself: models, parameters, and what is refused with which words."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import ROOT

from bake.merges import METHODS, Method, Parameter


def roles(name: str, count: int, **more: bool) -> tuple[str, ...]:
    return METHODS[name].roles_of(count, **more)


def test_roles_of_models() -> None:
    assert roles("weighted_sum", 2) == ("a", "b")
    assert roles("add_difference", 3) == ("a", "b", "c")
    assert roles("linear", 1) == ("model",)
    assert roles("ties", 4) == ("base", "model", "model", "model")
    assert roles("nuslerp", 2) == ("model", "model")
    assert roles("nuslerp", 3, with_optional=True) == ("base", "model", "model")
    assert roles("multislerp", 4, with_optional=True) == ("base", "model", "model", "model")
    assert roles("arcee_fusion", 2) == ("base", "b")


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [
        ("weighted_sum", 3, "weighted_sum takes a, b, and here are 3"),
        ("ties", 1, "ties takes base, 1 or more models, and here are 1"),
        ("nuslerp", 3, r"nuslerp takes \[base\], 2 models, and here are 3"),
        ("linear", 0, "and here are 0"),
    ],
)
def test_a_wrong_number_of_models_is_refused(name: str, count: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        roles(name, count)


def test_numbers_of_models() -> None:
    assert (METHODS["weighted_sum"].least, METHODS["weighted_sum"].most) == (2, 2)
    assert (METHODS["ties"].least, METHODS["ties"].most) == (2, None)
    assert (METHODS["nuslerp"].least, METHODS["nuslerp"].most) == (2, 3)
    assert (METHODS["multislerp"].least, METHODS["multislerp"].most) == (2, None)


def values(name: str, given: dict[str, object], count: int) -> dict[str, object]:
    return METHODS[name].values(given, roles(name, count))


def test_values_are_completed() -> None:
    assert values("weighted_sum", {}, 2) == {"alpha": 0.5}
    assert values("linear", {"weight": [1, 2]}, 2) == {"weight": (1.0, 2.0), "normalize": True}
    found = values("ties", {"density": 0.5, "weight": [1, 2]}, 3)
    assert (found["density"], found["weight"], found["trim"], found["vote"]) == ((0.5, 0.5), (1, 2), "magnitude", "sum")


@pytest.mark.parametrize(
    ("name", "given", "count", "words"),
    [
        ("weighted_sum", {"beta": 1}, 2, "weighted_sum has no parameter beta; it has: alpha"),
        ("weighted_sum", {"alpha": float("nan")}, 2, "alpha is nan; it can be: any number"),
        ("weighted_sum", {"alpha": "much"}, 2, "alpha is 'much'; it can be: any number"),
        ("weighted_sum", {"alpha": True}, 2, "alpha is True"),
        ("crossover", {"alpha": 1.5}, 2, "alpha is 1.5; it can be: from 0 to 1"),
        ("slerp", {"norms": "long"}, 2, "norms is 'long'; it can be: raw, interpolate"),
        ("linear", {"normalize": 1}, 2, "normalize is 1; it can be: true, false"),
        ("linear", {"weight": [1, 2, 3]}, 2, "weight has 3 numbers for 2 models; give one, or one for each"),
        ("linear", {"weight": [1, -1]}, 2, "the weights add up to 0"),
        ("ties", {}, 3, r"ties needs density: the share .* \(above 0 to 1\)"),
        ("ties", {"density": 0}, 3, "density is 0; it can be: above 0 to 1"),
        ("della", {"density": 0.1, "epsilon": 0.2}, 3, "chances from -0.1 to 0.3"),
        ("karcher", {"max_iter": 2.5}, 2, "max_iter is 2.5; it can be: from 0"),
        ("weighted_subtraction", {"alpha": 1, "beta": 1}, 2, "alpha \\* beta is 1"),
        ("arcee_fusion", {"t": 1}, 2, "arcee_fusion has no parameter t; it has: none"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(name: str, given: dict, count: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        values(name, given, count)


def test_weights_that_are_not_divided_by_may_add_up_to_nothing() -> None:
    values("linear", {"weight": [1, -1], "normalize": False}, 2)
    values("task_arithmetic", {"weight": [1, -1]}, 3)
    values("ties", {"weight": [1, -1], "density": 0.5}, 3)  # divided by those that count at an element


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_line_is_complete(method: Method) -> None:
    assert method.peers
    assert method.formula
    for parameter in method.parameters:
        assert parameter.meaning
        if parameter.default is not None:
            parameter.check(parameter.default)
    many = [role for role in method.roles if role.at_least is not None]
    assert many in ([], [method.roles[-1]])
    assert not method.symmetric or many
    assert all(not parameter.per_model or many for parameter in method.parameters)


def test_spans_in_words() -> None:
    assert Parameter("t", None, "", low=0).span == "from 0"
    assert Parameter("t", None, "", low=0, above=True).span == "above 0"


def test_the_table_needs_neither_torch_nor_numpy() -> None:
    program = "import sys, bake.merges; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
