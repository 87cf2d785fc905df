"""Verification finds every kind of damage, and only damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SD1_MODULES, kohya_lora, sd1_pair
from names import small
from support import drafts, load, metadata, raw, save, save_torch

from bake import api
from bake.api import check_output, fuse
from bake.errors import VerificationFailed

TOUCHED = next(iter(SD1_MODULES.values()))
UNTOUCHED = "first_stage_model.decoder.conv_in.weight"


@pytest.fixture
def baked(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(base, LoRA, fused)"""
    base, lora, _ = sd1_pair(tmp_path)
    fuse(base, [(lora, 0.8)], tmp_path / "out.safetensors", verify="none")
    return base, lora, tmp_path / "out.safetensors"


def flip(path: Path, tensor: str, place: int = 0) -> None:
    """Change the highest bits of one stored element."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + length])[tensor]["data_offsets"]
    content[8 + length + begin + 2 * place + 1] ^= 0x3C
    path.write_bytes(content)


@pytest.mark.parametrize("full", [False, True])
def test_a_good_bake_passes(baked, full: bool) -> None:
    base, lora, output = baked
    report = check_output(output, base, [(lora, 0.8)], full=full)
    assert report.ok
    assert report.untouched_identical
    assert report.elements >= report.equal > 0.99 * report.elements
    assert report.max_ulp < 0.55
    if full:
        assert report.elements == sum(np.prod(small("sd1")[name]) for name in SD1_MODULES.values())
        assert report.untouched_bytes == sum(
            len(content) for name, (_, content) in raw(base).items() if name not in SD1_MODULES.values()
        )


def test_a_changed_untouched_byte_is_found(baked) -> None:
    base, lora, output = baked
    flip(output, UNTOUCHED)
    report = check_output(output, base, [(lora, 0.8)], full=True)
    assert not report.ok
    assert not report.untouched_identical
    assert UNTOUCHED in report.findings[0]


@pytest.mark.parametrize("place", [0, 37])
def test_a_changed_touched_element_is_found(baked, place: int) -> None:
    base, lora, output = baked
    flip(output, TOUCHED, place)
    report = check_output(output, base, [(lora, 0.8)], full=True)
    assert not report.ok
    assert TOUCHED in report.findings[0]
    assert report.untouched_identical


def test_an_error_of_one_unit_in_the_last_place_is_found(baked) -> None:
    base, lora, output = baked
    content = bytearray(output.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + length])[TOUCHED]["data_offsets"]
    content[8 + length + begin] ^= 1
    output.write_bytes(content)
    assert not check_output(output, base, [(lora, 0.8)], full=True).ok


def test_the_wrong_side_of_a_tie_is_found(tmp_path: Path) -> None:
    """Sums in the middle of two halves: within float64's error either side would do, but only one is defined."""
    halves = (1 + np.arange(64) / 1024).astype(np.float16).reshape(8, 8)
    base = save(tmp_path / "base.safetensors", {"a.weight": halves})
    factors = {"a.lora_B.weight": np.full((8, 1), 2.0**-6), "a.lora_A.weight": np.full((1, 8), 2.0**-5)}
    lora = save(tmp_path / "lora.safetensors", {name: array.astype(np.float16) for name, array in factors.items()})
    output = tmp_path / "out.safetensors"
    assert fuse(base, [lora], output, verify="full").report.equal == 64
    content = output.read_bytes()
    due = np.frombuffer(content[-128:], np.uint16)
    assert (due % 2 == 0).all()
    for place, other in ((0, 1), (1, -1)):  # rounded down, rounded up
        wrong = due.copy()
        wrong[place] = int(due[place]) + other
        output.write_bytes(content[:-128] + wrong.tobytes())
        report = check_output(output, base, [lora], full=True)
        assert [finding.split(": ")[0] for finding in report.findings] == ["a.weight"]


@pytest.mark.parametrize("weight", [0.81, -0.8, 0.0])
def test_another_weight_is_found_even_by_the_sample(baked, weight: float) -> None:
    base, lora, output = baked
    assert not check_output(output, base, [(lora, weight)]).ok


def test_the_unfused_base_is_found(baked) -> None:
    base, lora, _ = baked
    assert not check_output(base, base, [(lora, 0.8)]).ok


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda a: a.pop(UNTOUCHED), "is missing"),
        (lambda a: a.update(extra=np.ones(3, np.float16)), "should not be there"),
        (lambda a: a.update({UNTOUCHED: a[UNTOUCHED].astype(np.float32)}), "was planned"),
        (lambda a: a.update({UNTOUCHED: a[UNTOUCHED].reshape(-1)}), "was planned"),
    ],
)
def test_a_changed_structure_is_found(baked, change, complaint: str) -> None:
    base, lora, output = baked
    with_dtypes = {
        name: array.astype({"F16": "f2", "I64": "i8", "I32": "i4"}[raw(output)[name][0]])
        for name, array in load(output).items()
    }
    change(with_dtypes)
    report = check_output(save(output, with_dtypes, metadata(output)), base, [(lora, 0.8)])
    assert complaint in report.findings[0]


def test_the_output_of_another_tool_is_judged_alike(tmp_path: Path) -> None:
    """kohya's own order of operations: float32 sum, cast to fp16, written by the safetensors library."""
    base, lora, _ = sd1_pair(tmp_path)
    factors = load(lora)
    tensors = {}
    for name, array in load(base).items():
        stored = {"F16": torch.float16, "I64": torch.int64, "I32": torch.int32}[raw(base)[name][0]]
        tensors[name] = torch.from_numpy(np.asarray(array)).to(stored)
    for module, name in SD1_MODULES.items():
        up, down = (torch.from_numpy(factors[f"{module}.lora_{side}.weight"]).float() for side in ("up", "down"))
        delta = (up.flatten(1) @ down.flatten(1)).reshape(tensors[name].shape) * 0.5
        tensors[name] = (tensors[name].float() + delta).half()
    output = save_torch(tmp_path / "theirs.safetensors", tensors)
    assert check_output(output, base, [lora], full=True).ok


def test_a_draft_that_fails_verification_never_becomes_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"old")
    write = api._write_headers

    def damage(plan, targets, digests) -> None:
        write(plan, targets, digests)
        flip(targets[""].path, TOUCHED)

    monkeypatch.setattr(api, "_write_headers", damage)
    with pytest.raises(VerificationFailed, match=TOUCHED) as caught:
        fuse(base, [lora], output, overwrite=True, verify="full")
    assert caught.value.exit_code == 9
    assert output.read_bytes() == b"old"
    assert not drafts(tmp_path)


def test_the_sample_holds_every_component_and_is_the_same_in_every_run(tmp_path: Path) -> None:
    from bake.verify.numeric import sampled, sampled_rows

    base, lora, _ = sd1_pair(tmp_path)
    arrays, _ = kohya_lora(small("sd1"))
    plan = api.build_plan(base, [lora, save(tmp_path / "b.safetensors", arrays)])
    touched = [tensor for _, tensor in plan.tensors() if tensor.terms]
    assert {tensor.component for tensor in sampled(touched)} == {"unet", "te1"}
    for tensor in touched:
        rows = sampled_rows(tensor)
        assert rows == sampled_rows(tensor)
        assert {0, tensor.shape[0] - 1} <= {row.start for row in rows}
