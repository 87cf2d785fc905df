"""bake inspect"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from models import llama, random_arrays, save_base, sd1_pair
from support import KOHYA_LORA, SD1_BASE, bake, save


def test_a_checkpoint() -> None:
    found = bake("inspect", SD1_BASE, "--json").json
    assert (found["kind"], found["family"], found["layout"]) == ("checkpoint", "sd1", "original")
    assert found["tensors"] == 1145
    assert found["components"].keys() == {"unet", "te1", "vae"}
    assert found["dtypes"] == {"I64": 1, "I32": 1, "F16": 1143}


def test_an_adapter() -> None:
    found = bake("inspect", KOHYA_LORA, "--json").json
    assert (found["kind"], found["family"]) == ("adapter", "sd1")
    assert (found["dialects"], found["algorithms"], found["ranks"]) == (["kohya"], ["lora"], [2])
    assert found["modules"] == 264
    assert found["metadata"]["ss_output_name"] == "watercolour"


def test_an_adapter_against_a_base_it_fits(tmp_path: Path) -> None:
    found = bake("inspect", KOHYA_LORA, "--against", SD1_BASE, "--json").json["coverage"]
    assert found["fits"] is True
    assert found["components"]["unet"] == {"matched": 192, "total": 192}
    assert "fits      yes: unet 192/192" in bake("inspect", KOHYA_LORA, "--against", SD1_BASE).out


def test_an_adapter_against_a_base_it_does_not_fit(tmp_path: Path) -> None:
    sdxl = save_base(tmp_path / "xl.safetensors", "sdxl")
    done = bake("inspect", KOHYA_LORA, "--against", sdxl, "--json")
    assert done.code == 0
    assert done.json["coverage"]["refusal"]["exit"] == 5


def test_what_is_inside_a_bake_and_in_a_bake_of_a_bake(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    bake("fuse", base, "-l", f"{lora}:0.8", "-o", tmp_path / "one.safetensors")
    bake("fuse", tmp_path / "one.safetensors", "-l", f"{lora}:-0.25", "-o", tmp_path / "two.safetensors")
    out = bake("inspect", tmp_path / "two.safetensors").out
    assert (
        out.index("style.safetensors at -0.25")
        < out.index("style.safetensors at 0.8")
        < out.index("base.safetensors by")
    )


def test_hashes_are_those_that_sites_show(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"x": np.arange(600_000, dtype=np.float32)})
    content = path.read_bytes()
    (hashes,) = bake("inspect", path, "--hashes", "--json").json["hashes"].values()
    data = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert hashes == {
        "sha256": hashlib.sha256(content).hexdigest(),
        "autov1": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
        "autov2": hashlib.sha256(content).hexdigest()[:10],
        "autov3": data[:12],
        "data_sha256": data,
    }


@pytest.mark.parametrize(("name", "kind"), [("emb_params", "textual inversion"), ("image_proj.a.weight", "IP-Adapter")])
def test_other_files_are_named(tmp_path: Path, name: str, kind: str) -> None:
    done = bake("inspect", save(tmp_path / "a.safetensors", {name: np.ones((2, 2))}))
    assert done.code == 0
    assert kind in done.out


def test_an_unsupported_algorithm_is_described_all_the_same(tmp_path: Path) -> None:
    factors = {
        f"lora_unet_mid_block_attentions_0_proj_in.{f}": np.ones((2, 2)) for f in ("lokr_w1", "lokr_w2", "alpha")
    }
    found = bake("inspect", save(tmp_path / "a.safetensors", {**factors}), "--json").json
    assert (found["algorithms"], found["supported"]) == (["LoKr"], False)
    assert "LoKr" in found["refusal"]


def test_folders(tmp_path: Path) -> None:
    save(tmp_path / "m" / "model.safetensors", random_arrays(llama()))
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert bake("inspect", tmp_path / "m", "--json").json["family"] == "llama"
    save(
        tmp_path / "l" / "adapter_model.safetensors",
        {"x.lora_A.weight": np.ones((1, 2)), "x.lora_B.weight": np.ones((2, 1))},
    )
    assert bake("inspect", tmp_path / "l", "--json").json["kind"] == "adapter"


def test_a_quantised_checkpoint_is_called_so(tmp_path: Path) -> None:
    path = save(
        tmp_path / "q.safetensors", {"a.weight": np.ones(4, np.uint8), "a.weight.absmax": np.ones(1, np.float32)}
    )
    assert bake("inspect", path, "--json").json["quantised"] == "bitsandbytes 4-bit"


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("text")
    assert bake("inspect", tmp_path / "a.safetensors").code == 3
    assert bake("inspect", tmp_path / "none").code == 3
    assert bake("inspect", tmp_path).code == 3


def test_long_metadata_is_cut_unless_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"x": np.ones(1)}, {f"key{n}": "v" * 300 for n in range(30)})
    short, long = bake("inspect", path).out, bake("inspect", path, "-v").out
    assert "... and 10 more" in short
    assert "v" * 300 in long
    assert "v" * 300 not in short
