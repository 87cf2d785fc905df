"""Adapters of mlx-lm against its rules in float64 NumPy: out = m / |W + scale * (a b)^T| * (W + scale * (a b)^T)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import load, random, save

from bake.api import fuse

SCALE, RANK = 3.0, 2
SHAPES = {  # of a Llama: wide, tall and square matrices
    "model.embed_tokens": (20, 8),
    "model.layers.0.self_attn.q_proj": (8, 8),
    "model.layers.0.self_attn.k_proj": (4, 8),
    "model.layers.0.mlp.down_proj": (8, 12),
    "model.layers.0.mlp.up_proj": (12, 8),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.7, -0.5])
def test_linear_layers_and_embeddings(tmp_path: Path, dora: bool, weight: float) -> None:
    base = {f"{name}.weight": random(i, *shape).astype(np.float32) for i, (name, shape) in enumerate(SHAPES.items())}
    base["model.norm.weight"] = random(9, 8).astype(np.float32)
    (tmp_path / "base").mkdir()
    save(tmp_path / "base" / "model.safetensors", base)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    adapter, expected = {}, dict(base)
    for i, (module, (rows, columns)) in enumerate(SHAPES.items()):
        is_embedding = module.endswith("embed_tokens")
        inputs, outputs = (rows, columns) if is_embedding else (columns, rows)
        a = random(20 + i, inputs, RANK, spread=0.3).astype(np.float32)
        b = random(40 + i, RANK, outputs, spread=0.3).astype(np.float32)
        adapter |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        before = base[f"{module}.weight"].astype(np.float64)
        update = SCALE * a.astype(np.float64) @ b
        after = before + (update if is_embedding else update.T)
        if dora:
            magnitude = (np.linalg.norm(before, axis=1) * (1 + 0.1 * i)).astype(np.float32)
            adapter[f"{module}.m"] = magnitude
            after *= (magnitude.astype(np.float64) / np.linalg.norm(after, axis=1))[:, None]
        expected[f"{module}.weight"] = before + weight * (after - before)
    (tmp_path / "lora").mkdir()
    save(tmp_path / "lora" / "adapters.safetensors", adapter)
    settings = {"fine_tune_type": "dora" if dora else "lora", "lora_parameters": {"rank": RANK, "scale": SCALE}}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    result = fuse(tmp_path / "base", [(tmp_path / "lora", weight)], tmp_path / "out", verify="full")
    assert result.report is not None
    assert result.report.ok
    for name, values in load(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)
