"""LoKr against numpy.kron, LyCORIS and PEFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random
from trainers import LAYERS, WEIGHTS, as_rows, in_pieces, lycoris, peft, rows_of

from bake.adapters import lokr
from bake.keys.shapes_additive import lokr_shape

W1 = {"whole": {"kron_w1": random(0, 2, 3)}, "pair": {"kron_w1_a": random(0, 2, 2), "kron_w1_b": random(1, 2, 3)}}
W2 = {
    "whole": {"kron_w2": random(2, 4, 5)},
    "whole with a kernel": {"kron_w2": random(2, 4, 5, 3, 3)},
    "pair": {"kron_w2_a": random(2, 4, 2), "kron_w2_b": random(3, 2, 5)},
    "pair with a kernel": {"kron_w2_a": random(2, 4, 2, 1, 1), "kron_w2_b": random(3, 2, 5, 3, 3)},
    "tucker": {"kron_w2_a": random(2, 2, 4), "kron_w2_b": random(3, 2, 5), "kron_t2": random(4, 2, 2, 3, 3)},
}
FORMS = [(small, large) for small in W1 for large in W2]


def side(arrays, name):
    whole, a, b = (arrays.get(f"kron_{name}{end}") for end in ("", "_a", "_b"))
    if whole is not None:
        return whole
    if "kron_t2" in arrays and name == "w2":
        return np.einsum("ijkl,ip,jr->prkl", arrays["kron_t2"], a, b)
    return np.tensordot(a.reshape(a.shape[:2]), b, 1)


def by_numpy(arrays):
    w1, w2 = side(arrays, "w1"), side(arrays, "w2")
    return np.kron(w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:])), w2)


def factors(arrays, dtype=torch.float64):
    return {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}


def delta(inputs, *, rows, scale, **settings):
    columns = lokr_shape({name: tuple(value.shape) for name, value in inputs.items()})[1]
    dtype = next(iter(inputs.values())).dtype
    return rows_of(lokr.Update(**inputs, scale=scale, **settings), rows, columns, dtype)


def spelled(state):
    return {name.replace("lokr_", "kron_"): value for name, value in state.items()}


def scale_of(inputs, alpha):
    """alpha / rank as LyCORIS trains; 1 where both sides are whole."""
    low = inputs.get("kron_w2_b", inputs.get("kron_w1_b"))
    return 1.0 if low is None else alpha / low.shape[0]


@pytest.mark.parametrize(("small", "large"), FORMS)
@pytest.mark.parametrize("scale", [*WEIGHTS, 0.0])
def test_the_definition(small: str, large: str, scale: float) -> None:
    arrays = W1[small] | W2[large]
    expected = scale * by_numpy(arrays).reshape(8, -1)
    found = delta(factors(arrays), rows=range(8), scale=scale)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    assert tuple(found.shape) == lokr_shape({name: array.shape for name, array in arrays.items()})


def test_early_factors_share_the_kernel_between_them() -> None:
    """As in files of early 2023: w1 (4, 6), w2 (5, 9) for a convolution (20, 6, 3, 3)."""
    w1, w2 = random(0, 4, 6), random(1, 5, 9)
    found = delta(factors({"kron_w1": w1, "kron_w2": w2}), rows=range(20), scale=1.0)
    np.testing.assert_array_equal(found.reshape(20, 6, 3, 3), np.kron(w1, w2).reshape(20, 6, 3, 3))


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize(("small", "large"), FORMS)
def test_a_tensor_stored_the_other_way_round_gets_the_update_turned(
    small: str, large: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where w2 is too large to be kept and made for the rows that are asked for."""
    monkeypatch.setattr("bake.adapters.rows._SETTLED", kept)
    arrays = W1[small] | W2[large]
    expected = by_numpy(arrays).reshape(8, -1)
    update = lokr.Update(**factors(arrays), scale=0.7, transposed=True)
    found = torch.cat([rows_of(update, rows, 8) for rows in in_pieces(expected.shape[1], 4)])
    np.testing.assert_allclose(found, 0.7 * expected.T, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_conv1d_of_peft_has_the_factors_in_the_other_order(scale: float) -> None:
    w1, w2 = random(0, 2, 3), random(1, 4, 5, 3)
    expected = np.stack([np.kron(w2[:, :, tap], w1) for tap in range(3)], 2).reshape(8, 45)
    update = lokr.Update(**factors({"kron_w1": w1, "kron_w2": w2}), scale=scale, swapped=True)
    for size in (1, 3, 8):
        found = torch.cat([rows_of(update, rows, 45) for rows in in_pieces(8, size)])
        np.testing.assert_allclose(found, scale * expected, rtol=1e-15)


@pytest.mark.parametrize(("small", "large"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_alone_are_the_rows_of_the_whole(small: str, large: str, dtype) -> None:
    inputs = factors(W1[small] | W2[large], dtype)
    whole = delta(inputs, rows=range(8), scale=0.7)
    assert whole.dtype == dtype
    pieces = torch.cat([delta(inputs, rows=rows, scale=0.7) for rows in in_pieces(8)])
    assert torch.equal(pieces, whole)
    assert delta(inputs, rows=range(0), scale=0.7).shape == (0, whole.shape[1])


def test_a_missing_side_is_an_error() -> None:
    matrix = torch.ones(2, 2)
    with pytest.raises(ValueError, match="w2"):
        lokr.Update(kron_w1=matrix, scale=1.0)
    with pytest.raises(ValueError, match="w1"):
        lokr.Update(kron_w1_a=matrix, kron_w2=matrix, scale=1.0)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_tucker": True}, {"decompose_both": True}, {"full_matrix": True}, {"unbalanced_factorization": True}],
    ids=str,
)
@pytest.mark.parametrize("multiplier", WEIGHTS)
def test_lycoris_trains_with_it(layer: str, settings, multiplier: float) -> None:
    """Also that alpha / rank counts once (LyCORIS' own merge squares it), and not at all where nothing is low-rank."""
    trained = lycoris("lokr", "LokrModule", LAYERS[layer](), multiplier, lora_dim=1, alpha=3.0, factor=2, **settings)
    inputs, base = spelled(trained.factors), as_rows(trained.base)
    assert lokr_shape({name: tuple(value.shape) for name, value in inputs.items()}) == base.shape
    update = delta(inputs, rows=range(8), scale=multiplier * scale_of(inputs, trained.alpha))
    torch.testing.assert_close(base + update, as_rows(trained.expected), rtol=0, atol=1e-11)


# Not Conv1d: PEFT 0.21 pairs the dimensions of w1 with the wrong ones of a three-dimensional w2, or fails.
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "conv 1d"])
@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("rank", [1, 8])  # 8: both sides whole, where PEFT, unlike LyCORIS, still scales
@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_peft_merges_it(layer: str, effective: bool, rank: int, multiplier: float) -> None:
    settings = {"r": rank, "alpha": 3.0, "decompose_both": True, "decompose_factor": 4}
    trained, _ = peft("LoKrConfig", LAYERS[layer](), multiplier, use_effective_conv2d=effective, **settings)
    inputs, base = spelled(trained.factors), as_rows(trained.base)
    assert lokr_shape({name: tuple(value.shape) for name, value in inputs.items()}) == base.shape
    update = delta(inputs, rows=range(8), scale=multiplier * 3.0 / rank)
    torch.testing.assert_close(base + update, as_rows(trained.expected), rtol=0, atol=1e-11)
