"""BOFT on output rows: against its definition in NumPy, and against LyCORIS's forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random
from transforms import assert_pieces_make_the_whole, effective, layer, matrix, randomise, whole

from bake.adapters import boft

BLOCKS, RESCALE = random(0, 2, 4, 4, 4, spread=0.3), 1 + random(1, 16, 1, spread=0.2)
WEIGHT = random(2, 16, 5)


def butterfly(blocks, strength, limit=None):
    """The product of all stages as one matrix, made row by row from the definition."""
    stages, count, size, _ = blocks.shape
    skewed = blocks - blocks.swapaxes(-1, -2)
    length = np.sqrt((skewed**2).sum())
    if limit and length + 1e-8 > limit:
        skewed = skewed * limit / (length + 1e-8)
    eye, product = np.eye(size), np.eye(count * size)
    for stage in range(stages):
        half = 2**stage * size // 2
        order = [
            first + j + side * half
            for first in range(0, count * size, 2 * half)
            for j in range(half)
            for side in (0, 1)
        ]
        turned = np.zeros((count * size, count * size))
        for at, q in enumerate(skewed[stage]):
            rotation = strength * (eye + q) @ np.linalg.inv(eye - q) + (1 - strength) * eye
            rows = order[at * size : (at + 1) * size]
            turned[np.ix_(rows, rows)] = rotation
        product = turned @ product
    return product


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.05])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_definition_in_float64(strength: float, rescaled: bool, alpha: float | None, stages: int) -> None:
    blocks = random(3, stages, 4, 4, 4, spread=0.3)
    expected = butterfly(blocks, strength, alpha and alpha * 16) @ WEIGHT
    transform = boft.Transform(
        torch.from_numpy(blocks),
        torch.from_numpy(RESCALE) if rescaled else None,
        **{"shape": (16, 5), "strength": strength, "alpha": alpha},
    )
    assert transform.block == 4 * 2 ** (stages - 1)
    expected = expected * RESCALE if rescaled else expected
    np.testing.assert_allclose(whole(transform, torch.from_numpy(WEIGHT)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["linear", "conv 1x1", "conv 3x3"])
@pytest.mark.parametrize("multiplier", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("constraint", [0, 0.05])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("out", [16, 24])
def test_lycoris_forward_agrees_and_leaves_the_bias(
    kind: str, multiplier: float, constraint: float, rescaled: bool, out: int
) -> None:
    module = pytest.importorskip("lycoris.modules.boft", reason="the LyCORIS oracle is not installed")
    base = layer(kind, 5, out)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    trained = module.ButterflyOFTModule(
        "x", base, multiplier=multiplier, lora_dim=6, constraint=constraint, rescaled=rescaled
    )
    randomise(trained)
    state = {name: value.double() for name, value in trained.state_dict().items() if value is not None}
    assert len(state["oft_blocks"]) > 1
    trained.apply_to()
    expected, expected_bias = effective(base)
    transform = boft.Transform(
        **{name: state[name] for name in ("oft_blocks", "rescale") if name in state},
        **{"shape": tuple(weight.shape), "strength": multiplier, "alpha": float(state["alpha"])},
    )
    torch.testing.assert_close(whole(transform, matrix(weight)), matrix(expected), rtol=0, atol=2e-5)
    torch.testing.assert_close(expected_bias, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1.0, 0.0, 0.7])
def test_pieces_make_the_whole_in_the_dtype_of_the_weight(dtype: torch.dtype, strength: float) -> None:
    weight = torch.from_numpy(WEIGHT).to(dtype)
    factors = [torch.from_numpy(array).to(dtype) for array in (BLOCKS, RESCALE)]
    transform = boft.Transform(*factors, shape=(16, 5), strength=strength)
    assert transform.block == 8
    assert_pieces_make_the_whole(transform, weight)
    assert torch.equal(whole(transform, weight), weight) == (strength == 0)
    with pytest.raises(ValueError, match="no whole blocks of 8 rows"):
        transform.apply(weight[:4], range(4))


@pytest.mark.parametrize(
    ("blocks", "rescale", "rows"),
    [
        ((2, 4, 4, 4), None, 12),
        ((2, 4, 3, 3), None, 12),
        ((2, 3, 4, 4), None, 12),
        ((2, 4, 4, 4), (4, 1), 16),
        ((4, 4, 4), None, 16),
        ((2, 4, 4, 2), None, 16),
        ((0, 4, 4, 4), None, 16),
    ],
)
def test_factors_that_contradict_each_other(blocks, rescale, rows: int) -> None:
    with pytest.raises(ValueError, match=r"oft_blocks|rescale|do not make up|cannot shuffle"):
        boft.Transform(
            torch.ones(blocks), None if rescale is None else torch.ones(rescale), shape=(rows, 5), strength=1.0
        )
