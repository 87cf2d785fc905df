"""Every method without chance against its definition in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from merge_formulas import FORMULAS, cosine, cosine_limits, cosine_statistics
from merging import GIVEN, SHAPES, blended, chunks_of, count_of, job_for, merge, models_for, survey

from bake.merges import METHODS

# Where the sum of distances is smallest it is flat, so half of the digits are those of the last step's rounding.
# Rotations of few rows are poorly determined where the models say little.
TOLERANCES = {"geometric_median": 1e-7, "rotate": 1e-9, "karcher": 1e-9}


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_every_method_has_a_definition_here_or_in_the_tests_of_its_family() -> None:
    family = {name for name, method in METHODS.items() if method.maths == "task_vectors.TaskVectors"}
    assert set(FORMULAS) | family | {"dropout"} == set(METHODS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_method_is_its_formula(name: str, shape: tuple[int, ...]) -> None:
    given = GIVEN.get(name, {})
    models = models_for(count_of(name), shape, seed=3, apart=1.0)
    if name == "rotate" and len(shape) == 2 and shape[0] <= shape[1]:
        models = models_for(2, shape[::-1])  # the definition is that of tall matrices
    if name == "rotate" and len(shape) == 4 and shape[2] == 1:
        return
    close(merge(name, models), FORMULAS[name](models, **given), TOLERANCES.get(name, 1e-12))


OTHERS: list[tuple[str, dict[str, object]]] = [
    ("weighted_sum", {"alpha": -0.5}),
    ("weighted_sum", {"alpha": 1.5}),
    ("slerp", {"alpha": 0.3, "norms": "interpolate"}),
    ("slerp", {"alpha": 1.4}),
    ("tensor_sum", {"width": 0.7, "offset": 0.6}),
    ("tensor_sum", {"width": -0.4, "offset": 0.3}),
    ("tensor_sum", {"width": 0.3, "offset": -0.5}),
    ("top_k_tensor_sum", {"width": 0.7, "offset": 0.6}),
    ("top_k_tensor_sum", {"width": 1.0, "offset": 0.0}),
    ("cosine_a", {"alpha": -0.3}),
    ("add_cosine_b", {"alpha": 0.9}),
    *[("crossover", {"alpha": 0.4, "tilt": tilt}) for tilt in (0.0, 0.7, 1.0, 1.4, 2.0, 2.6, 3.0, 3.5, 4.0)],
    ("distribution_crossover", {"cut": 0.3, "slope": 0.0}),
    ("rotate", {"alignment": 0.4, "alpha": 0.0}),
    ("rotate", {"alignment": 0.4, "alpha": 0.7, "centralization": 0.0}),
    ("train_difference", {"alpha": 1.2, "mask": "opposite"}),
    ("train_difference", {"alpha": 1.2, "mask": "strict_opposite"}),
    ("multiply_difference", {"alpha": 0.5, "beta": 1.5}),
    ("extract_features", {"alpha": 0.3, "beta": 1.0, "gamma": 0.0}),
    ("linear", {"weight": [0.5, 1.5, -0.25], "normalize": False}),
    ("task_arithmetic", {"weight": [0.5, 0.7, -0.25], "normalize": True, "lambda": 0.7}),
    ("nuslerp", {"weight": [0.5, 1.5], "along": "row"}),
    ("nuslerp", {"weight": [0.5, 1.5], "along": "column"}),
    ("multislerp", {"weight": [0.5, 1.5, 0.25], "normalize": False}),
    ("karcher", {"max_iter": 2, "tol": 1e-9}),
    ("geometric_median", {"maxiter": 3}),
    ("model_stock", {"filter_wise": True}),
    ("sce", {"select_topk": 1.0}),
    ("sce", {"select_topk": 0.001}),
]


@pytest.mark.parametrize(("name", "given"), OTHERS, ids=str)
def test_the_same_for_other_values(name: str, given: dict[str, object]) -> None:
    for shape in ((9, 5), (12, 4, 3, 3)):
        models = models_for(count_of(name), shape, seed=5, apart=1.0)
        close(merge(name, models, given), FORMULAS[name](models, **given), max(1e-11, TOLERANCES.get(name, 0)))


@pytest.mark.parametrize("name", ["nuslerp", "multislerp"])
def test_means_of_differences_from_a_base(name: str) -> None:
    models = models_for(3 if name == "nuslerp" else 4, (7, 5), apart=1.0)
    given = GIVEN[name]
    more = {"with_base": True} if name == "multislerp" else {}
    close(merge(name, models, given, with_base=True), FORMULAS[name](models, **given, **more))


def test_fine_tunes_so_close_that_float32_could_not_tell_their_angles() -> None:
    models = models_for(3, (40, 30), apart=1e-4)
    for name in ("karcher", "geometric_median", "multislerp"):
        close(merge(name, models, {}), FORMULAS[name](models), 1e-9)
    close(merge("slerp", models[:2]), FORMULAS["slerp"](models[:2], 0.3))


def test_clip_keeps_what_is_added_between_a_and_b() -> None:
    a, b, c = models_for(3, (9, 8), apart=1.0)
    for name in ("add_difference", "train_difference", "add_perpendicular"):
        free = merge(name, [a, b, c], {"alpha": 1.5})
        clipped = merge(name, [a, b, c], {"alpha": 1.5, "clip": True})
        low, high = np.minimum(a, b), np.maximum(a, b)
        assert ((free < low) | (free > high)).any()
        close(clipped, np.clip(free, low, high))


@pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
def test_limits_of_similarity_are_those_of_all_tensors(name: str) -> None:
    shapes = [(9, 60), (4, 5, 3, 3), (17,), (8, 90)]
    tensors = [models_for(2, shape, seed=place, apart=0.2 * place + 0.1) for place, shape in enumerate(shapes)]
    directions = name == "cosine_a"
    limits = cosine_limits([cosine_statistics(models, directions)[0] for models in tensors])
    works = [METHODS[name].load()(job_for(name, models, {"alpha": 0.2})) for models in tensors]
    for work, models in zip(works, tensors, strict=True):
        survey(work, chunks_of(work, models, 3))
    type(works[0]).agree(works)
    for work, models in zip(works, tensors, strict=True):
        found = blended(work, chunks_of(work, models, 4), models[0].shape)
        close(found, cosine(models, 0.2, directions, limits))
