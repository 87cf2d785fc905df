"""Scaled fp8 from end to end: bases of both generations, written and read as ComfyUI does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import peft_lora
from numpy.typing import NDArray
from scaled import FP8, PLAIN, SHAPES, TOUCHED, plain_tensors, quantised, scaled_base, weights
from support import bake, load, metadata, random, raw, save, save_torch
from torch import Tensor

from bake.api import check_output, fuse
from bake.errors import NonFinite
from bake.execute import parts
from bake.keys.scaled import WRITTEN
from bake.verify.rounding import round_once

PREFIX = "diffusion_model."
KINDS = {"e4m3fn": "F8_E4M3", "e5m2": "F8_E5M2"}


def lora(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """(adapter, tensor name -> float64 update)."""
    arrays = peft_lora(SHAPES, TOUCHED, prefix=PREFIX)
    updates = {
        name: torch.from_numpy(
            arrays[f"{PREFIX}{name.removesuffix('.weight')}.lora_B.weight"].astype(np.float64)
            @ arrays[f"{PREFIX}{name.removesuffix('.weight')}.lora_A.weight"].astype(np.float64)
        )
        for name in TOUCHED
    }
    return save(path, arrays), updates


def due(weight: Tensor, tag: str, by_row: bool) -> tuple[Tensor, Tensor]:
    """(elements, scale) that a weight (float64) is to be stored as."""
    largest = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}[tag]
    size = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().amax()
    scale = (size / largest).float()
    return torch.from_numpy(round_once((weight / scale.double()).numpy(), tag)), scale


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("new", [False, True])
def test_updates_are_added_to_what_the_layers_mean(
    tmp_path: Path, new: bool, kind: str, by_row: bool, rounding: str
) -> None:
    base = scaled_base(tmp_path / "base.safetensors", new, kind, by_row)
    adapter, updates = lora(tmp_path / "a.safetensors")
    output = tmp_path / "out.safetensors"
    result = fuse(base, [adapter], output, rounding=rounding, verify="full")
    before, after, stored = weights(base), raw(base), raw(output)
    found = load(output)
    end = ".weight_scale" if new else ".scale_weight"
    assert stored.keys() == after.keys()
    for name in SHAPES:
        scale = name.removesuffix(".weight") + end
        if name not in TOUCHED:
            assert stored[name] == after[name]
            assert stored[scale] == after[scale]
            continue
        elements, new_scale = due(before[name] + updates[name], KINDS[kind], by_row)
        np.testing.assert_array_equal(found[scale], new_scale.double())
        if rounding == "nearest":
            np.testing.assert_array_equal(found[name], elements)
        error = (weights(output)[name] - before[name] - updates[name]).abs()
        step = {"e4m3fn": 1 / 16, "e5m2": 1 / 8}[kind] * (1 if rounding == "nearest" else 2)
        size = (before[name] + updates[name]).abs()
        assert bool((error <= step * size + 1e-4 * size.amax()).all())
    rest = stored.keys() - {name for layer in TOUCHED for name in (layer, layer.removesuffix(".weight") + end)}
    assert all(stored[name] == after[name] for name in rest)
    assert result.report is not None
    assert result.report.equal == result.report.elements
    assert check_output(output, search=[tmp_path], full=True).ok


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize(("dtype", "tag"), [("bf16", "BF16"), ("fp32", "F32"), ("fp8_e4m3fn", "F8_E4M3")])
def test_a_scaled_base_may_be_written_plain(tmp_path: Path, new: bool, dtype: str, tag: str) -> None:
    base = scaled_base(tmp_path / "base.safetensors", new, by_row=True, in_metadata=new)
    adapter, updates = lora(tmp_path / "a.safetensors")
    output = tmp_path / "out.safetensors"
    fuse(base, [adapter], output, dtype=dtype, verify="full")
    before, found = weights(base), load(output)
    assert found.keys() == SHAPES.keys() | PLAIN.keys()
    assert "_quantization_metadata" not in metadata(output)
    for name in SHAPES:
        exact = before[name] + updates.get(name, torch.zeros(()))
        np.testing.assert_array_equal(found[name], round_once(exact.numpy(), tag))


@pytest.mark.parametrize("dtype", sorted(WRITTEN))
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_16_bit_base_may_be_written_scaled(tmp_path: Path, dtype: str, rounding: str) -> None:
    base = save_torch(tmp_path / "base.safetensors", plain_tensors())
    adapter, updates = lora(tmp_path / "a.safetensors")
    output = tmp_path / "out.safetensors"
    result = fuse(base, [adapter], output, dtype=dtype, rounding=rounding, verify="full")
    before, found = load(base), load(output)
    kind = dtype.split("_")[1]
    for name in SHAPES:
        exact = torch.from_numpy(before[name]) + updates.get(name, torch.zeros(()))
        elements, scale = due(exact, KINDS[kind], False)
        generation = WRITTEN[dtype]
        assert found[name.removesuffix(".weight") + generation.scale] == scale.item()
        if rounding == "nearest":
            np.testing.assert_array_equal(found[name], elements)
    assert result.report is not None
    assert result.report.equal == result.report.elements
    again = tmp_path / "again.safetensors"
    fuse(output, [], again, dtype="bf16", verify="full")
    assert load(again).keys() == before.keys()
    for name, weight in weights(output).items():
        np.testing.assert_array_equal(load(again)[name], round_once(weight.numpy(), "BF16"))


def adapters() -> dict[str, dict[str, NDArray[np.float32]]]:
    """What one layer of the model may get, by algorithm; of blocks.0.attn.q, (8, 16)."""
    layer = f"{PREFIX}blocks.0.attn.q."

    def factor(seed: int, *shape: int) -> NDArray[np.float32]:
        return (random(seed, *shape) * 0.2).astype(np.float32)

    low_rank = {layer + "lora_up.weight": factor(1, 8, 2), layer + "lora_down.weight": factor(2, 2, 16)}
    return {
        "lora": low_rank,
        "dora": low_rank | {layer + "dora_scale": np.abs(factor(3, 8, 1)) + np.float32(0.1)},
        "loha": {
            layer + name: factor(seed, *shape)
            for seed, (name, shape) in enumerate(
                {"hada_w1_a": (8, 2), "hada_w1_b": (2, 16), "hada_w2_a": (8, 2), "hada_w2_b": (2, 16)}.items()
            )
        },
        "diff": {layer + "diff": factor(4, 8, 16)},
    }


@pytest.mark.parametrize("algorithm", adapters())
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp32", "fp8_e4m3fn"])
def test_a_scaled_layer_is_changed_just_as_the_weights_it_means(
    tmp_path: Path, algorithm: str, rounding: str, dtype: str
) -> None:
    """With a power of two as scale float32 holds these exactly, and every algorithm must give the same bytes."""
    elements = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    name, scale = "blocks.0.attn.q.weight", torch.tensor(2.0**-5)
    scaled = save_torch(
        tmp_path / "scaled.safetensors",
        {name: elements, "blocks.0.attn.q.scale_weight": scale, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)},
    )
    plain = save_torch(tmp_path / "plain.safetensors", {name: elements.float() * scale})
    adapter = save(tmp_path / "a.safetensors", adapters()[algorithm])
    for base, other in ((scaled, dtype), (plain, "fp8_e4m3fn_scaled_old" if dtype == "keep" else dtype)):
        fuse(base, [adapter], tmp_path / f"out_{base.name}", dtype=other, rounding=rounding, verify="full")
    assert raw(tmp_path / "out_scaled.safetensors") == raw(tmp_path / "out_plain.safetensors")


def large_pair(folder: Path) -> tuple[Path, Path]:
    """A base of several chunks and an adapter for it."""
    generator = np.random.default_rng(3)
    weight = torch.from_numpy(generator.standard_normal((700, 1024)).astype(np.float32) * 0.02)
    stored = {"blocks.0.mlp.weight": weight.half(), "blocks.1.mlp.weight": weight.half().flip(0)}
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    adapter = save(folder / "a.safetensors", peft_lora(shapes, ["blocks.0.mlp.weight"], 8, prefix=PREFIX))
    return save_torch(folder / "base.safetensors", stored), adapter


@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp8_e5m2", "fp8_e4m3fn_scaled"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bytes_do_not_depend_on_threads_and_memory(tmp_path: Path, dtype: str, rounding: str) -> None:
    base, adapter = large_pair(tmp_path)
    written = []
    for place, (threads, memory) in enumerate([(1, 2**20), (3, 2**24), (2, 2**30)]):
        output = tmp_path / f"{place}.safetensors"
        fuse(base, [adapter], output, dtype=dtype, rounding=rounding, seed=5, threads=threads, memory=memory)
        written.append(output.read_bytes())
    assert written[0] == written[1] == written[2]
    assert check_output(tmp_path / "0.safetensors", search=[tmp_path], full=True).ok


def test_the_seed_is_recorded_and_another_one_is_another_output(tmp_path: Path) -> None:
    base, adapter = large_pair(tmp_path)
    for seed in (0, 1):
        fuse(base, [adapter], tmp_path / f"{seed}.safetensors", rounding="stochastic", seed=seed)
    one, two = (raw(tmp_path / f"{seed}.safetensors") for seed in (0, 1))
    assert one["blocks.0.mlp.weight"] != two["blocks.0.mlp.weight"]
    assert one["blocks.1.mlp.weight"] == two["blocks.1.mlp.weight"]  # untouched: copied
    assert check_output(tmp_path / "1.safetensors", search=[tmp_path], full=True).ok
    wrong = check_output(tmp_path / "1.safetensors", base, [adapter], rounding="stochastic", seed=0, full=True)
    assert not wrong.ok


@pytest.mark.parametrize("by_row", [False, True])
def test_a_scale_that_was_changed_is_found_out(tmp_path: Path, by_row: bool) -> None:
    base = scaled_base(tmp_path / "base.safetensors", True, by_row=by_row)
    adapter, _ = lora(tmp_path / "a.safetensors")
    output = tmp_path / "out.safetensors"
    fuse(base, [adapter], output, verify="none")
    content, scale = output.read_bytes(), raw(output)["blocks.0.attn.q.weight_scale"][1]
    changed = (np.frombuffer(scale, np.float32) * np.float32(1 + 2**-20)).tobytes()
    output.write_bytes(content.replace(scale, changed, 1))
    report = check_output(output, search=[tmp_path], full=True)
    assert any("blocks.0.attn.q.weight: its scale is" in finding for finding in report.findings)
    output.write_bytes(content.replace(scale, b"\0" * len(scale), 1))
    report = check_output(output, search=[tmp_path])
    assert any("is not a positive number" in finding for finding in report.findings)


def test_settings_that_were_changed_are_found_out(tmp_path: Path) -> None:
    base = save_torch(tmp_path / "base.safetensors", plain_tensors())
    output = tmp_path / "out.safetensors"
    fuse(base, [], output, dtype="fp8_e4m3fn_scaled")
    settings = raw(output)["blocks.1.mlp.comfy_quant"][1]
    output.write_bytes(output.read_bytes().replace(settings, settings.replace(b"true", b"TRUE")))
    assert any("does not say" in finding for finding in check_output(output, search=[tmp_path]).findings)


def test_the_largest_value_and_zeros_have_scales_too(tmp_path: Path) -> None:
    tensors = {
        "blocks.0.mlp.weight": torch.zeros(4, 4),
        "blocks.1.mlp.weight": torch.full((4, 4), 3e38),
        "blocks.2.mlp.weight": torch.full((4, 4), 1e-44),
    }
    base = save_torch(tmp_path / "base.safetensors", tensors)
    output = tmp_path / "out.safetensors"
    assert fuse(base, [], output, dtype="fp8_e4m3fn_scaled", verify="full").report.ok
    found = weights(output)
    assert bool((found["blocks.0.mlp.weight"] == 0).all())
    torch.testing.assert_close(found["blocks.1.mlp.weight"], tensors["blocks.1.mlp.weight"].double(), rtol=1e-6, atol=0)


class TestClamping:
    def test_what_plain_fp8_cannot_hold_is_counted_by_tensor(self, tmp_path: Path) -> None:
        weight = torch.full((8, 8), 1.0)
        weight[0, 0], weight[1, 1], weight[2, 2], weight[3, 3] = 448.0, 463.0, 464.0, -1e6
        tensors = {"blocks.0.mlp.weight": weight, "blocks.1.mlp.weight": torch.ones(8, 8)}
        base = save_torch(tmp_path / "base.safetensors", tensors)
        result = fuse(base, [], tmp_path / "out.safetensors", dtype="fp8_e4m3fn", verify="full")
        assert result.clamped == {"model": {"blocks.0.mlp.weight": 2}}
        assert load(tmp_path / "out.safetensors")["blocks.0.mlp.weight"].min() == -448
        done = bake("fuse", base, "--dtype", "fp8_e4m3fn", "-o", tmp_path / "again.safetensors")
        assert done.code == 0
        assert "2 elements" in done.out
        assert "warning: 2 elements of model are beyond" in done.err
        found = bake("fuse", base, "--dtype", "fp8_e4m3fn", "-o", tmp_path / "json.safetensors", "--json").json
        assert found["clamped"] == {"model": {"blocks.0.mlp.weight": 2}}

    def test_scaled_fp8_clamps_nothing(self, tmp_path: Path) -> None:
        tensors = {"blocks.0.mlp.weight": torch.linspace(-1e6, 1e6, 64).view(8, 8)}
        base = save_torch(tmp_path / "base.safetensors", tensors)
        assert not fuse(base, [], tmp_path / "out.safetensors", dtype="fp8_e4m3fn_scaled").clamped

    @pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2", "fp8_e5m2_scaled", "bf16", "fp16"])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_nan_and_infinity_are_refused(self, tmp_path: Path, dtype: str, bad: float) -> None:
        weight = torch.ones(8, 8)
        weight[2, 3] = bad
        base = save_torch(tmp_path / "base.safetensors", {"blocks.0.mlp.weight": weight})
        with pytest.raises(NonFinite, match=r"blocks\.0\.mlp\.weight"):
            fuse(base, [], tmp_path / "out.safetensors", dtype=dtype)
        assert not (tmp_path / "out.safetensors").exists()

    def test_what_fp16_cannot_hold_is_refused(self, tmp_path: Path) -> None:
        base = save_torch(tmp_path / "base.safetensors", {"blocks.0.mlp.weight": torch.full((4, 4), 7e4)})
        with pytest.raises(NonFinite, match="reaches 70000"):
            fuse(base, [], tmp_path / "out.safetensors", dtype="fp16", rounding="stochastic")


class TestSurvival:
    def weak_pair(self, folder: Path) -> tuple[Path, Path]:
        weight = torch.from_numpy(np.random.default_rng(3).standard_normal((512, 512)).astype(np.float32)).bfloat16()
        base = save_torch(folder / "base.safetensors", {"blocks.0.mlp.weight": weight})
        arrays = peft_lora({"blocks.0.mlp.weight": (512, 512)}, ["blocks.0.mlp.weight"], 4, prefix=PREFIX)
        arrays = {name: array * np.float32(0.02) for name, array in arrays.items()}
        return base, save(folder / "a.safetensors", arrays)

    def test_stochastic_rounding_keeps_on_average_what_nearest_loses(self, tmp_path: Path) -> None:
        base, adapter = self.weak_pair(tmp_path)
        nearest = fuse(base, [adapter], tmp_path / "n.safetensors").survival["model"]
        by_chance = fuse(base, [adapter], tmp_path / "s.safetensors", rounding="stochastic").survival["model"]
        assert nearest < 0.5
        assert by_chance > 0.8
        done = bake("fuse", base, "-l", adapter, "-o", tmp_path / "out.safetensors")
        assert "--rounding stochastic keeps it on average" in done.err

    @pytest.mark.parametrize("by_row", [False, True])
    def test_the_base_counts_as_what_its_layers_mean(self, tmp_path: Path, by_row: bool) -> None:
        base = scaled_base(tmp_path / "base.safetensors", True, by_row=by_row)
        adapter, updates = lora(tmp_path / "a.safetensors")
        found = fuse(base, [adapter], tmp_path / "out.safetensors").survival["model"]
        before, after = weights(base), weights(tmp_path / "out.safetensors")
        update = torch.cat([updates[name][::16].reshape(-1) for name in TOUCHED])
        written = torch.cat([(after[name] - before[name])[::16].reshape(-1) for name in TOUCHED])
        assert found == pytest.approx(1 - float((update - written).norm() / update.norm()), abs=1e-6)


@pytest.mark.parametrize("new", [False, True])
def test_rows_keep_scales_of_their_own_in_tensors_of_many_chunks_and_parts(
    tmp_path: Path, new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.from_numpy(np.random.default_rng(3).standard_normal((1100, 1024)).astype(np.float32))
    elements, scale = quantised(weight, by_row=True)
    name, beside = "blocks.0.mlp.weight", "weight_scale" if new else "scale_weight"
    base = save_torch(tmp_path / "base.safetensors", {name: elements, f"blocks.0.mlp.{beside}": scale.view(-1)})
    arrays = peft_lora({name: (1100, 1024)}, [name], 4, prefix=PREFIX)
    adapter = save(tmp_path / "a.safetensors", arrays)
    fuse(base, [adapter], tmp_path / "one.safetensors", threads=1, verify="full")
    monkeypatch.setattr(parts, "_PART_ELEMENTS", 100 * 1024)
    fuse(base, [adapter], tmp_path / "many.safetensors", threads=3, verify="full")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "many.safetensors").read_bytes()
    found = load(tmp_path / "one.safetensors")
    assert found[f"blocks.0.mlp.{beside}"].shape == (1100,)
    assert bool((np.abs(found[name]).max(1) == 448).all())
