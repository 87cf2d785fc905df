"""bake plan"""

from __future__ import annotations

from pathlib import Path

from models import save_base, sd1_pair
from support import bake, drafts


def test_a_plan_says_what_fuse_would_do_and_writes_nothing(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = bake("plan", base, "-l", f"{lora}:0.8")
    assert done.code == 0
    assert "unet 5/5, te 1/1" in done.out
    assert "6 tensors fused" in done.out
    assert sorted(tmp_path.iterdir()) == before


def test_the_document_has_the_keys_of_fuse(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    planned = bake("plan", base, "-l", lora, "--json").json
    done = bake("fuse", base, "-l", lora, "-o", tmp_path / "o.safetensors", "--json").json
    assert {key: value for key, value in planned.items() if key != "output"}.items() <= done.items()
    assert "plan" not in planned
    assert "plan" in bake("plan", base, "-l", lora, "--json", "-v").json


def test_the_refusals_are_those_of_the_run(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    sdxl = save_base(tmp_path / "xl.safetensors", "sdxl")
    assert bake("plan", sdxl, "-l", lora).code == 5
    assert bake("plan", base, "-l", lora, "-o", base).code == 8
    assert bake("plan", base).code == 2
    assert not drafts(tmp_path)


def test_verbose_lists_the_tensors(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    done = bake("plan", base, "-l", f"{lora}:0.8", "-v")
    assert "middle_block.1.proj_in.weight F16 16x16x1x1: lora_unet_mid_block_attentions_0_proj_in * 0.4" in done.out
