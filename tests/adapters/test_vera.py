"""VeRA against its definition in NumPy and against PEFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random
from torch import nn

from bake.adapters import vera
from bake.keys.shapes_additive import vera_shape


@pytest.mark.parametrize("scale", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_definition(scale: float, dtype) -> None:
    """A layer of 6 x 5 beside wider ones: the shared matrices are cut to its size."""
    lambda_b, lambda_d, a, b = random(0, 6), random(1, 3), random(2, 3, 9), random(3, 8, 3)
    left, right = vera.low_rank(
        *(torch.from_numpy(array).to(dtype) for array in (lambda_b, lambda_d, a, b)), in_features=5, scale=scale
    )
    expected = scale * (lambda_b[:, None] * b[:6]) @ (lambda_d[:, None] * a[:, :5])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(left @ right, expected, rtol=tolerance, atol=tolerance)
    assert left.dtype == right.dtype == dtype
    assert (
        left.shape[0]
        == vera_shape({"vera_lambda_b": (6,), "vera_lambda_d": (3,), "vera_a": (3, 9), "vera_b": (8, 3)})[0]
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_peft_merges_it(transposed: bool) -> None:
    """Two layers of different sizes share the matrices. VeRA has no strength of its own, so only the weight 1 here."""
    library = pytest.importorskip("peft", reason="the PEFT oracle is not installed")
    utilities = pytest.importorskip("transformers.pytorch_utils", reason="the transformers library is not installed")
    torch.manual_seed(0)

    def layer(ins: int, out: int) -> nn.Module:
        return (utilities.Conv1D(out, ins) if transposed else nn.Linear(ins, out)).double()

    layers = nn.Sequential(layer(6, 8), layer(8, 4))
    base = [module.weight.detach().clone() for module in layers]
    config = library.VeraConfig(target_modules=["0", "1"], r=3, fan_in_fan_out=transposed)
    model = library.get_peft_model(layers, config).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    state = library.get_peft_model_state_dict(model)
    shared = state["base_model.vera_A"], state["base_model.vera_B"]
    merged = model.merge_and_unload()
    for number, (out, ins) in enumerate([(8, 6), (4, 8)]):
        own = (state[f"base_model.model.{number}.vera_lambda_{which}"] for which in "bd")
        left, right = vera.low_rank(*own, *shared, in_features=ins, scale=1.0)
        assert (len(left), right.shape[1]) == (out, ins)
        update = (left @ right).T if transposed else left @ right
        torch.testing.assert_close(base[number] + update, merged[number].weight.detach(), rtol=0, atol=1e-12)
