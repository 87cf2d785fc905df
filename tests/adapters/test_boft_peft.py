"""BOFT on input columns: against its definition in NumPy, and against PEFT's merge with PEFT's own permutations."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from support import random
from transforms import assert_pieces_make_the_whole, effective, layer, matrix, randomise, whole

from bake.adapters import boft_peft

BLOCKS, SCALES = random(0, 3, 4, 4, 4, spread=0.3), 1 + random(1, 7, 1, spread=0.2)
WEIGHT = random(2, 7, 16)


class BlockDiagonal:
    """What PEFT's CUDA extension does, so that its other stages can be had without a compiler."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*stage) for stage in blocks])


def butterfly(blocks):
    """T = T_last ... T_0 from the definition, column by column."""
    stages, count, size, _ = blocks.shape
    eye, product = np.eye(size), np.eye(count * size)
    for stage in range(stages):
        pieces = [range(at, at + size // 2) for at in range(0, count * size, size // 2)]
        wide = 2 ** (stage + 1)
        shuffled = [
            column
            for first in range(0, len(pieces), wide)
            for piece in (*range(first, first + wide, 2), *range(first + 1, first + wide, 2))
            for column in pieces[piece]
        ]
        turned = np.zeros((count * size, count * size))
        permutation = np.zeros_like(turned)
        permutation[range(count * size), shuffled] = 1
        for at, block in enumerate(blocks[stage]):
            skewed = (block - block.T) / 2
            rows = slice(at * size, (at + 1) * size)
            turned[rows, rows] = (eye - skewed) @ np.linalg.inv(eye + skewed)
        product = permutation @ turned @ permutation.T @ product
    return product


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_definition_in_float64(strength: float, stages: int) -> None:
    expected = strength * SCALES * (WEIGHT @ butterfly(BLOCKS[:stages]).T) + (1 - strength) * WEIGHT
    transform = boft_peft.Transform(
        torch.from_numpy(BLOCKS[:stages]), torch.from_numpy(SCALES), shape=(7, 16), strength=strength
    )
    np.testing.assert_allclose(whole(transform, torch.from_numpy(WEIGHT)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["linear", "conv 1x1", "conv 3x3"])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_peft_merge_agrees_and_leaves_the_bias(kind: str, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft", reason="the PEFT oracle is not installed")
    module = importlib.import_module("peft.tuners.boft.layer")
    monkeypatch.setattr(module, "get_fbd_cuda", lambda: stages > 1)
    monkeypatch.setattr(module, "FastBlockDiag", BlockDiagonal)
    net = torch.nn.Sequential(layer(kind, 16, 7))
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=stages, target_modules=["0"])
    wrapped = peft.get_peft_model(net, config)
    randomise(wrapped.base_model.model[0].boft_R)
    randomise(wrapped.base_model.model[0].boft_s)
    state = {name.rpartition(".")[2]: value for name, value in peft.get_peft_model_state_dict(wrapped).items()}
    assert len(state["boft_R"]) == stages
    transform = boft_peft.Transform(
        state["boft_R"].double(), state["boft_s"].double(), shape=tuple(weight.shape), strength=1.0
    )
    with torch.no_grad():
        merged = wrapped.merge_and_unload()[0]
    torch.testing.assert_close(whole(transform, matrix(weight)), matrix(merged.weight), rtol=0, atol=2e-5)
    torch.testing.assert_close(effective(merged)[1], bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1.0, 0.0, 0.7])
def test_pieces_make_the_whole_in_the_dtype_of_the_weight(dtype: torch.dtype, strength: float) -> None:
    weight = torch.from_numpy(WEIGHT).to(dtype)
    factors = [torch.from_numpy(array).to(dtype) for array in (BLOCKS, SCALES)]
    transform = boft_peft.Transform(*factors, shape=(7, 16), strength=strength)
    assert_pieces_make_the_whole(transform, weight)
    assert torch.equal(whole(transform, weight), weight) == (strength == 0)


def test_one_stage_takes_blocks_of_odd_size() -> None:
    blocks = random(5, 1, 4, 3, 3)
    transform = boft_peft.Transform(torch.from_numpy(blocks), torch.ones(7, 1), shape=(7, 12), strength=1.0)
    weight = torch.from_numpy(WEIGHT[:, :12].copy())
    torch.testing.assert_close(whole(transform, weight).norm(dim=1), weight.norm(dim=1))


@pytest.mark.parametrize(
    ("blocks", "scales", "shape"),
    [
        ((1, 4, 4, 4), (7, 1), (7, 12)),
        ((2, 4, 3, 3), (7, 1), (7, 12)),
        ((2, 3, 4, 4), (7, 1), (7, 12)),
        ((2, 4, 4, 4), (6, 1), (7, 16)),
        ((4, 4, 4), (7, 1), (7, 16)),
        ((0, 4, 4, 4), (7, 1), (7, 16)),
    ],
)
def test_factors_that_contradict_each_other(blocks, scales, shape) -> None:
    with pytest.raises(ValueError, match=r"boft_r|boft_s|do not make up|cannot shuffle"):
        boft_peft.Transform(torch.ones(blocks), torch.ones(scales), shape=shape, strength=1.0)
