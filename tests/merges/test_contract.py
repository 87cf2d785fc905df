"""What every method must keep, whatever its formula: chunks, threads and order change no bit, the ends are exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from merging import GIVEN, SHAPES, chunks_of, count_of, job_for, merge, models_for, same_bits, survey

from bake.merges import METHODS
from bake.merges.merge import Chunk
from bake.merges.method import never

NAMES = sorted(METHODS)
BLENDS = {"element", "row", "two-pass", "whole", "global"}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear", "dropout")


def test_the_table_names_every_method_and_every_file_of_maths_is_used() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert {method.reach for method in METHODS.values()} == BLENDS
    assert len(METHODS) == len({method.meaning + method.formula for method in METHODS.values()})


@pytest.mark.parametrize("name", NAMES)
def test_method_is_what_its_line_says(name: str) -> None:
    method = METHODS[name]
    work = method.load()
    assert work.whole == (method.reach == "whole")
    assert ("agree" in vars(work)) == (method.reach == "global")
    models = models_for(count_of(name), (4, 6))
    merging = work(job_for(name, models, GIVEN.get(name, {})))
    passes = survey(merging, chunks_of(merging, models))
    assert (passes > 0) == (method.reach in ("two-pass", "global"))


@pytest.mark.parametrize("shape", [(7, 5), (16, 6, 3, 3), (13,)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_their_order_and_threads_change_no_bit(name: str, shape: tuple[int, ...]) -> None:
    models = models_for(count_of(name), shape)
    whole = merge(name, models)
    assert whole.shape == shape
    assert np.isfinite(whole).all()
    assert same_bits(merge(name, models, height=1, shuffled=True), whole)
    assert same_bits(merge(name, models, height=2, shuffled=True, threads=3), whole)


@pytest.mark.parametrize("name", ["slerp", "ties", "geometric_sum", "multiply_quotient", "arcee_fusion", "della"])
def test_the_same_holds_for_tensors_that_vector_instructions_cut(name: str) -> None:
    models = models_for(count_of(name), (61, 1031))
    whole = merge(name, models)
    assert same_bits(merge(name, models, height=7, shuffled=True), whole)


@pytest.mark.parametrize("name", ["nuslerp", "model_stock", "ties", "dare_ties", "breadcrumbs", "train_difference"])
def test_the_same_holds_for_other_values(name: str) -> None:
    others: dict[str, list[dict[str, object]]] = {
        "nuslerp": [{"along": "row"}, {"along": "column"}],
        "model_stock": [{"filter_wise": True}],
        "ties": [{"density": 0.5, "rescale": "l1", "vote": "count"}],
        "dare_ties": [{"density": 0.5, "rescale": "l1"}],
        "breadcrumbs": [{"density": 0.5, "rescale": "l1"}],
        "train_difference": [{"mask": "opposite"}, {"mask": "strict_opposite", "clip": True}],
    }
    for given, shape in itertools.product(others[name], SHAPES):
        models = models_for(count_of(name), shape)
        whole = merge(name, models, given)
        assert same_bits(merge(name, models, given, height=1, shuffled=True), whole)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].symmetric])
def test_models_in_another_order_give_the_same_bits(name: str) -> None:
    method, models = METHODS[name], models_for(count_of(name), (9, 4))
    roles = method.roles_of(len(models))
    fixed = len(roles) - sum(role == "model" for role in roles)
    values = method.values(GIVEN.get(name, {}), roles)
    digests = [model.tobytes().hex() for model in models]

    def merged(order: tuple[int, ...]) -> np.ndarray:
        """As typed in this order."""
        typed = [models[place] for place in order]
        given = method.ordered(values, order)
        canonical = method.order([digests[place] for place in order], given, roles)
        given = {key: value for key, value in method.ordered(given, canonical).items() if key not in method.fixed}
        return merge(name, [typed[place] for place in canonical], given)

    first = merged(tuple(range(len(models))))
    for others in itertools.permutations(range(fixed, len(models))):
        assert same_bits(merged((*range(fixed), *others)), first)


@pytest.mark.parametrize("name", [name for name in NAMES if not METHODS[name].symmetric])
def test_other_methods_keep_the_order(name: str) -> None:
    method = METHODS[name]
    roles = method.roles_of(method.least)
    assert method.order(["z", "y", "x"][: len(roles)], {}, roles) == tuple(range(len(roles)))


PLAIN = {
    *("weighted_sum", "weighted_subtraction", "add_difference", "sum_twice", "triple_sum"),
    *("passthrough", "linear", "task_arithmetic"),
}


@pytest.mark.parametrize("name", NAMES)
def test_methods_that_are_operators_alone_give_numpy_the_bits_that_they_give_torch(name: str) -> None:
    models = models_for(count_of(name), (7, 50))
    merging = METHODS[name].load()(job_for(name, models, GIVEN.get(name, {})))
    assert merging.is_plain == (name in PLAIN)
    if merging.is_plain:
        before = [model.copy() for model in models]
        flat = [model.reshape(1, -1) for model in models]
        found = merging.blend(Chunk(0, [model[:, 30:] for model in flat]))  # any run of elements, whatever the rows
        assert same_bits(found, merge(name, models).reshape(1, -1)[:, 30:])
        assert all(itertools.starmap(same_bits, zip(models, before, strict=True)))


def test_a_clipped_difference_needs_more_than_operators() -> None:
    merging = METHODS["add_difference"].load()(job_for("add_difference", models_for(3, (2, 2)), {"clip": True}))
    assert not merging.is_plain


# Values at which the result is one of the models, and which.
ALONE: dict[str, list[tuple[dict[str, object], int]]] = {
    "weighted_sum": [({"alpha": 0}, 0), ({"alpha": 1}, 1)],
    "slerp": [({"alpha": 0}, 0), ({"alpha": 1}, 1), ({"alpha": 1, "norms": "interpolate"}, 1)],
    "geometric_sum": [({"alpha": 0}, 0), ({"alpha": 1}, 1)],
    "nearswap": [({"t": 0}, 0)],
    "weighted_subtraction": [({"alpha": 0}, 0), ({"beta": 0}, 0)],
    "tensor_sum": [({"width": 0}, 0), ({"width": 1}, 1), ({"width": -1, "offset": 0.4}, 1)],
    "top_k_tensor_sum": [({"width": 0}, 0)],
    "crossover": [({"alpha": 0}, 0), ({"alpha": 1, "tilt": 1}, 1)],
    "rotate": [({"alpha": 0, "alignment": 0}, 0), ({"alpha": 1, "alignment": 1}, 1)],
    "add_difference": [({"alpha": 0}, 0), ({"alpha": 0, "clip": True}, 0)],
    "add_perpendicular": [({"alpha": 0}, 0)],
    "train_difference": [({"alpha": 0}, 0)],
    "smooth_add": [({"alpha": 0}, 0)],
    "sum_twice": [({"alpha": 0, "beta": 0}, 0), ({"alpha": 1, "beta": 0}, 1), ({"beta": 1}, 2)],
    "triple_sum": [({"alpha": 0, "beta": 0}, 0), ({"alpha": 1, "beta": 0}, 1), ({"alpha": 0, "beta": 1}, 2)],
    "multiply_difference": [({"alpha": 0, "beta": 0}, 0), ({"alpha": 1, "beta": 1}, 1)],
    "multiply_quotient": [({"alpha": 0}, 0)],
    "euclidean_add_difference": [({"alpha": 0}, 0), ({"alpha": 1}, 1)],
    "similarity_add_difference": [({"alpha": 0}, 0)],
    "distribution_crossover": [({"cut": 0}, 1), ({"cut": 1}, 0)],
    "passthrough": [({"scale": 1}, 0)],
    "linear": [({"weight": [0, 3, 0]}, 1), ({"weight": [0, 0, 1], "normalize": False}, 2)],
    "nuslerp": [({"weight": [2, 0]}, 0), ({"weight": [0, 1]}, 1)],
    "multislerp": [({"weight": [0, 2, 0]}, 1)],
    "task_arithmetic": [
        ({"weight": 0}, 0),
        ({"lambda": 0}, 0),
        ({"weight": [0, 1, 0]}, 2),
        ({"weight": [0, 0, 0.5], "lambda": 2}, 3),
    ],
    "ties": [({"weight": [0.5, 0, 0], "density": 1}, 1)],
    "dare_linear": [({"weight": [1, 0, 0], "density": 1}, 1)],
    "dare_ties": [({"weight": [0, 3, 0], "density": [0.5, 1, 0.5], "normalize": True}, 2)],
    "breadcrumbs": [({"weight": [0, 1, 0], "density": 1}, 2)],
    "breadcrumbs_ties": [({"weight": [0, 1, 0], "density": 1}, 2)],
    "della": [({"weight": [0, 1, 0], "density": 1}, 2)],
    "della_linear": [({"weight": [0, 1, 0], "density": 1}, 2)],
}


def alone(name: str, given: dict[str, object]) -> int | None:
    method, count = METHODS[name], count_of(name)
    return method.alone(method.values(given, method.roles_of(count)), count)


def test_every_method_with_such_values_is_listed() -> None:
    assert {name for name, method in METHODS.items() if method.alone is not never} == set(ALONE)


@pytest.mark.parametrize(("name", "given", "place"), [(name, *case) for name in ALONE for case in ALONE[name]])
def test_where_one_model_is_the_result_the_formula_gives_it_too(name: str, given: dict, place: int) -> None:
    assert alone(name, given) == place
    # In float64 it may be off in the last place, which is why its bytes are taken.
    if (name, given.get("tilt")) == ("crossover", None):
        return  # at alpha 1 all but the lowest frequencies, by definition of the cut
    for shape in ((7, 5), (13,)):
        models = models_for(count_of(name), shape)
        assert merge(name, models, given) == pytest.approx(models[place], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("name", sorted(ALONE))
def test_other_values_leave_no_model_as_it_is(name: str) -> None:
    assert alone(name, GIVEN[name]) is None
    models = models_for(count_of(name), (7, 5))
    result = merge(name, models)
    assert not any(np.array_equal(result, model) for model in models)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("linear", {"weight": [0, 3, 0], "normalize": False}),
        ("multislerp", {"weight": [0, 3, 0], "normalize": False}),
        ("task_arithmetic", {"weight": [0, 0.5, 0]}),
        ("task_arithmetic", {"weight": [0, 1, 0], "lambda": 0.5}),
        ("ties", {"weight": [0, 1, 0], "density": 0.5}),
        ("dare_linear", {"weight": [0, 1, 0], "density": [1, 0.5, 1]}),
        ("tensor_sum", {"width": 0.5}),
        ("rotate", {"alpha": 0, "alignment": 1}),
        ("multiply_difference", {"alpha": 0, "beta": 1}),
        ("distribution_crossover", {"cut": 0, "slope": 0.1}),
    ],
)
def test_a_model_of_which_only_a_part_counts_is_not_the_result(name: str, given: dict) -> None:
    assert alone(name, given) is None


# Where all models are equal, these are that model, up to the last place.
MEANS = [
    name
    for name in NAMES
    if name not in (*RANDOM, "passthrough", "weighted_subtraction", "multiply_quotient", "breadcrumbs_ties")
]


@pytest.mark.parametrize("name", MEANS)
def test_equal_models_stay_as_they_are(name: str) -> None:
    for shape in SHAPES:
        (model,) = models_for(1, shape)
        result = merge(name, [model] * count_of(name))
        assert result == pytest.approx(model, rel=1e-14, abs=0)
        stored = torch.from_numpy(result).to(torch.float16)
        assert torch.equal(stored, torch.from_numpy(model).to(torch.float16))


@pytest.mark.parametrize("name", RANDOM)
def test_draws_depend_on_seed_and_tensor_alone(name: str) -> None:
    models = models_for(count_of(name), (40, 30))
    first = merge(name, models, seed=1)
    assert same_bits(merge(name, models, seed=1, height=7), first)
    assert not np.array_equal(merge(name, models, seed=2), first)
    assert not np.array_equal(merge(name, models, seed=1, tensor="other.weight"), first)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits() -> None:
    """But for `rotate`, whose decompositions are the device's own."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for name in NAMES:
        if name == "rotate":
            continue
        models = models_for(count_of(name), (61, 130))
        work = METHODS[name].load()(job_for(name, models, GIVEN.get(name, {})))
        chunks = [Chunk(first, [model.cuda() for model in here]) for first, here in chunks_of(work, models, 9)]
        survey(work, chunks)
        type(work).agree([work])
        result = torch.cat([work.blend(chunk).cpu() for chunk in chunks]).reshape(61, 130).numpy()
        assert same_bits(result, merge(name, models)), name
