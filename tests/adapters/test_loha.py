"""LoHa against its definition in NumPy and against LyCORIS and PEFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random
from trainers import LAYERS, WEIGHTS, as_rows, in_pieces, lycoris, peft, rows_of

from bake.adapters import loha
from bake.keys.shapes_additive import loha_shape

PLAIN = {"w1_a": random(0, 8, 3), "w1_b": random(1, 3, 6), "w2_a": random(2, 8, 2), "w2_b": random(3, 2, 6)}
CONVOLUTION = {
    **{"w1_a": random(0, 8, 3, 1, 1), "w1_b": random(1, 3, 2, 3, 3)},
    **{"w2_a": random(2, 8, 3, 1, 1), "w2_b": random(3, 3, 2, 3, 3)},
}
TUCKER = {
    **{"w1_a": random(0, 3, 8), "w1_b": random(1, 3, 2), "t1": random(4, 3, 3, 3, 3)},
    **{"w2_a": random(2, 3, 8), "w2_b": random(3, 3, 2), "t2": random(5, 3, 3, 3, 3)},
}


def product(arrays, number):
    a, b, t = arrays[f"w{number}_a"], arrays[f"w{number}_b"], arrays.get(f"t{number}")
    if t is not None:
        return np.einsum("ijkl,ip,jr->prkl", t, a, b).reshape(a.shape[1], -1)
    return a.reshape(len(a), -1) @ b.reshape(len(b), -1)


def factors(arrays, dtype=torch.float64):
    return {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}


def delta(inputs, *, rows, scale, **settings):
    columns = loha_shape({name: tuple(value.shape) for name, value in inputs.items()})[1]
    dtype = next(iter(inputs.values())).dtype
    return rows_of(loha.Update(**inputs, scale=scale, **settings), rows, columns, dtype)


def spelled(state):
    """LyCORIS' and PEFT's names are bake's with a prefix."""
    return {name.removeprefix("hada_"): value for name, value in state.items()}


@pytest.mark.parametrize("arrays", [PLAIN, CONVOLUTION, TUCKER], ids=["plain", "convolution", "tucker"])
@pytest.mark.parametrize("scale", [*WEIGHTS, 0.0])
def test_the_definition(arrays, scale: float) -> None:
    expected = scale * product(arrays, 1) * product(arrays, 2)
    np.testing.assert_allclose(delta(factors(arrays), rows=range(8), scale=scale), expected, rtol=1e-12)


@pytest.mark.parametrize("arrays", [PLAIN, CONVOLUTION, TUCKER], ids=["plain", "convolution", "tucker"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_alone_are_the_rows_of_the_whole(arrays, dtype) -> None:
    inputs = factors(arrays, dtype)
    whole = delta(inputs, rows=range(8), scale=0.7)
    assert whole.dtype == dtype
    assert tuple(whole.shape) == loha_shape({name: array.shape for name, array in arrays.items()})
    pieces = torch.cat([delta(inputs, rows=rows, scale=0.7) for rows in in_pieces(8)])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(pieces, whole, rtol=tolerance, atol=tolerance)
    assert delta(inputs, rows=range(0), scale=0.7).shape == (0, whole.shape[1])


@pytest.mark.parametrize("arrays", [PLAIN, CONVOLUTION, TUCKER], ids=["plain", "convolution", "tucker"])
def test_a_tensor_stored_the_other_way_round_gets_the_update_turned(arrays) -> None:
    expected = 0.7 * product(arrays, 1) * product(arrays, 2)
    update = loha.Update(**factors(arrays), scale=0.7, transposed=True)
    found = torch.cat([rows_of(update, rows, 8) for rows in in_pieces(expected.shape[1], 4)])
    np.testing.assert_allclose(found, expected.T, rtol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("multiplier", WEIGHTS)
def test_lycoris_trains_with_it(layer: str, tucker: bool, multiplier: float) -> None:
    """Also that alpha / rank counts once: LyCORIS' own merge squares it."""
    trained = lycoris("loha", "LohaModule", LAYERS[layer](), multiplier, lora_dim=3, alpha=2.0, use_tucker=tucker)
    inputs, base = spelled(trained.factors), as_rows(trained.base)
    assert loha_shape({name: tuple(value.shape) for name, value in inputs.items()}) == base.shape
    update = delta(inputs, rows=range(8), scale=multiplier * trained.alpha / 3)
    torch.testing.assert_close(base + update, as_rows(trained.expected), rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_peft_merges_it(layer: str, effective: bool, multiplier: float) -> None:
    settings = {"r": 4, "alpha": 3.0, "use_effective_conv2d": effective}  # PEFT keeps the scale in float32
    trained, _ = peft("LoHaConfig", LAYERS[layer](), multiplier, **settings)
    inputs, base = spelled(trained.factors), as_rows(trained.base)
    assert loha_shape({name: tuple(value.shape) for name, value in inputs.items()}) == base.shape
    update = delta(inputs, rows=range(8), scale=multiplier * 0.75)
    torch.testing.assert_close(base + update, as_rows(trained.expected), rtol=0, atol=1e-11)
