"""LoRA against its definition in NumPy and against LyCORIS and PEFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import lora_delta, random

from bake.adapters import full, lora, replace

UP, DOWN = random(0, 6, 3), random(1, 3, 5)


def update(up, down, mid=None, *, scale):
    left, right = lora.low_rank(up, down, mid, scale=scale)
    return left @ right


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("scale", [1.0, 0.7, -0.5])
def test_linear(scale: float) -> None:
    np.testing.assert_allclose(update(*tensors(UP, DOWN), scale=scale), scale * lora_delta(UP, DOWN), rtol=1e-12)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (2, 3, 3)])
def test_convolution_has_the_kernel_in_down(kernel: tuple[int, ...]) -> None:
    up, down = random(0, 6, 3, *(1 for _ in kernel)), random(1, 3, 5, *kernel)
    expected = lora_delta(up, down).reshape(6, -1)
    np.testing.assert_allclose(update(*tensors(up, down), scale=1.0), expected, rtol=1e-12)


def test_tucker_has_the_kernel_in_mid() -> None:
    up, down, mid = random(0, 6, 3, 1, 1), random(1, 2, 5, 1, 1), random(2, 3, 2, 3, 3)
    expected = 0.7 * lora_delta(up, down, mid).reshape(6, -1)
    np.testing.assert_allclose(update(*tensors(up, down, mid), scale=0.7), expected, rtol=1e-12)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("multiplier", [1.0, 0.7, -0.5])
def test_lycoris_forward_agrees_on_a_convolution(tucker: bool, multiplier: float) -> None:
    locon = pytest.importorskip("lycoris.modules.locon", reason="the LyCORIS oracle is not installed")
    torch.manual_seed(0)
    base = torch.nn.Conv2d(5, 6, 3, padding=1, bias=False)
    module = locon.LoConModule("x", base, multiplier=multiplier, lora_dim=3, alpha=2.0, use_tucker=tucker)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    state = {name.removesuffix(".weight"): value.detach() for name, value in module.state_dict().items()}
    delta = update(
        state["lora_up"], state["lora_down"], state.get("lora_mid"), scale=float(state["alpha"]) / 3 * multiplier
    )
    module.apply_to()
    image = torch.randn(1, 5, 7, 7)
    with torch.no_grad():
        expected = base(image)
        found = torch.nn.functional.conv2d(image, module.org_module[0].weight + delta.reshape(6, 5, 3, 3), padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_stored_difference_is_scaled() -> None:
    diff = random(0, 4, 3, 2, 2)
    old = random(1, 4, 12)
    found = full.updated(torch.from_numpy(old), torch.from_numpy(diff.reshape(4, 12)), -0.5)
    np.testing.assert_array_equal(found, old - 0.5 * diff.reshape(4, 12))


@pytest.mark.parametrize(("weight", "kept"), [(0.0, True), (1.0, False), (-0.5, False)])
def test_stored_values_replace_the_old_ones_at_any_weight_but_zero(weight: float, kept: bool) -> None:
    old, value = torch.ones(2, 3), torch.full((2, 3), 7.0)
    assert torch.equal(replace.updated(old, value, weight), old if kept else value)
