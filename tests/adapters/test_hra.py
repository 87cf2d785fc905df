"""HRA: against the product of reflections in NumPy, and against PEFT's merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random
from transforms import assert_pieces_make_the_whole, effective, layer, matrix, whole

from bake.adapters import hra

VECTORS, WEIGHT = random(0, 12, 4), random(1, 7, 12)


def reflections(vectors, apply_gs=False):
    """One reflection after the other, left to right."""
    product, seen = np.eye(len(vectors)), []
    for vector in vectors.T:
        for before in seen if apply_gs else ():
            vector = vector - before * (before @ vector)
        seen.append(vector / np.linalg.norm(vector))
        product = product @ (np.eye(len(vectors)) - 2 * np.outer(seen[-1], seen[-1]))
    return product


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_product_in_float64(strength: float, apply_gs: bool, count: int) -> None:
    vectors = VECTORS[:, :count]
    expected = WEIGHT + strength * (WEIGHT @ reflections(vectors, apply_gs) - WEIGHT)
    transform = hra.Transform(torch.from_numpy(vectors), shape=(7, 12), strength=strength, apply_gs=apply_gs)
    np.testing.assert_allclose(whole(transform, torch.from_numpy(WEIGHT)), expected, rtol=0, atol=1e-12)


def test_pairs_of_equal_reflections_cancel() -> None:
    """As PEFT starts them out."""
    transform = hra.Transform(torch.from_numpy(np.repeat(VECTORS, 2, axis=1)), shape=(7, 12), strength=1.0)
    np.testing.assert_allclose(whole(transform, torch.from_numpy(WEIGHT)), WEIGHT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv 1x1", "conv 3x3"])
@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_peft_merge_agrees_and_leaves_the_bias(kind: str, apply_gs: bool) -> None:
    peft = pytest.importorskip("peft", reason="the PEFT oracle is not installed")
    net = torch.nn.Sequential(layer(kind, 8, 6))
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    config = peft.HRAConfig(r=4, apply_GS=apply_gs, target_modules=["0"], init_weights=False)
    wrapped = peft.get_peft_model(net, config)
    ((_, vectors),) = peft.get_peft_model_state_dict(wrapped).items()
    transform = hra.Transform(vectors.double(), shape=tuple(weight.shape), strength=1.0, apply_gs=apply_gs)
    with torch.no_grad():
        merged = wrapped.merge_and_unload()[0]
    torch.testing.assert_close(whole(transform, matrix(weight)), matrix(merged.weight), rtol=0, atol=2e-5)
    torch.testing.assert_close(effective(merged)[1], bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1.0, 0.0, 0.7])
def test_pieces_make_the_whole_in_the_dtype_of_the_weight(dtype: torch.dtype, strength: float) -> None:
    weight = torch.from_numpy(WEIGHT).to(dtype)
    transform = hra.Transform(torch.from_numpy(VECTORS).to(dtype), shape=(7, 12), strength=strength)
    assert_pieces_make_the_whole(transform, weight)
    assert torch.equal(whole(transform, weight), weight) == (strength == 0)


def test_vectors_that_do_not_fit() -> None:
    settings = {"shape": (7, 12), "strength": 1.0}
    with pytest.raises(ValueError, match="does not reflect the 12 columns"):
        hra.Transform(torch.ones(11, 2), **settings)
    with pytest.raises(ValueError, match="a vector of zeros"):
        hra.Transform(torch.eye(12)[:, :3] * torch.tensor([1.0, 0.0, 1.0]), **settings)
    with pytest.raises(ValueError, match="depend on each other"):
        hra.Transform(torch.ones(12, 2), **settings, apply_gs=True)
    with pytest.raises(ValueError, match="cannot all be orthogonal"):
        hra.Transform(torch.ones(12, 13), **settings, apply_gs=True)
