"""GLoRA against its definition in NumPy and against LyCORIS."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random
from trainers import LAYERS, WEIGHTS, as_rows, in_pieces, lycoris
from transforms import applied

from bake.adapters.glora import Transform
from bake.keys.shapes_additive import glora_rank, glora_shape

LINEAR = {"a1": random(0, 6, 2), "a2": random(1, 2, 6), "b1": random(2, 8, 2), "b2": random(3, 2, 6)}
SQUARE = {"a1": random(0, 8, 2), "a2": random(1, 2, 8), "b1": random(2, 8, 2), "b2": random(3, 2, 8)}
POINTWISE = {name: array.reshape(*array.shape, 1, 1) for name, array in LINEAR.items()}
CONVOLUTION = POINTWISE | {"b2": random(3, 2, 6, 3, 3)}
TUCKER = POINTWISE | {"bm": random(4, 2, 2, 3, 3)}
FORMS = {
    "linear": (LINEAR, (8, 6)),
    "square": (SQUARE, (8, 8)),
    "pointwise": (POINTWISE, (8, 6, 1, 1)),
    "convolution": (CONVOLUTION, (8, 6, 3, 3)),
    "tucker": (TUCKER, (8, 6, 3, 3)),
}
EXCHANGED = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}


def first_spelling(arrays):
    """The same update as the first LyCORIS wrote it."""
    return {EXCHANGED[name]: array for name, array in arrays.items()}


def by_numpy(arrays, weight):
    a1, a2, b1 = (arrays[name].reshape(arrays[name].shape[:2]) for name in ("a1", "a2", "b1"))
    if "bm" in arrays:
        stored = np.einsum("abkl,oa,bi->oikl", arrays["bm"], b1, arrays["b2"].reshape(2, -1))
    else:
        stored = np.tensordot(b1, arrays["b2"], 1)
    return np.einsum("oi...,ij,jp->op...", weight, a1, a2) + stored.reshape(weight.shape)


def factors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", WEIGHTS)
def test_the_definition(form: str, strength: float) -> None:
    arrays, shape = FORMS[form]
    weight = random(9, *shape)
    transform = Transform(**factors(arrays), shape=shape, strength=strength, scale=1.5)
    found = applied(transform, torch.from_numpy(weight.reshape(8, -1)), range(8))
    expected = weight + strength * 1.5 * by_numpy(arrays, weight)
    np.testing.assert_allclose(found.reshape(shape), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["linear", "square", "pointwise"])  # the only ones the first LyCORIS had
def test_the_first_spelling_is_the_same_update(form: str) -> None:
    arrays, shape = FORMS[form]
    weight = torch.from_numpy(random(9, 8, shape[1]))
    new, first = (
        applied(Transform(**factors(spelled), shape=shape, strength=0.7, scale=1.5), weight, range(8))
        for spelled in (arrays, first_spelling(arrays))
    )
    assert torch.equal(new, first)
    for spelled in (arrays, first_spelling(arrays)):
        shapes = {name: array.shape for name, array in spelled.items()}
        assert glora_shape(shapes) == (8, shape[1])
        assert glora_rank(shapes) == 2


@pytest.mark.parametrize("form", FORMS)
def test_rows_alone_are_the_rows_of_the_whole(form: str) -> None:
    arrays, shape = FORMS[form]
    weight = torch.from_numpy(random(9, *shape).reshape(8, -1))
    transform = Transform(**factors(arrays), shape=shape, strength=0.7, scale=1.5)
    whole = applied(transform, weight, range(8))
    pieces = torch.cat([applied(transform, weight[rows.start : rows.stop], rows) for rows in in_pieces(8)])
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(applied(transform, weight[1::3], range(1, 8, 3)), whole[1::3], rtol=1e-12, atol=1e-12)
    assert whole.dtype == torch.float64


def test_float32_factors_are_widened_exactly() -> None:
    arrays = {name: array.astype(np.float32) for name, array in LINEAR.items()}
    weight = torch.from_numpy(random(9, 8, 6))
    found = applied(Transform(**factors(arrays), shape=(8, 6), strength=1.0, scale=1.0), weight, range(8))
    expected = weight + torch.from_numpy(
        by_numpy({name: array.astype(np.float64) for name, array in arrays.items()}, weight.numpy())
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_strength_zero_changes_no_bit() -> None:
    weight = torch.tensor([[-0.0, 0.0, 1.0, -2.0, 3.0, 4.0]] * 8, dtype=torch.float64)
    transform = Transform(**factors(LINEAR), shape=(8, 6), strength=0.0, scale=1.5)
    found = applied(transform, weight, range(8))
    assert torch.equal(found, weight)
    assert torch.equal(found.signbit(), weight.signbit())


@pytest.mark.parametrize(
    ("changed", "shape", "message"),
    [
        ({"a1": random(0, 6, 3)}, (8, 6), "ranks"),
        ({}, (8, 7), "do not fit"),
        ({}, (7, 6), "do not fit"),
        ({}, (8, 6, 3, 3), "do not fit"),
        ({"a2": random(1, 2, 5)}, (8, 6), "do not fit"),
        ({}, (8,), "layers"),
    ],
)
def test_factors_that_contradict_each_other_or_the_weight_are_refused(changed, shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        Transform(**factors(LINEAR | changed), shape=shape, strength=1.0, scale=1.0)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("multiplier", WEIGHTS)
def test_lycoris_trains_with_it(layer: str, multiplier: float) -> None:
    trained = lycoris("glora", "GLoRAModule", LAYERS[layer](), multiplier, lora_dim=2, alpha=3.0)
    inputs = {name.removesuffix(".weight"): value for name, value in trained.factors.items()}
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    assert glora_shape(shapes) == as_rows(trained.base).shape
    scale = trained.alpha / glora_rank(shapes)
    transform = Transform(**inputs, shape=tuple(trained.base.shape), strength=multiplier, scale=scale)
    found = applied(transform, as_rows(trained.base), range(8))
    torch.testing.assert_close(found, as_rows(trained.expected), rtol=0, atol=1e-11)
