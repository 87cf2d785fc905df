"""The size of updates, against float64 NumPy that forms them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import SD1_MODULES, kohya_lora
from names import small
from support import DIFFUSERS_LORA, KOHYA_LORA, bake, lora_delta, random, save

from bake.identify.adapter import identify_adapter
from bake.io.adapter import open_adapter
from bake.norms import measure_norms


def norms(path: Path):
    return measure_norms(identify_adapter(open_adapter(path)))


def test_the_norm_of_a_lora_is_that_of_its_whole_update(tmp_path: Path) -> None:
    arrays, deltas = kohya_lora(small("sd1"), alpha=3.0)
    found = norms(save(tmp_path / "a.safetensors", arrays))["modules"]
    expected = {module: np.linalg.norm(deltas[tensor]) for module, tensor in SD1_MODULES.items()}
    assert found == pytest.approx(expected, rel=1e-12)


def test_blocks_and_components_add_up(tmp_path: Path) -> None:
    found = norms(KOHYA_LORA)
    assert found["components"].keys() == {"unet", "te1"}
    for part in found["components"].values():
        assert part["norm"] ** 2 == pytest.approx(sum(norm**2 for norm in part["blocks"].values()))
    whole = sum(part["norm"] ** 2 for part in found["components"].values())
    assert whole == pytest.approx(sum(norm**2 for norm in found["modules"].values()))
    assert sum(part["modules"] for part in found["components"].values()) == len(found["modules"]) == 264
    assert list(found["components"]["unet"]["blocks"])[3] == "mid_block"


def test_the_tucker_form_and_stored_differences(tmp_path: Path) -> None:
    up, down, mid = random(1, 8, 3, 1, 1), random(2, 2, 4, 1, 1), random(3, 3, 2, 3, 3)
    weight, bias = random(4, 1500, 1000), random(5, 8)
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    arrays = {
        f"{module}.lora_up.weight": up,
        f"{module}.lora_down.weight": down,
        f"{module}.lora_mid.weight": mid,
        "lora_unet_time_embedding_linear_1.diff": weight,
        "lora_unet_time_embedding_linear_1.diff_b": bias,
    }
    found = norms(save(tmp_path / "a.safetensors", arrays))["modules"]
    assert found[module] == pytest.approx(np.linalg.norm(lora_delta(up, down, mid)), rel=1e-12)
    both = np.hypot(np.linalg.norm(weight), np.linalg.norm(bias))
    assert found["lora_unet_time_embedding_linear_1"] == pytest.approx(both, rel=1e-12)


def test_what_has_no_finite_norm_is_named(tmp_path: Path) -> None:
    arrays, _ = kohya_lora(small("sd1"))
    broken = "lora_unet_mid_block_attentions_0_proj_in"
    arrays[f"{broken}.lora_up.weight"][0, 0] = np.nan
    path = save(tmp_path / "a.safetensors", arrays)
    assert norms(path)["unmeasured"] == [{"module": broken, "reason": "its factors hold NaN or infinity"}]
    assert "norm      not of 1 modules: its factors hold NaN or infinity" in bake("inspect", path, "--norms").out


def test_what_bake_does_not_fuse_is_not_measured(tmp_path: Path) -> None:
    arrays, _ = kohya_lora(small("sd1"))
    arrays["lora_unet_mid_block_attentions_0_proj_out.hra_u"] = np.ones((4, 2))
    (entry,) = norms(save(tmp_path / "a.safetensors", arrays))["unmeasured"]
    assert entry["module"] == "lora_unet_mid_block_attentions_0_proj_out"


def test_the_summary_shows_components_and_blocks() -> None:
    out = bake("inspect", KOHYA_LORA, "--norms").out
    assert "norm      unet 1.489: the updates of 192 modules together, at weight 1" in out
    assert "#################### up_blocks_1\n" in out
    assert "norm  " not in bake("inspect", KOHYA_LORA).out
    found = bake("inspect", DIFFUSERS_LORA, "--norms", "--json").json["norms"]
    assert "down_blocks.0" in found["components"]["unet"]["blocks"]
