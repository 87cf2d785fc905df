"""What was asked for: presets, gradients, and the way through JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bake.errors import Unsupported, UsageError
from bake.keys.blocks import SCHEMES
from bake.plan.presets import ALIASES, PRESETS
from bake.plan.selection import Gradient, NameRule, Rule, Selection, Words

# Values as meh and supermerger print them, with ten to fifteen digits, at IN00, IN01, IN08, M00, OUT00, OUT11.
PUBLISHED = {
    "GRAD_V": (1, 0.9166666667, 0.3333333333, 0, 0.0833333333, 1),
    "GRAD_A": (0, 0.0833333333, 0.6666666667, 1, 0.9166666667, 0),
    "FLAT_25": (0.25, 0.25, 0.25, 0.25, 0.25, 0.25),
    "WRAP12": (1, 1, 0, 0, 0, 1),
    "MID12_50": (0, 0, 0.5, 0.5, 0.5, 0),
    "OUT12_5": (0, 0, 0, 0.5, 1, 1),
    "RING08_SOFT": (0, 0, 1, 0, 0, 0),
    "RING10_3": (0, 0, 1, 0, 0, 0),
    "SMOOTHSTEP": (0, 0.00506365740740741, 0.259259259259259, 0.5, 0.562355324074074, 1),
    "REVERSE_SMOOTHSTEP": (1, 0.994936342592593, 0.740740740740741, 0.5, 0.437644675925926, 0),
    "3SMOOTHSTEP": (0, 0.0151909722222222, 0.777777777777778, 0.5, 0.312934027777778, 1),
    "4R_SMOOTHSTEP": (1, 0.97974537037037, 0.0370370370370372, 1, 0.750578703703704, 1),
    "HALF_SMOOTHSTEP": (0, 0.0196759259259259, 0.740740740740741, 1, 0.980324074074074, 0),
    "ONE_THIRD_SMOOTHSTEP": (0, 0.04296875, 1, 0.5, 0.31640625, 1),
    "ONE_FOURTH_R_SMOOTHSTEP": (1, 0.925925925925926, 0.259259259259259, 1, 0.925925925925926, 1),
    "COSINE": (1, 0.995722430686905, 0.75, 0.5, 0.434736903889974, 0),
    "TRUE_CUBIC_HERMITE": (0, 0.199031876929012, 0.598765432098765, 0.520833333333333, 0.49438777970679, 1),
    "TRUE_REVERSE_CUBIC_HERMITE": (1, 0.800968123070988, 0.401234567901235, 0.479166666666667, 0.50561222029321, 0),
    "FAKE_CUBIC_HERMITE": (0, 0.157576195987654, 0.567901234567901, 0.5, 0.476152584876543, 1),
}
# As the extension's own text has them.
FOR_LORAS = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5",
    "FLUXALL": ",".join(["1"] * 61),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_computed_preset_has_the_published_values(name: str) -> None:
    values = PRESETS[name]
    assert len(values) == 26
    assert values[0] == 0  # BASE
    np.testing.assert_allclose([values[place] for place in (1, 2, 9, 13, 14, 25)], PUBLISHED[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "ones"), [("WRAP08", 8), ("WRAP12", 12), ("WRAP14", 14), ("WRAP16", 16)])
def test_a_wrap_has_as_many_ones_as_it_says_half_of_them_at_each_end(name: str, ones: int) -> None:
    half = (1.0,) * (ones // 2)
    assert PRESETS[name][1:] == (*half, *(0.0,) * (25 - ones), *half)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("RING")])
def test_a_ring_reads_the_same_backwards(name: str) -> None:
    blocks = PRESETS[name][1:]
    assert blocks == blocks[::-1]
    assert blocks.count(1.0) == {"RING08_SOFT": 6, "RING08_5": 8}.get(name, 10)
    assert blocks[12] == 0


@pytest.mark.parametrize("name", FOR_LORAS)
def test_a_preset_for_loras_has_the_extensions_values(name: str) -> None:
    assert Selection.parse(name).values == tuple(map(float, FOR_LORAS[name].split(",")))


def test_both_spellings_of_a_preset_are_known() -> None:
    assert set(ALIASES.values()) <= set(PRESETS)
    assert Selection.parse("R_SMOOTHSTEP/3") == Selection.parse("ONE_THIRD_R_SMOOTHSTEP")


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=7), st.floats(0, 1))
def test_a_gradient_is_made_of_straight_lines(values: list[float], depth: float) -> None:
    knots = np.linspace(0, 1, len(values)) if len(values) > 1 else [0.0]
    assert math.isclose(Gradient(tuple(values)).at(depth), np.interp(depth, knots, values), rel_tol=1e-9, abs_tol=1e-9)


finite = st.floats(allow_nan=False, allow_infinity=False)
word = st.from_regex(r"[A-Za-z][A-Za-z0-9_.]{0,6}", fullmatch=True).filter(lambda text: text != "NOT")
# NOT of nothing is no rule
words = st.builds(Words, st.lists(word, max_size=3).map(tuple)) | st.builds(
    Words, st.lists(word, min_size=1, max_size=3).map(tuple), st.just(True)
)
selections = st.builds(
    Selection,
    number=st.none() | finite,
    components=st.dictionaries(word, finite, max_size=3).map(lambda given: tuple(given.items())),
    values=st.lists(finite, max_size=26).map(tuple),
    preset=st.sampled_from(["", "MIDD"]),
    scheme=st.sampled_from(SCHEMES),
    gradients=st.lists(
        st.builds(Gradient, st.lists(finite, min_size=1, max_size=4).map(tuple), st.just("") | word), max_size=2
    ).map(tuple),
    rules=st.lists(st.builds(Rule, words, words, finite), max_size=3).map(tuple),
    names=st.lists(st.builds(NameRule, word, finite), max_size=2).map(tuple),
)


@given(selections)
def test_a_selection_survives_json(selection: Selection) -> None:
    assert Selection.from_json(json.loads(json.dumps(selection.to_json()))) == selection


def test_json_says_what_was_asked_for_and_nothing_else() -> None:
    assert Selection().to_json() == {}
    asked = Selection.parse("MIDD", "NOT IN05-OUT05:attn proj:0.5", "*.bias=0", "mlp=0,1;0.5", "kohya")
    assert asked.to_json() == {
        "values": [1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        "preset": "MIDD",
        "scheme": "kohya",
        "gradients": ["mlp=0,1", "0.5"],
        "rules": ["NOT IN05-OUT05:attn proj:0.5"],
        "names": ["*.bias=0"],
    }


@pytest.mark.parametrize("data", [{"valeus": [1]}, {"values": [math.nan]}, {"scheme": "x"}, {"rules": ["x"]}])
def test_json_of_another_kind_is_refused(data: dict) -> None:
    with pytest.raises(UsageError):
        Selection.from_json(data)


@pytest.mark.parametrize("number", ["nan", "inf", "-1e999"])
@pytest.mark.parametrize(
    "what",
    [{"values": "1,{}"}, {"rules": "IN04:attn:{}"}, {"names": "*bias={}"}, {"gradient": "mlp=0,{},1;0.5"}],
    ids=str,
)
def test_a_ratio_is_a_finite_number_wherever_it_stands(what: dict[str, str], number: str) -> None:
    with pytest.raises(UsageError, match="must be a finite number"):
        Selection.parse(**{key: text.format(number) for key, text in what.items()})
    with pytest.raises(UsageError, match="must be a finite number"):
        Selection(components=(("te", float(number)),))


def test_what_a_web_ui_would_draw_by_chance_is_refused_with_that_reason() -> None:
    for what in ({"values": "1,R"}, {"names": "*=U"}, {"rules": "::X"}, {"gradient": "0,R,1"}):
        with pytest.raises(Unsupported, match="drawn by chance"):
            Selection.parse(**what)


def test_words_are_split_at_the_right_places() -> None:
    assert Selection.parse(names="a=b=0.5").names == (NameRule("a=b", 0.5),)
    with pytest.raises(UsageError, match="NOT is followed by what is left out"):
        Selection.parse(rules="NOT:attn:0.5")


@given(*[st.text("INOUT0459-: .,;=*[]NTab\n", max_size=12)] * 4)
def test_any_text_is_understood_or_refused(values: str, rules: str, names: str, gradient: str) -> None:
    try:
        selection = Selection.parse(values, rules, names, gradient)
    except (UsageError, Unsupported):
        return
    assert Selection.from_json(selection.to_json()) == selection
