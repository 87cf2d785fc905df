"""(IA)3 as LyCORIS and as PEFT train it, against NumPy and against both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random
from torch import nn
from trainers import LAYERS, WEIGHTS, as_rows, in_pieces, lycoris, peft
from transforms import applied

from bake.adapters import ia3, ia3_peft
from bake.keys.shapes_additive import ia3_peft_shape, ia3_shape

SHAPES = [(8, 6), (8, 8), (8, 6, 1, 1), (8, 6, 3, 3), (8, 6, 3)]


def lycoris_transform(numbers, on_input, shape, strength):
    return ia3.Transform(numbers, torch.tensor(int(on_input)), shape=shape, strength=strength)


def channels(shape, on_input):
    """(numbers, the same ready to broadcast over a weight)."""
    numbers = random(1, shape[1] if on_input else shape[0])
    return numbers, numbers.reshape([-1 if axis == int(on_input) else 1 for axis in range(len(shape))])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("strength", WEIGHTS)
def test_lycoris_numbers_are_added_to_one(shape, on_input: bool, strength: float) -> None:
    weight, (numbers, broadcast) = random(0, *shape), channels(shape, on_input)
    transform = lycoris_transform(torch.from_numpy(numbers), on_input, shape, strength)
    found = applied(transform, as_rows(torch.from_numpy(weight)), range(8))
    np.testing.assert_allclose(found.reshape(shape), weight * (1 + strength * broadcast), rtol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("strength", WEIGHTS)
def test_peft_numbers_take_the_place_of_one(shape, feedforward: bool, strength: float) -> None:
    weight, (numbers, broadcast) = random(0, *shape), channels(shape, feedforward)
    linear = (1, -1) if feedforward else (-1, 1)
    stored = torch.from_numpy(numbers).reshape(linear if len(shape) == 2 else (1, -1, *(1 for _ in shape[2:])))
    transform = ia3_peft.Transform(stored, shape=shape, strength=strength, feedforward=feedforward)
    found = applied(transform, as_rows(torch.from_numpy(weight)), range(8))
    np.testing.assert_allclose(found.reshape(shape), weight * (1 + strength * (broadcast - 1)), rtol=1e-13, atol=1e-15)


def test_at_strength_one_the_numbers_of_peft_are_exact_and_at_zero_nothing_changes() -> None:
    weight, numbers = torch.from_numpy(random(0, 8, 6)), torch.from_numpy(random(1, 8, 1))
    whole, nothing = (ia3_peft.Transform(numbers, shape=(8, 6), strength=strength) for strength in (1.0, 0.0))
    assert torch.equal(applied(whole, weight, range(8)), weight * numbers)
    assert torch.equal(applied(nothing, weight, range(8)), weight)
    assert torch.equal(applied(lycoris_transform(numbers.flatten(), False, (8, 6), 0.0), weight, range(8)), weight)


@pytest.mark.parametrize("on_input", [False, True])
def test_rows_alone_are_the_rows_of_the_whole(on_input: bool) -> None:
    shape = (8, 6, 3, 3)
    weight, numbers = torch.from_numpy(random(0, 8, 54)), torch.from_numpy(channels(shape, on_input)[0])
    transform = lycoris_transform(numbers.float(), on_input, shape, 0.7)
    whole = applied(transform, weight, range(8))
    pieces = [applied(transform, weight[rows.start : rows.stop], rows) for rows in in_pieces(8)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(applied(transform, weight[1::3], range(1, 8, 3)), whole[1::3])
    assert whole.dtype == torch.float64


def test_float32_numbers_are_widened_exactly() -> None:
    weight, numbers = random(0, 8, 6), random(1, 8).astype(np.float32)
    found = applied(
        lycoris_transform(torch.from_numpy(numbers), False, (8, 6), 0.7), torch.from_numpy(weight), range(8)
    )
    np.testing.assert_array_equal(found, weight * (1 + 0.7 * numbers.astype(np.float64))[:, None])


@pytest.mark.parametrize("on_input", [False, True])
def test_lycoris_numbers_have_to_be_as_many_as_the_channels(on_input: bool) -> None:
    with pytest.raises(ValueError, match="7 numbers"):
        lycoris_transform(torch.ones(7), on_input, (8, 6), 1.0)


@pytest.mark.parametrize(
    ("factor", "shape", "feedforward", "message"),
    [
        ((7, 1), (8, 6), None, "7 numbers"),
        ((1, 7), (8, 6), None, "7 numbers"),
        ((1, 8, 1, 1), (8, 8, 3, 3), None, "inputs or outputs"),
        ((1, 8, 1, 1), (8,), None, "inputs or outputs"),
        ((8,), (8, 6), None, "inputs or outputs"),
        ((1, 6), (8, 6), False, "scales inputs"),
        ((8, 1), (8, 6), True, "scales outputs"),
        ((1, 8), (8,), None, "the bias stays"),
        ((1, 8, 1, 1), (8,), True, "the bias stays"),
    ],
)
def test_what_peft_numbers_cannot_mean_is_refused(factor, shape, feedforward, message) -> None:
    with pytest.raises(ValueError, match=message):
        ia3_peft.Transform(torch.ones(factor), shape=shape, strength=1.0, feedforward=feedforward)


@pytest.mark.parametrize("feedforward", [False, True])
def test_the_shape_of_a_convolution_tells_which_channels_where_they_differ(feedforward: bool) -> None:
    numbers = torch.from_numpy(random(1, 1, 6 if feedforward else 8, 1, 1))
    weight = torch.from_numpy(random(0, 8, 54))
    told, found = (
        applied(ia3_peft.Transform(numbers, shape=(8, 6, 3, 3), strength=0.7, feedforward=says), weight, range(8))
        for says in (feedforward, None)
    )
    assert torch.equal(told, found)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("multiplier", WEIGHTS)
def test_lycoris_trains_with_it(layer: str, on_input: bool, multiplier: float) -> None:
    trained = lycoris("ia3", "IA3Module", LAYERS[layer](), multiplier, train_on_input=on_input)
    numbers, switch = trained.factors["weight"], trained.factors["on_input"]
    assert ia3_shape({"ia3_weight": tuple(numbers.shape), "on_input": tuple(switch.shape)}) == (None, None)
    transform = ia3.Transform(numbers, switch, shape=tuple(trained.base.shape), strength=multiplier)
    found = applied(transform, as_rows(trained.base), range(8))
    torch.testing.assert_close(found, as_rows(trained.expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "conv 1d"])  # PEFT has no (IA)3 for it
@pytest.mark.parametrize("feedforward", [False, True])
def test_peft_merges_it(layer: str, feedforward: bool) -> None:
    """The outputs with the bias beside them; the inputs without."""
    module = LAYERS[layer]().double()
    bias = module.bias.detach().clone()
    trained, merged = peft("IA3Config", module, feedforward_modules=["0"] if feedforward else [])
    numbers, shape = trained.factors["ia3_l"], tuple(trained.base.shape)
    transform = ia3_peft.Transform(numbers, shape=shape, strength=1.0, feedforward=feedforward)
    torch.testing.assert_close(applied(transform, as_rows(trained.base), range(8)), as_rows(trained.expected))
    if feedforward:
        assert torch.equal(merged.bias, bias)
    else:
        beside = ia3_peft.Transform(numbers, shape=(8,), strength=1.0, feedforward=False)
        assert torch.equal(applied(beside, bias.reshape(8, 1), range(8)).flatten(), merged.bias)


@pytest.mark.parametrize("feedforward", [False, True])
def test_peft_merges_it_into_weights_stored_the_other_way_round(feedforward: bool) -> None:
    utilities = pytest.importorskip("transformers.pytorch_utils", reason="the transformers library is not installed")
    layer = utilities.Conv1D(8, 6).double()  # weight (in, out) = (6, 8)
    nn.init.normal_(layer.weight)
    trained, _ = peft("IA3Config", layer, feedforward_modules=["0"] if feedforward else [], fan_in_fan_out=True)
    assert trained.base.shape == (6, 8)
    transform = ia3_peft.Transform(trained.factors["ia3_l"], shape=(6, 8), strength=1.0, transposed=True)
    torch.testing.assert_close(applied(transform, trained.base, range(6)), trained.expected)


def test_a_published_answer_of_peft(shared) -> None:
    """A feed-forward vector on lin0, and what release 0.6.1 computed with it."""
    from support import load

    folder = shared / "data" / "peft_oracle" / "ia3_mlp"
    adapter = torch.load(folder / "adapter_model.bin", "cpu", weights_only=True)
    numbers = adapter["base_model.model.lin0.ia3_l"].double()
    assert ia3_peft_shape({"ia3_l": tuple(numbers.shape)}) == (None, numbers.numel())
    base = {name: torch.from_numpy(array) for name, array in load(folder / "base.safetensors").items()}
    weight = base["lin0.weight"]
    transform = ia3_peft.Transform(numbers, shape=tuple(weight.shape), strength=1.0)
    inputs = torch.arange(90, dtype=torch.float64).view(9, 10)
    hidden = nn.functional.linear(inputs, applied(transform, weight, range(len(weight))), base["lin0.bias"]).relu()
    found = nn.functional.linear(hidden, base["lin1.weight"], base["lin1.bias"]).log_softmax(-1)
    (expected,) = load(folder / "expected.safetensors").values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
