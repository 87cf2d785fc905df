"""OFT on output rows: against its formula in NumPy, and against LyCORIS's forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random
from transforms import assert_pieces_make_the_whole, effective, layer, matrix, randomise, whole

from bake.adapters import oft, oft_diag

BLOCKS, RESCALE = random(0, 3, 4, 4, spread=0.3), 1 + random(1, 12, 1, spread=0.2)
WEIGHT = random(2, 12, 5)


def rotations(blocks, limit=None, *, kohya=False):
    """R of each block in float64, with Q no longer than `limit` as kohya or LyCORIS see to it."""
    skewed = blocks - blocks.transpose(0, 2, 1)
    length = np.sqrt((skewed**2).sum())
    if kohya and limit is not None:
        skewed = skewed * (min(length, limit) + 1e-8) / (length + 1e-8)
    elif limit and length + 1e-8 > limit:
        skewed = skewed * limit / (length + 1e-8)
    eye = np.eye(blocks.shape[1])
    return np.stack([(eye + block) @ np.linalg.inv(eye - block) for block in skewed])


def rotated(rotation, weight, strength):
    """Element by element: W'[k, m] = sum over n of R_s[k, n, m] W[k, n]."""
    count, size, _ = rotation.shape
    between = strength * rotation + (1 - strength) * np.eye(size)
    return np.einsum("knm,kni->kmi", between, weight.reshape(count, size, -1)).reshape(weight.shape)


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize(
    ("kohya", "alpha"), [(False, None), (False, 0.0), (False, 0.03), (False, 9.0), (True, 0.03), (True, 9.0)]
)
def test_the_formula_in_float64(strength: float, rescaled: bool, kohya: bool, alpha: float | None) -> None:
    limit = None if alpha is None else alpha * 12
    expected = rotated(rotations(BLOCKS, limit, kohya=kohya), WEIGHT, strength)
    expected = expected * RESCALE if rescaled else expected
    transform = oft.Transform(
        torch.from_numpy(BLOCKS),
        torch.from_numpy(RESCALE) if rescaled else None,
        **{"shape": (12, 5), "strength": strength, "alpha": alpha, "kohya": kohya},
    )
    np.testing.assert_allclose(whole(transform, torch.from_numpy(WEIGHT)), expected, rtol=0, atol=1e-13)


def test_no_longer_than_alpha_says_to_kohya_even_where_that_is_nothing() -> None:
    """LyCORIS takes 0 for no limit at all, kohya for no rotation."""
    settings = {"shape": (12, 5), "strength": 1.0, "alpha": 0.0}
    weight = torch.from_numpy(WEIGHT)
    still = whole(oft.Transform(torch.from_numpy(BLOCKS), **settings, kohya=True), weight)
    torch.testing.assert_close(still, weight, rtol=0, atol=1e-6)
    turned = whole(oft.Transform(torch.from_numpy(BLOCKS), **settings), weight)
    assert (turned - weight).abs().max() > 0.5


def test_kohyas_parts_of_a_fused_projection_are_turned_apart() -> None:
    """q, k, v and mlp rows of one weight: blocks of their own, and each part's own length to keep to."""
    sizes, alpha = [4, 4, 4, 12], 0.02
    weight = random(3, sum(sizes), 6)
    parts = [random(seed, 2, size // 2, size // 2) for seed, size in enumerate(sizes)]
    expected, found, first = [], [], 0
    for size, part in zip(sizes, parts, strict=True):
        rows = weight[first : first + size]
        expected.append(rotated(rotations(part, alpha * size, kohya=True), rows, 0.7))
        transform = oft.Transform(torch.from_numpy(part), shape=(size, 6), strength=0.7, alpha=alpha, kohya=True)
        found.append(whole(transform, torch.from_numpy(rows)))
        first += size
    np.testing.assert_allclose(torch.cat(found), np.concatenate(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["linear", "conv 1x1", "conv 3x3"])
@pytest.mark.parametrize("multiplier", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("constraint", [0, 0.05, 5.0])
@pytest.mark.parametrize("rescaled", [False, True])
def test_lycoris_forward_agrees_and_leaves_the_bias(
    kind: str, multiplier: float, constraint: float, rescaled: bool
) -> None:
    module = pytest.importorskip("lycoris.modules.diag_oft", reason="the LyCORIS oracle is not installed")
    base = layer(kind, 5, 12)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    trained = module.DiagOFTModule(
        "x", base, multiplier=multiplier, lora_dim=4, constraint=constraint, rescaled=rescaled
    )
    randomise(trained)
    state = {name: value.double() for name, value in trained.state_dict().items() if value is not None}
    trained.apply_to()
    expected, expected_bias = effective(base)
    transform = oft.Transform(
        **{name: state[name] for name in ("oft_blocks", "rescale") if name in state},
        **{"shape": tuple(weight.shape), "strength": multiplier, "alpha": float(state["alpha"])},
    )
    torch.testing.assert_close(whole(transform, matrix(weight)), matrix(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(expected_bias, bias)


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_old_lycoris_stores_the_rotation_itself(strength: float) -> None:
    rotation = rotations(BLOCKS)
    transform = oft_diag.Transform(torch.from_numpy(rotation), shape=(12, 5), strength=strength)
    found = whole(transform, torch.from_numpy(WEIGHT))
    np.testing.assert_allclose(found, rotated(rotation, WEIGHT, strength), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1.0, 0.0, 0.7])
def test_pieces_make_the_whole_in_the_dtype_of_the_weight(dtype: torch.dtype, strength: float) -> None:
    weight = torch.from_numpy(WEIGHT).to(dtype)
    factors = [torch.from_numpy(array).to(dtype) for array in (BLOCKS, RESCALE)]
    for transform in (
        oft.Transform(*factors, shape=(12, 5), strength=strength, alpha=0.1),
        oft_diag.Transform(factors[0], shape=(12, 5), strength=strength),
    ):
        assert transform.block == 4
        assert_pieces_make_the_whole(transform, weight)
        assert torch.equal(whole(transform, weight), weight) == (strength == 0)


@pytest.mark.parametrize(
    ("blocks", "rescale", "shape"),
    [
        ((3, 4, 4), None, (16, 5)),
        ((3, 4, 4), (4, 1), (12, 5)),
        ((3, 4, 3), None, (12, 5)),
        ((2, 3, 4, 4), None, (12, 5)),
        ((0, 4, 4), None, (0, 5)),
    ],
)
def test_factors_that_contradict_each_other(blocks, rescale, shape) -> None:
    factors = [torch.ones(blocks), None if rescale is None else torch.ones(rescale)]
    with pytest.raises(ValueError, match=r"oft_blocks|rescale|do not make up"):
        oft.Transform(*factors, shape=shape, strength=1.0)
    if rescale is None:
        with pytest.raises(ValueError, match=r"oft_diag|do not make up"):
            oft_diag.Transform(factors[0], shape=shape, strength=1.0)


@pytest.mark.parametrize("rows", [range(1, 5), range(0, 3), range(0, 8, 4)])
def test_half_a_block_cannot_be_turned(rows: range) -> None:
    transform = oft.Transform(torch.from_numpy(BLOCKS), shape=(12, 5), strength=1.0)
    with pytest.raises(ValueError, match="no whole blocks of 4 rows"):
        transform.apply(torch.ones(len(rows), 5), rows)
