"""DoRA along the input axis on a layer whose halves the base has in the other order."""

from __future__ import annotations

from pathlib import Path

import dits
import numpy as np
import pytest
from models import random_arrays
from support import Arrays, load, random, save

from bake.api import fuse

MODULE, TENSOR = "transformer.norm_out.linear", "final_layer.adaLN_modulation.1.weight"


def swapped(values: np.ndarray) -> np.ndarray:
    first, second = np.split(values, 2)
    return np.concatenate([second, first])


def lora(rows: int, columns: int) -> tuple[Arrays, np.ndarray]:
    up, down = random(1, rows, 2), random(2, 2, columns)
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": np.array(3.0)}, 1.5 * up @ down


def loha(rows: int, columns: int) -> tuple[Arrays, np.ndarray]:
    w1_a, w2_a = random(1, rows, 2), random(2, rows, 2)
    w1_b, w2_b = random(3, 2, columns), random(4, 2, columns)
    factors = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b, "alpha": np.array(3.0)}
    return factors, 1.5 * (w1_a @ w1_b) * (w2_a @ w2_b)


@pytest.mark.parametrize("algorithm", [lora, loha])
@pytest.mark.parametrize("weight", [1.0, 0.7])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_lengths_are_those_of_the_whole_layer(tmp_path: Path, algorithm, weight: float, axis: int) -> None:
    arrays = random_arrays(dits.sd3(), np.float32)
    base = save(tmp_path / "base.safetensors", arrays)
    rows, columns = arrays[TENSOR].shape
    factors, delta = algorithm(rows, columns)
    magnitude = np.abs(random(5, *((1, columns) if axis else (rows, 1)))) + 1
    adapter = save(
        tmp_path / "style.safetensors",
        {f"{MODULE}.{suffix}": factor for suffix, factor in {**factors, "dora_scale": magnitude}.items()},
    )
    found = load(fuse(base, [(adapter, weight)], tmp_path / "out.safetensors", verify="full").output)
    trained = swapped(arrays[TENSOR].astype(np.float64))  # as diffusers has it
    updated = trained + delta
    lengths = np.linalg.norm(updated, axis=1 - axis, keepdims=True)
    expected = weight * updated * magnitude / lengths + (1 - weight) * trained
    np.testing.assert_allclose(found[TENSOR], swapped(expected), rtol=0, atol=2e-6)
    for name in arrays.keys() - {TENSOR}:
        np.testing.assert_array_equal(found[name], arrays[name])
