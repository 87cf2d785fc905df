"""AdaLoRA against its definition in NumPy and against PEFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import random
from trainers import LAYERS, as_rows, peft

from bake.adapters import adalora
from bake.keys.shapes_additive import adalora_shape


@pytest.mark.parametrize("scale", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_definition(scale: float, dtype) -> None:
    up, down, lora_e = random(0, 6, 3), random(1, 3, 5), random(2, 3, 1)
    lora_e[1] = 0  # pruned
    left, right = adalora.low_rank(*(torch.from_numpy(array).to(dtype) for array in (up, down, lora_e)), scale=scale)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(left @ right, scale * up @ (lora_e * down), rtol=tolerance, atol=tolerance)
    assert left.dtype == right.dtype == dtype


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "conv 1d"])  # PEFT has no AdaLoRA for it
def test_peft_merges_it(layer: str) -> None:
    """PEFT divides by the initial rank + 1e-5, in float32: hence the tolerance."""
    trained, _ = peft("AdaLoraConfig", LAYERS[layer](), init_r=4, lora_alpha=3, total_step=10)
    state, base = trained.factors, as_rows(trained.base)
    inputs = {"up": state["lora_B"], "down": state["lora_A"], "lora_e": state["lora_E"]}
    assert adalora_shape({name: tuple(value.shape) for name, value in inputs.items()}) == base.shape
    left, right = adalora.low_rank(**inputs, scale=3 / (4 + 1e-5))
    torch.testing.assert_close(left @ right, as_rows(trained.expected) - base, rtol=1e-6, atol=1e-7)
