"""What every algorithm must keep: one table each, factors by name, zero at weight zero, rows alone."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from bake.adapters import DELTAS, LOW_RANK, STORED, TRANSFORMS
from bake.adapters.chain import Chain
from bake.keys.factors import ALGORITHMS, SCALARS, Decomposition, algorithm_of, as_matrix

ROWS = [row for row in ALGORITHMS if row.extent is not None]
TABLES = (LOW_RANK, DELTAS, STORED, TRANSFORMS)

# (shape of the weight, factors, further settings) of small modules: every algorithm in every form it has.
EXAMPLES: dict[str, list[tuple[tuple[int, ...], dict[str, tuple[int, ...]], dict[str, float]]]] = {
    "lora": [
        ((6, 5), {"up": (6, 2), "down": (2, 5)}, {}),
        ((6, 5, 3, 3), {"up": (6, 2, 1, 1), "down": (2, 5, 3, 3)}, {}),
        ((6, 5, 3, 3), {"up": (6, 2, 1, 1), "down": (3, 5, 1, 1), "mid": (2, 3, 3, 3)}, {}),
        ((6, 5), {"up": (6, 0), "down": (0, 5)}, {}),
    ],
    "adalora": [((6, 5), {"up": (6, 2), "down": (2, 5), "lora_e": (2, 1)}, {})],
    "vera": [
        ((6, 5), {"vera_lambda_b": (6,), "vera_lambda_d": (2,), "vera_a": (2, 7), "vera_b": (9, 2)}, {"in_features": 5})
    ],
    "full": [((6, 5), {"diff": (6, 5)}, {}), ((6, 5, 3, 3), {"diff": (6, 5, 3, 3)}, {}), ((6,), {"diff": (6,)}, {})],
    "set": [((6, 5), {"value": (6, 5)}, {}), ((6,), {"value": (6,)}, {})],
    "loha": [
        ((6, 5), {"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (6, 3), "w2_b": (3, 5)}, {}),
        (
            (6, 5, 3, 3),
            {"w1_a": (2, 6), "w1_b": (2, 5), "t1": (2, 2, 3, 3), "w2_a": (2, 6), "w2_b": (2, 5), "t2": (2, 2, 3, 3)},
            {},
        ),
    ],
    "lokr": [
        ((6, 6), {"kron_w1": (2, 3), "kron_w2": (3, 2)}, {}),
        ((6, 6), {"kron_w1_a": (2, 1), "kron_w1_b": (1, 3), "kron_w2_a": (3, 2), "kron_w2_b": (2, 2)}, {}),
        ((6, 6, 3, 3), {"kron_w1": (2, 3), "kron_w2": (3, 2, 3, 3)}, {}),
        (
            (6, 6, 3, 3),
            {"kron_w1": (2, 3), "kron_w2_a": (2, 3), "kron_w2_b": (2, 2), "kron_t2": (2, 2, 3, 3)},
            {},
        ),
    ],
    "sparse": [],  # its positions are values: tests/adapters/test_sparse_bias.py
    "glora": [((6, 5), {"a1": (5, 2), "a2": (2, 5), "b1": (6, 2), "b2": (2, 5)}, {"scale": 0.5})],
    "ia3": [((6, 5), {"ia3_weight": (6,), "on_input": ()}, {})],
    "ia3-peft": [((6, 5), {"ia3_l": (6, 1)}, {}), ((6, 5), {"ia3_l": (1, 5)}, {})],
    "oft": [((6, 5), {"oft_blocks": (3, 2, 2)}, {}), ((6, 5), {"oft_blocks": (2, 3, 3), "rescale": (6, 1)}, {})],
    "boft": [((8, 5), {"oft_blocks": (2, 4, 2, 2)}, {})],
    "oft-diag": [((6, 5), {"oft_diag": (3, 2, 2)}, {})],
    "oft-peft": [((6, 4), {"oft_r": (2, 1)}, {}), ((6, 9), {"oft_r": (1, 3)}, {})],
    "boft-peft": [((6, 8), {"boft_r": (2, 4, 2, 2), "boft_s": (6, 1)}, {})],
    "hra": [((6, 5), {"hra_u": (5, 2)}, {})],
}
CASES = [(name, *example) for name, examples in EXAMPLES.items() for example in examples]
ADDITIVE = [case for case in CASES if case[0] in LOW_RANK or case[0] in DELTAS or case[0] == "full"]


@dataclass(frozen=True)
class SmallTerm:
    """A term of a chain, on a whole tensor unless said otherwise."""

    algorithm: str
    factors: Mapping[str, object]
    weight: float
    rows: tuple[int, int]
    columns: tuple[int, int]
    part: tuple[int, int]
    height: int
    scale: float = 1.0
    transposed: bool = False
    dora: Decomposition | None = None
    settings: Mapping[str, float | None] = field(default_factory=dict)
    rank_limit: int | None = None
    turn: int = 0


class Held:
    """Factors that are already tensors."""

    def whole(self, term: SmallTerm, name: str) -> Tensor:
        return term.factors[name]

    def rows(self, term: SmallTerm, name: str, rows: range) -> Tensor:
        stored = term.factors[name]
        return stored.reshape(stored.shape[0], -1)[rows.start : rows.stop]


def random(shape, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(shapes) -> dict[str, Tensor]:
    held = {name: random(shape, place) / 2 for place, (name, shape) in enumerate(shapes.items())}
    return {name: torch.zeros(()) if name == "on_input" else value for name, value in held.items()}


def term(name: str, shape, shapes, settings, weight: float = 1.0, **changes) -> SmallTerm:
    height, width = as_matrix(shape)
    whole = {"rows": (0, height), "columns": (0, width), "part": (0, height), "height": height}
    return SmallTerm(name, factors(shapes), weight, settings=settings, **{**whole, **changes})


def giving(weight: Tensor) -> Callable[[range], Tensor]:
    """Where a chain gets its rows from: always in the same memory, and what was there is gone."""
    memory = torch.empty(weight.shape, dtype=torch.float64)

    def base(rows: range) -> Tensor:
        return memory.fill_(torch.nan)[: len(rows)].copy_(weight[rows.start : rows.stop])

    return base


def run(shape, terms, rows: range | None = None) -> tuple[Tensor, Tensor]:
    """(weight before, after) of these rows."""
    weight = random(as_matrix(shape), 99)
    wanted = rows if rows is not None else range(weight.shape[0])
    after = Chain(shape, terms, Held()).rows(wanted, giving(weight))
    return weight[wanted.start : wanted.stop], after


def test_every_algorithm_is_in_one_table_and_has_an_example() -> None:
    named = [name for table in TABLES for name in table]
    assert sorted(named) == sorted({row.name for row in ROWS}) == sorted(EXAMPLES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join((row.name, *row.required)))
def test_the_parameters_of_the_maths_are_the_factors_of_the_row(row) -> None:
    if row.name in STORED:
        return
    function = next(table[row.name] for table in TABLES if row.name in table)
    taken = set(inspect.signature(function).parameters)
    assert set(row.factors) - {"magnitude"} - set(SCALARS) <= taken
    text = (inspect.getdoc(function) or "") + (inspect.getmodule(function).__doc__ or "")
    assert "Source" in text or "arXiv" in text or "Source" in (function.__init__.__doc__ or "")


@pytest.mark.parametrize(("name", "shape", "shapes", "settings"), CASES)
def test_the_factors_name_the_algorithm_and_the_tensor_it_fits(name, shape, shapes, settings) -> None:
    row = algorithm_of(shapes)
    assert row.name == name
    for said, there in zip(row.extent(shapes), as_matrix(shape), strict=True):
        assert said is None or said == there


@pytest.mark.parametrize(("name", "shape", "shapes", "settings"), CASES)
def test_weight_zero_changes_nothing_and_weight_one_something(name, shape, shapes, settings) -> None:
    before, after = run(shape, [term(name, shape, shapes, settings, 0.0)])
    assert torch.equal(before, after)
    before, after = run(shape, [term(name, shape, shapes, settings, 1.0)])
    assert torch.isfinite(after).all()
    assert 0 in {size for sizes in shapes.values() for size in sizes} or not torch.equal(before, after)


@pytest.mark.parametrize(("name", "shape", "shapes", "settings"), ADDITIVE)
def test_additive_updates_add_up(name, shape, shapes, settings) -> None:
    before, one = run(shape, [term(name, shape, shapes, settings)])
    _, three = run(shape, [term(name, shape, shapes, settings, 3.0)])
    torch.testing.assert_close(three - before, 3 * (one - before))


@pytest.mark.parametrize(("name", "shape", "shapes", "settings"), CASES)
def test_every_row_alone_is_the_row_of_the_whole(name, shape, shapes, settings) -> None:
    terms = [term(name, shape, shapes, settings, 0.7), term("full", shape, {"diff": shape}, {}, -0.5)]
    _, whole = run(shape, terms)
    for row in range(whole.shape[0]):
        _, alone = run(shape, terms, range(row, row + 1))
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "shape", "shapes", "settings"), [case for case in CASES if len(case[1]) == 2])
def test_a_transposed_target_gets_the_transposed_update(name, shape, shapes, settings) -> None:
    weight = random(shape, 99)
    straight = Chain(shape, [term(name, shape, shapes, settings, 0.7)], Held())
    expected = straight.rows(range(shape[0]), giving(weight))
    turned = term(*(name, shape, shapes, settings, 0.7), transposed=True, rows=(0, shape[1]), columns=(0, shape[0]))
    chain = Chain(shape[::-1], [turned], Held())
    found = chain.rows(range(shape[1]), giving(weight.T))
    torch.testing.assert_close(found.T, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "shape", "shapes", "settings"), [case for case in CASES if len(case[1]) == 2])
def test_rows_of_a_fused_tensor_are_changed_like_a_tensor_of_their_own(name, shape, shapes, settings) -> None:
    height, width = shape
    weight = random((height + 7, width + 3), 98)
    own = weight[4 : 4 + height, :width]
    straight = Chain(shape, [term(name, shape, shapes, settings, 0.7)], Held())
    expected = straight.rows(range(height), giving(own))
    inside = term(name, shape, shapes, settings, 0.7, rows=(4, 4 + height))
    chain = Chain(tuple(weight.shape), [inside], Held())
    found = chain.rows(range(height + 7), giving(weight))
    torch.testing.assert_close(found[4 : 4 + height, :width], expected, rtol=1e-12, atol=1e-12)
    found[4 : 4 + height, :width] = own
    assert torch.equal(found, weight)


BY_ROWS = [
    case for case in CASES if len(case[1]) == 2 and case[1][0] == 6 and algorithm_of(case[2]).block(case[2]) in (1, 3)
]


@pytest.mark.parametrize(("name", "shape", "shapes", "settings"), BY_ROWS)
def test_the_halves_of_an_update_can_go_to_different_places(name, shape, shapes, settings) -> None:
    """A fused module over split tensors, or swapped halves of one."""
    weight = random(shape, 99)
    straight = Chain(shape, [term(name, shape, shapes, settings, 0.7)], Held())
    expected = straight.rows(range(6), giving(weight))
    swapped = torch.cat([weight[3:], weight[:3]])
    parts = [
        term(name, shape, shapes, settings, 0.7, rows=(0, 3), part=(3, 6)),
        term(name, shape, shapes, settings, 0.7, rows=(3, 6), part=(0, 3)),
    ]
    found = Chain(shape, parts, Held()).rows(range(6), giving(swapped))
    torch.testing.assert_close(torch.cat([found[3:], found[:3]]), expected, rtol=1e-12, atol=1e-12)


DECOMPOSED = [case for case in ADDITIVE if case[0] in ("lora", "loha", "lokr") and 0 not in case[2].get("up", (1,))]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0, -0.5])
@pytest.mark.parametrize(("name", "shape", "shapes", "settings"), DECOMPOSED)
def test_dora_goes_around_every_additive_update(name, shape, shapes, settings, strength, axis) -> None:
    magnitude = random((shape[axis],), 7).abs() + 0.5
    plain = term(name, shape, shapes, settings)
    before, updated = run(shape, [plain])
    values = updated.reshape(shape)
    others = tuple(number for number in range(len(shape)) if number != axis)
    norms = values.square().sum(others, keepdim=True).sqrt()
    sized = magnitude.reshape([-1 if number == axis else 1 for number in range(len(shape))])
    new = (values * sized / (norms + 2.0**-23)).reshape(before.shape)
    expected = before + strength * (new - before)
    wrapped = SmallTerm(
        name,
        {**plain.factors, "magnitude": magnitude},
        strength,
        *(plain.rows, plain.columns, plain.part, plain.height),
        dora=Decomposition(axis, 2.0**-23),
        settings=settings,
    )
    _, found = run(shape, [wrapped])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for row in range(shape[0]):
        _, alone = run(shape, [wrapped], range(row, row + 1))
        torch.testing.assert_close(alone, expected[row : row + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("turn", [0, 2, 4])
@pytest.mark.parametrize(
    ("name", "shapes"), [("oft", {"oft_blocks": (2, 3, 3)}), ("lora", {"up": (6, 2), "down": (2, 5)})]
)
def test_a_turned_term_sees_the_rows_in_its_own_order(name: str, shapes: Mapping, turn: int) -> None:
    shape = (6, 5)
    made = factors(shapes)
    dora = Decomposition(1, 0.0) if name == "lora" else None
    if dora is not None:
        made["magnitude"] = random((1, 5), 7).abs() + 0.5
    whole = SmallTerm(name, made, 0.7, (0, 6), (0, 5), (0, 6), 6, dora=dora)
    before, found = run(shape, [replace(whole, turn=turn)])
    rolled = before.roll(-turn, 0)
    expected = Chain(shape, [whole], Held()).rows(range(6), giving(rolled)).roll(turn, 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for row in range(6):
        _, alone = run(shape, [replace(whole, turn=turn)], range(row, row + 1))
        torch.testing.assert_close(alone, expected[row : row + 1], rtol=1e-12, atol=1e-12)


def test_terms_are_applied_in_order_each_to_what_the_one_before_made() -> None:
    shape = (6, 5)
    rotation = ("oft", shape, {"oft_blocks": (3, 2, 2)}, {})
    diff = ("full", shape, {"diff": shape}, {})
    _, first = run(shape, [term(*diff)])
    rotated_sum = Chain(shape, [term(*rotation)], Held()).rows(range(6), giving(first))
    _, both = run(shape, [term(*diff), term(*rotation)])
    _, other = run(shape, [term(*rotation), term(*diff)])
    torch.testing.assert_close(both, rotated_sum, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(both, other)


# Algorithms without a matrix product over what a block holds: not even the last bit knows how rows were asked for.
BLOCKLESS = [case for case in CASES if case[0] in ("lokr", "full", "set", "ia3", "ia3-peft")]


@pytest.mark.parametrize("dora", [None, Decomposition(0, 0.0), Decomposition(1, 0.0)], ids=["", "rows", "columns"])
@pytest.mark.parametrize("shape", [(48, 40), (48, 8, 3, 3)])
def test_blocks_of_any_size_give_the_same_bits(shape, dora: Decomposition | None) -> None:
    kernel = shape[2:]
    shapes = {"kron_w1": (4, 2), "kron_w2_a": (12, 3), "kron_w2_b": (3, shape[1] // 2, *kernel)}
    one = term("lokr", shape, shapes, {}, dora=dora)
    if dora is not None:
        one = replace(one, factors={**one.factors, "magnitude": random((shape[dora.axis],), 7).abs() + 0.5})
    before, whole = run(shape, [one])
    assert not torch.equal(before, whole)
    for size in (1, 5, 12, 31):
        pieces = [run(shape, [one], range(at, min(48, at + size)))[1] for at in range(0, 48, size)]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize(("name", "shape", "shapes", "settings"), BLOCKLESS)
def test_a_row_alone_has_the_bits_of_the_whole(name, shape, shapes, settings) -> None:
    terms = [term(name, shape, shapes, settings, 0.7)]
    _, whole = run(shape, terms)
    rows = [run(shape, terms, range(row, row + 1))[1] for row in range(len(whole))]
    assert torch.equal(torch.cat(rows), whole)


def decomposed(axis: int, factors_of: Mapping[str, Tensor], strength: float, shape) -> SmallTerm:
    height, width = as_matrix(shape)
    places = ((0, height), (0, width), (0, height), height)
    return SmallTerm("lora", factors_of, strength, *places, dora=Decomposition(axis, 0.0))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_a_row_or_channel_that_the_update_takes_away_stays_and_the_others_change(axis: int, strength: float) -> None:
    shape = (6, 5)
    weight = random(shape, 99)
    up, down = torch.zeros(6, 1, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)
    if axis == 0:
        up[2], down[0] = 1, -weight[2]
    else:
        up[:, 0], down[0, 2] = -weight[:, 2], 1
    made = {"up": up, "down": down, "magnitude": torch.full((shape[axis],), 3.0, dtype=torch.float64)}
    chain = Chain(shape, [decomposed(axis, made, strength, shape)], Held())
    lengths = weight.norm(dim=1 - axis, keepdim=True)
    expected = weight * (strength * 3 / lengths + 1 - strength)
    expected.select(axis, 2).copy_(weight.select(axis, 2))
    for size in (6, 2):
        pieces = [chain.rows(range(at, at + size), giving(weight)).clone() for at in range(0, 6, size)]
        torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-12, atol=1e-12)


class TestLengthsOfColumns:
    """All threads that work on a tensor share the pass over its rows."""

    SHAPE = (4000, 70)  # several blocks

    def chain(self) -> Chain:
        made = factors({"up": (4000, 2), "down": (2, 70), "magnitude": (70,)})
        return Chain(self.SHAPE, [decomposed(1, made, 1.0, self.SHAPE)], Held())

    def test_any_number_of_threads_gives_the_same_bits_and_reads_each_row_once_for_them(self) -> None:
        weight = random(self.SHAPE, 99)
        expected = self.chain().rows(range(4000), giving(weight))
        chain, seen = self.chain(), Counter()

        def work(rows: range) -> Tensor:
            own = giving(weight)

            def base(rows: range) -> Tensor:
                seen.update(rows)
                return own(rows)

            return chain.rows(rows, base)

        with ThreadPoolExecutor(4) as pool:
            pieces = list(pool.map(work, [range(at, at + 500) for at in range(0, 4000, 500)]))
        torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-14, atol=0)
        assert seen == dict.fromkeys(range(4000), 2)
        alone = self.chain()
        again = [alone.rows(range(at, at + 500), giving(weight)).clone() for at in range(0, 4000, 500)]
        assert torch.equal(torch.cat(pieces), torch.cat(again))

    def test_rows_that_cannot_be_read_stop_every_thread(self) -> None:
        chain = self.chain()

        def base(rows: range) -> Tensor:
            raise OSError("gone")

        with ThreadPoolExecutor(2) as pool:
            for found in [pool.submit(chain.rows, range(at, at + 500), base) for at in (0, 500)]:
                with pytest.raises(OSError, match="gone"):
                    found.result(timeout=60)
