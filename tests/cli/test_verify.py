"""bake verify"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import sd1_pair
from support import bake


@pytest.fixture
def baked(tmp_path: Path) -> tuple[Path, Path, Path]:
    base, lora, _ = sd1_pair(tmp_path)
    assert bake("fuse", base, "-l", f"{lora}:0.8", "-o", tmp_path / "out.safetensors").code == 0
    return base, lora, tmp_path / "out.safetensors"


def test_the_stored_recipe_is_replayed(baked) -> None:
    done = bake("verify", baked[2], "--full")
    assert done.code == 0, done.err
    assert "1139 untouched tensors identical" in done.out
    assert "elements equal float64 rounded once (" in done.out
    assert "largest error" in done.out


def test_inputs_elsewhere_are_searched_for(baked, tmp_path: Path) -> None:
    base, lora, output = baked
    (tmp_path / "moved").mkdir()
    for path in (base, lora):
        path.rename(tmp_path / "moved" / path.name)
    (tmp_path / "empty").mkdir()
    output = output.rename(tmp_path / "empty" / "out.safetensors")
    missing = bake("verify", output)
    assert missing.code == 3
    assert "--search" in missing.err
    assert bake("verify", output, "--search", tmp_path / "moved").code == 0


def test_inputs_may_be_given(baked) -> None:
    base, lora, output = baked
    assert bake("verify", output, "--base", base, "-l", f"{lora}:0.8").code == 0
    wrong = bake("verify", output, "--base", base, "-l", f"{lora}:0.7")
    assert wrong.code == 9
    assert "WRONG" in wrong.out


def test_the_document(baked) -> None:
    _, _, output = baked
    found = bake("verify", output, "--json").json
    assert {"schema", "ok", "untouched_identical", "elements", "equal", "max_ulp", "findings"} <= set(found)
    assert found["ok"] is True


def test_damage_is_exit_9_with_a_document(baked) -> None:
    _, _, output = baked
    content = bytearray(output.read_bytes())
    content[-2] ^= 0x7F
    output.write_bytes(content)
    done = bake("verify", output, "--full", "--json")
    assert done.code == 9
    assert json.loads(done.out)["ok"] is False


def test_adapters_without_a_base_are_a_usage_error(baked) -> None:
    _, lora, output = baked
    assert bake("verify", output, "-l", lora).code == 2
    assert bake("verify", output, "--dtype", "fp16").code == 2


def test_a_file_without_recipe_says_what_to_do(baked) -> None:
    done = bake("verify", baked[0])
    assert done.code == 3
    assert "--base" in done.err
