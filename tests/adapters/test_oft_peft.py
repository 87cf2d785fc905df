"""OFT on input columns: against its formula in NumPy, and against PEFT's merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random
from transforms import assert_pieces_make_the_whole, effective, layer, matrix, whole

from bake.adapters import oft_peft

NUMBERS, WEIGHT = random(0, 3, 6, spread=0.2), random(1, 7, 12)


def skewed(numbers, size):
    """Filled number by number, row by row above the diagonal."""
    blocks = np.zeros((len(numbers), size, size))
    for block, row in zip(blocks, numbers, strict=True):
        places = [(i, j) for i in range(size) for j in range(i + 1, size)]
        for (i, j), number in zip(places, row, strict=True):
            block[i, j], block[j, i] = number, -number
    return blocks


def rotations(numbers, size, terms):
    eye, power = np.eye(size), np.linalg.matrix_power
    if terms is None:
        return [(eye - q) @ np.linalg.inv(eye + q) for q in skewed(numbers, size)]
    if terms == 1:
        return [eye for _ in numbers]
    if terms == 2:
        return [eye + 2 * q for q in skewed(numbers, size)]
    last = max(2, terms - 2)
    return [eye + 2 * sum(power(q, i) for i in range(1, last + 1)) + power(q, last + 1) for q in skewed(numbers, size)]


def block_diagonal(blocks):
    size = len(blocks[0])
    whole = np.zeros((size * len(blocks), size * len(blocks)))
    for at, block in enumerate(blocks):
        whole[at * size : (at + 1) * size, at * size : (at + 1) * size] = block
    return whole


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("terms", [None, 1, 2, 3, 4, 5, 6, 9])
def test_the_formula_in_float64(strength: float, terms: int | None) -> None:
    rotation = strength * block_diagonal(rotations(NUMBERS, 4, terms)) + (1 - strength) * np.eye(12)
    transform = oft_peft.Transform(torch.from_numpy(NUMBERS), shape=(7, 12), strength=strength, neumann_terms=terms)
    np.testing.assert_allclose(
        whole(transform, torch.from_numpy(WEIGHT)), WEIGHT @ rotation.T, rtol=0, atol=1e-13, strict=True
    )


def test_the_exact_rotation_turns_and_the_series_comes_close_from_the_other_side() -> None:
    """PEFT's series and its exact form turn in opposite directions: the setting decides, nothing else can."""
    settings = {"shape": (7, 12), "strength": 1.0}
    small, weight = torch.from_numpy(NUMBERS) / 20, torch.from_numpy(WEIGHT)
    exact = whole(oft_peft.Transform(-small, **settings, neumann_terms=None), weight)
    series = whole(oft_peft.Transform(small, **settings, neumann_terms=9), weight)
    torch.testing.assert_close(series, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(exact.norm(dim=1), weight.norm(dim=1))


@pytest.mark.parametrize("kind", ["linear", "conv 1x1", "conv 3x3"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("terms", [None, 1, 2, 3, 5, 7])
@pytest.mark.filterwarnings("ignore")
def test_peft_merge_agrees(kind: str, shared: bool, terms: int | None) -> None:
    peft = pytest.importorskip("peft", reason="the PEFT oracle is not installed")
    net = torch.nn.Sequential(layer(kind, 8, 6, torch.float64))
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    config = peft.OFTConfig(
        **{"r": 0, "oft_block_size": 4, "target_modules": ["0"], "init_weights": False, "block_share": shared},
        **{"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5},
    )
    wrapped = peft.get_peft_model(net, config)
    numbers = wrapped.base_model.model[0].oft_R["default"].weight
    with torch.no_grad():
        numbers.copy_(torch.from_numpy(random(3, *numbers.shape, spread=0.2)))
    state = {name.split("oft_R.")[-1]: value for name, value in peft.get_peft_model_state_dict(wrapped).items()}
    transform = oft_peft.Transform(
        state["weight"].double(), shape=tuple(weight.shape), strength=1.0, neumann_terms=terms
    )
    merged = wrapped.merge_and_unload()[0]
    # PEFT keeps the adapter in float32.
    torch.testing.assert_close(whole(transform, matrix(weight)), matrix(merged.weight), rtol=0, atol=1e-5)
    torch.testing.assert_close(effective(merged)[1], bias)


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_onetrainer_divides_where_it_is_marked_and_does_not_transpose_convolutions(strength: float) -> None:
    """Its forward on a convolution: einsum("ork,rkc->orc") of the flattened weight and R."""
    divided = rotations(NUMBERS / (2 * np.sqrt(3)), 4, 5)
    rotation = strength * block_diagonal(divided) + (1 - strength) * np.eye(12)
    transform = oft_peft.Transform(
        torch.from_numpy(NUMBERS),
        torch.tensor(1.0),
        **{"shape": (7, 3, 2, 2), "strength": strength, "transposed": False},
    )
    np.testing.assert_allclose(whole(transform, torch.from_numpy(WEIGHT)), WEIGHT @ rotation, rtol=0, atol=1e-13)


@pytest.mark.parametrize("numbers", [(3, 6), (1, 6), (12, 0), (1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1.0, 0.0, 0.7])
def test_pieces_make_the_whole_in_the_dtype_of_the_weight(numbers, dtype: torch.dtype, strength: float) -> None:
    weight = torch.from_numpy(WEIGHT).to(dtype)
    factor = torch.from_numpy(random(4, *numbers)).to(dtype)
    transform = oft_peft.Transform(factor, torch.ones(()), shape=(7, 12), strength=strength)
    assert_pieces_make_the_whole(transform, weight)
    assert torch.equal(whole(transform, weight), weight) == (strength == 0 or numbers[1] == 0)


@pytest.mark.parametrize("numbers", [(3, 5), (2, 6), (1, 10), (3,), (3, 4, 4)])
def test_blocks_that_do_not_fit(numbers) -> None:
    with pytest.raises(ValueError, match=r"no list of blocks|no triangle|do not make up"):
        oft_peft.Transform(torch.ones(numbers), shape=(7, 12), strength=1.0)
