"""The methods that mergekit has too, against it, in float64; where the two differ on purpose, by how much."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merging import merge, models_for

from bake.merges import METHODS

pytest.importorskip("mergekit", reason="the mergekit oracle is not installed")
api = pytest.importorskip("mergekit.merge_methods.api", reason="the mergekit oracle is older than 0.1.5")
registry = pytest.importorskip("mergekit.merge_methods.registry")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("oracles")]


def theirs(name: str, models: list[np.ndarray], base: int | None = None, **parameters: object) -> np.ndarray:
    """What mergekit makes of the models."""
    tensors = [torch.from_numpy(model) for model in models]
    return api.merge_tensors(tensors, name, parameters=parameters, base_index=base).numpy()


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.fixture
def models() -> list[np.ndarray]:
    return models_for(4, (30, 40), apart=1.0)


WEIGHT = [0.5, 1.5, 0.25]
FAMILY: list[tuple[str, dict[str, object]]] = [
    ("task_arithmetic", {"lambda": 0.8}),
    ("task_arithmetic", {"normalize": True}),
    ("ties", {"density": [0.3, 0.6, 0.9]}),
    ("ties", {"density": 0.3, "normalize": False, "lambda": 0.5}),
    ("ties", {"density": 1.0}),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.05}),
    ("breadcrumbs", {"density": 0.999, "gamma": 0.01}),
    ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.05, "normalize": True}),
]


@pytest.mark.parametrize(("name", "given"), FAMILY, ids=str)
def test_task_vectors(name: str, given: dict[str, object]) -> None:
    # Without equal magnitudes, of which mergekit keeps some and not others.
    generator = np.random.default_rng(0)
    models = [generator.normal(0, 0.05, (30, 40)).astype(np.float32).astype(np.float64) for _ in range(4)]
    expected = theirs(name, models, 0, weight=WEIGHT, **given)
    close(merge(name, models, {**given, "weight": WEIGHT}), expected)
    rescaled = theirs(name, models, 0, weight=WEIGHT, rescale=True, **given)
    if name != "task_arithmetic":
        close(merge(name, models, {**given, "weight": WEIGHT, "rescale": "l1"}), rescaled)


def test_defaults_are_mergekits() -> None:
    """But those that bake wants to be given, names otherwise, or has no use for."""
    checked = 0
    for method in registry.registered_methods():
        ours = (
            {one.name: one.default for one in METHODS[method.spec.name].parameters}
            if method.spec.name in METHODS
            else {}
        )
        for parameter in method.spec.parameters:
            if parameter.name in ours.keys() - {"density", "rescale", "weight", "scale", "t"}:
                assert ours[parameter.name] == parameter.default, (method.spec.name, parameter.name)
                checked += 1
    assert checked > 25


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_chance_keeps_as_much_as_mergekit(name: str) -> None:
    """Other draws, the same shares and the same mean."""
    base, model = models_for(2, (300, 400))
    torch.manual_seed(0)
    expected = theirs(name, [base, model], 0, weight=1.0, density=0.4)
    found = merge(name, [base, model], {"density": 0.4, "rescale": "l1"})
    assert (found != base).mean() == pytest.approx((expected != base).mean(), abs=0.01)
    assert abs(found - base).sum() == pytest.approx(abs(expected - base).sum(), rel=1e-6)


def test_without_loss_chance_is_the_same() -> None:
    models = models_for(4, (30, 40))
    for name in ("dare_linear", "dare_ties", "della", "della_linear"):
        expected = theirs(name, models, 0, weight=WEIGHT, density=1.0)
        close(merge(name, models, {"density": 1.0, "weight": WEIGHT}), expected)


def test_linear_and_nearswap_and_passthrough(models: list[np.ndarray]) -> None:
    close(merge("linear", models[:3], {"weight": WEIGHT}), theirs("linear", models[:3], weight=WEIGHT))
    given = {"weight": WEIGHT, "normalize": False}
    close(merge("linear", models[:3], given), theirs("linear", models[:3], weight=WEIGHT, normalize=False))
    close(merge("nearswap", models[:2], {"t": 0.02}), theirs("nearswap", models[:2], 0, t=0.02))
    close(merge("passthrough", models[:1], {"scale": 0.3}), theirs("passthrough", models[:1], scale=0.3))


def test_slerp(models: list[np.ndarray]) -> None:
    for alpha in (-0.2, 0.3, 0.5, 1.3):
        close(merge("slerp", models[:2], {"alpha": alpha}), theirs("slerp", models[:2], 0, t=alpha))


def test_slerp_goes_on_where_mergekit_goes_straight() -> None:
    models = models_for(2, (30, 40), apart=0.02)  # a cosine above 0.9995
    straight = 0.7 * models[0] + 0.3 * models[1]
    close(theirs("slerp", models, 0, t=0.3), straight)
    found = merge("slerp", models, {"alpha": 0.3})
    assert 1e-6 < np.linalg.norm(found - straight) / np.linalg.norm(straight) < 1.3e-4


@pytest.mark.parametrize("along", ["tensor", "row", "column"])
def test_nuslerp(models: list[np.ndarray], along: str) -> None:
    how = {"nuslerp_flatten": along == "tensor", "nuslerp_row_wise": along == "column"}
    given = {"weight": WEIGHT[:2], "along": along}
    close(merge("nuslerp", models[:2], given), theirs("nuslerp", models[:2], weight=WEIGHT[:2], **how))
    expected = theirs("nuslerp", models[:3], 0, weight=WEIGHT[:2], **how)
    close(merge("nuslerp", models[:3], given, with_base=True), expected)


def test_multislerp_has_nothing_beside_the_mean_direction(models: list[np.ndarray]) -> None:
    expected = theirs("multislerp", models[:3], weight=WEIGHT)
    close(merge("multislerp", models[:3], {"weight": WEIGHT}), expected, 1e-7)  # their epsilon of 1e-8
    expected = theirs("multislerp", models, 0, weight=WEIGHT, normalize_weights=False)
    close(merge("multislerp", models, {"weight": WEIGHT, "normalize": False}, with_base=True), expected, 1e-7)


@pytest.mark.parametrize("given", [{}, {"max_iter": 3, "tol": 1e-9}], ids=str)
@pytest.mark.parametrize("apart", [1.0, 0.1])
def test_karcher(given: dict, apart: float) -> None:
    models = models_for(4, (30, 40), apart=apart)
    close(merge("karcher", models, given), theirs("karcher", models, **given), 1e-10)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(models: list[np.ndarray], filter_wise: bool) -> None:
    expected = theirs("model_stock", models, 0, filter_wise=filter_wise)
    close(merge("model_stock", models, {"filter_wise": filter_wise}), expected)


def test_model_stock_of_short_differences_where_mergekit_sees_right_angles() -> None:
    base, *others = models_for(3, (30, 40), apart=1.0)
    near = [base, *(base + 1e-5 * (other - base) for other in others)]
    found, expected = merge("model_stock", near, {}), theirs("model_stock", near, 0)
    t = merge("model_stock", [base, *others], {}) - base
    assert found - base == pytest.approx(1e-5 * t, rel=1e-6)
    assert np.linalg.norm(expected - base) < 0.01 * np.linalg.norm(found - base)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_sce(share: float) -> None:
    models = [model * 20 for model in models_for(4, (30, 40), apart=1.0)]  # so that their weights are not all equal
    generator = np.random.default_rng(1)
    models = [model + generator.normal(0, 0.1, model.shape) for model in models]
    close(merge("sce", models, {"select_topk": share}), theirs("sce", models, 0, select_topk=share), 1e-5)


def test_ram(models: list[np.ndarray]) -> None:
    close(merge("ram", models, {"epsilon": 0.03}), theirs("ram", models, 0, epsilon=0.03))
    given = {"r": 0.3, "alpha": 0.7, "epsilon": 0.03}
    close(merge("ram_plus", models, given), theirs("ramplus_tl", models, 0, **given), 1e-7)  # they count in float32


def test_arcee_fusion(models: list[np.ndarray]) -> None:
    close(merge("arcee_fusion", models[:2], {}), theirs("arcee_fusion", models[:2], 0))
