"""Whole runs against float64 NumPy: values, untouched bytes, determinism, failures."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import dits
import numpy as np
import pytest
import torch
from models import SD1_MODULES, UNET, kohya_lora, lora_factors, peft_lora, random_arrays, save_base, sd1_pair
from names import small
from support import drafts, load, lora_delta, random, raw, rounded, save, save_torch, ulps

from bake.api import fuse
from bake.errors import InputChanged, NonFinite
from bake.execute import worker
from bake.execute.plain import pipeline as plain_pipeline
from bake.plan.recipe import AdapterChoice


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class TestValues:
    @pytest.mark.parametrize("weight", [1.0, 0.7, -0.5, 3.0])
    def test_fp16_equals_the_float64_sum_rounded_once(self, tmp_path: Path, weight: float) -> None:
        base, lora, deltas = sd1_pair(tmp_path)
        fuse(base, [(lora, weight)], tmp_path / "out.safetensors")
        before, after = load(base), load(tmp_path / "out.safetensors")
        equal = total = 0
        for name, delta in deltas.items():
            exact = before[name] + weight * delta
            equal += int((after[name] == rounded(exact, np.float16)).sum())
            total += exact.size
            assert ulps(after[name], exact, before[name]) < 0.55
        assert equal / total >= 0.998  # of 3152 elements; the full-size test holds the real bound

    def test_untouched_tensors_are_byte_identical(self, tmp_path: Path) -> None:
        base, lora, deltas = sd1_pair(tmp_path)
        fuse(base, [lora], tmp_path / "out.safetensors")
        before, after = raw(base), raw(tmp_path / "out.safetensors")
        assert before.keys() == after.keys()
        assert {name for name in before if before[name] != after[name]} == set(deltas)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"])
    def test_other_stored_dtypes(self, tmp_path: Path, dtype: str) -> None:
        kind = getattr(torch, dtype)
        weights = {name: torch.from_numpy(random(place, 40, 30)).to(kind) for place, name in enumerate(("a", "b"))}
        base = save_torch(tmp_path / "base.safetensors", {f"{n}.weight": w for n, w in weights.items()})
        arrays = peft_lora({"a.weight": (40, 30)}, ["a.weight"])
        fuse(base, [save(tmp_path / "lora.safetensors", arrays)], tmp_path / "out.safetensors")
        up, down = arrays["base_model.model.a.lora_B.weight"], arrays["base_model.model.a.lora_A.weight"]
        exact = weights["a"].double() + torch.from_numpy(lora_delta(up, down))
        found = load(tmp_path / "out.safetensors")
        eps = {"float64": 1e-15, "float32": 1e-6}.get(dtype, torch.finfo(kind).eps)
        np.testing.assert_allclose(found["a.weight"], exact, rtol=eps, atol=eps)
        np.testing.assert_array_equal(found["b.weight"], weights["b"].double())

    @pytest.mark.parametrize("weight", [1.0, 0.7, -0.5])
    def test_an_input_axis_dora_on_a_layer_whose_halves_the_base_swaps(self, tmp_path: Path, weight: float) -> None:
        # OneTrainer's default DoRA on Flux: a column's length is that over both halves of norm_out.linear
        base = save(tmp_path / "base.safetensors", random_arrays(dits.flux(), np.float32))
        up, down, magnitude = random(1, 16, 2), random(2, 2, 8), 1 + random(3, 1, 8) ** 2
        module = "lora_transformer_norm_out_linear"
        factors = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitude, "alpha": np.array(3.0)}
        lora = save(tmp_path / "lora.safetensors", {f"{module}.{name}": value for name, value in factors.items()})
        fuse(base, [(lora, weight)], tmp_path / "out.safetensors", verify="full")
        before, after = load(base), load(tmp_path / "out.safetensors")
        name = "final_layer.adaLN_modulation.1.weight"
        updated = before[name].astype(np.float64) + np.roll(1.5 * up @ down, 8, axis=0)
        whole = updated * magnitude / (np.sqrt(np.square(updated).sum(0)) + 2.0**-23)
        exact = before[name] + weight * (whole - before[name])
        np.testing.assert_allclose(after[name], exact, rtol=0, atol=1e-6)
        assert all((after[other] == before[other]).all() for other in before if other != name)

    def test_the_bias_of_an_up_projection(self, tmp_path: Path) -> None:
        base = save(tmp_path / "base.safetensors", {"c.weight": random(0, 6, 5), "c.bias": random(1, 6)})
        up, down, bias = random(2, 6, 2), random(3, 2, 5), random(4, 6)
        factors = {"lora_up.weight": up, "lora_up.bias": bias, "lora_down.weight": down, "alpha": np.array(3.0)}
        lora = save(tmp_path / "lora.safetensors", {f"c.{name}": value for name, value in factors.items()})
        fuse(base, [(lora, 0.7)], tmp_path / "out.safetensors", verify="full")
        before, after = load(base), load(tmp_path / "out.safetensors")
        np.testing.assert_allclose(after["c.weight"], before["c.weight"] + 0.7 * 1.5 * up @ down, rtol=1e-12)
        np.testing.assert_allclose(after["c.bias"], before["c.bias"] + 0.7 * 1.5 * bias, rtol=1e-12)

    def test_convolutions_tucker_differences_and_biases(self, tmp_path: Path) -> None:
        base = {
            "c.weight": random(0, 6, 5, 3, 3),
            "c.bias": random(1, 6),
            "n.weight": random(2, 7),
            "n.bias": random(3, 7),
        }
        up, down, mid = random(4, 6, 2, 1, 1), random(5, 3, 5, 1, 1), random(6, 2, 3, 3, 3)
        factors = {
            **{"c.lora_up.weight": up, "c.lora_down.weight": down, "c.lora_mid.weight": mid, "c.alpha": np.array(6.0)},
            **{"c.diff_b": random(7, 6), "n.w_norm": random(8, 7), "n.b_norm": random(9, 7)},
        }
        path = save(tmp_path / "base.safetensors", base)
        fuse(path, [(save(tmp_path / "lora.safetensors", factors), 0.5)], tmp_path / "out.safetensors")
        found = load(tmp_path / "out.safetensors")
        np.testing.assert_allclose(
            found["c.weight"], base["c.weight"] + 0.5 * 6 / 3 * lora_delta(up, down, mid), rtol=1e-12
        )
        for name, factor in (("c.bias", "c.diff_b"), ("n.weight", "n.w_norm"), ("n.bias", "n.b_norm")):
            np.testing.assert_allclose(found[name], base[name] + 0.5 * factors[factor], rtol=1e-12)

    def test_a_stored_difference_of_several_chunks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bake.execute.chunk.CHUNK_ELEMENTS", 64)
        base, diff = random(0, 37, 10), random(1, 37, 10)
        path = save(tmp_path / "base.safetensors", {"a.weight": base})
        fuse(path, [save(tmp_path / "d.safetensors", {"a.diff": diff})], tmp_path / "out.safetensors")
        np.testing.assert_allclose(load(tmp_path / "out.safetensors")["a.weight"], base + diff, rtol=1e-15)

    def test_rows_of_a_fused_projection(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bake.execute.chunk.CHUNK_ELEMENTS", 40)  # chunks that cross the thirds
        base = save_base(tmp_path / "xl.safetensors", "sdxl")
        module = "lora_te2_text_model_encoder_layers_5_self_attn_k_proj"
        up, down = lora_factors((8, 8))
        factors = {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
        fuse(base, [save(tmp_path / "lora.safetensors", factors)], tmp_path / "out.safetensors")
        name = "conditioner.embedders.1.model.transformer.resblocks.5.attn.in_proj_weight"
        before, after = load(base)[name], load(tmp_path / "out.safetensors")[name]
        exact = before.copy()
        exact[8:16] += lora_delta(up, down)
        np.testing.assert_array_equal(after, rounded(exact, np.float16))

    def test_transposed_storage(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "xl.safetensors", "sdxl")
        up, down = lora_factors((8, 8))
        factors = {"lora_te2_text_projection.lora_up.weight": up, "lora_te2_text_projection.lora_down.weight": down}
        fuse(base, [save(tmp_path / "lora.safetensors", factors)], tmp_path / "out.safetensors")
        name = "conditioner.embedders.1.model.text_projection"
        exact = load(base)[name] + lora_delta(up, down).T
        np.testing.assert_array_equal(load(tmp_path / "out.safetensors")[name], rounded(exact, np.float16))

    def test_several_loras_sum_before_the_one_rounding(self, tmp_path: Path) -> None:
        base, lora, deltas = sd1_pair(tmp_path)
        arrays, others = kohya_lora(small("sd1"), rank=3, seed=500)
        other = save(tmp_path / "other.safetensors", arrays)
        fuse(base, [(lora, 0.7), (other, -0.4), (lora, 0.1)], tmp_path / "out.safetensors")
        before, after = load(base), load(tmp_path / "out.safetensors")
        for name in deltas:
            exact = before[name] + 0.8 * deltas[name] - 0.4 * others[name]
            assert ulps(after[name], exact, before[name]) < 0.55

    def test_only_the_first_ranks(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        fuse(base, [AdapterChoice(lora, 1.0, rank_limit=1)], tmp_path / "out.safetensors")
        module, name = next(iter(SD1_MODULES.items()))
        factors = load(lora)
        update = lora_delta(factors[f"{module}.lora_up.weight"][:, :1], factors[f"{module}.lora_down.weight"][:1])
        exact = load(base)[name] + 0.5 * update  # alpha / rank keeps the full rank, as in AUTOMATIC1111
        assert ulps(load(tmp_path / "out.safetensors")[name], exact, load(base)[name]) < 0.55

    def test_the_wider_input_of_an_inpainting_model_keeps_its_other_channels(self, tmp_path: Path) -> None:
        name = UNET + "input_blocks.0.0.weight"
        wide = random(0, 4, 9, 3, 3).astype(np.float16)
        base = save(tmp_path / "base.safetensors", random_arrays(small("sd1")) | {name: wide})
        up, down = lora_factors((4, 4, 3, 3))
        factors = {"lora_unet_conv_in.lora_up.weight": up, "lora_unet_conv_in.lora_down.weight": down}
        fuse(base, [save(tmp_path / "lora.safetensors", factors)], tmp_path / "out.safetensors")
        found = load(tmp_path / "out.safetensors")[name]
        np.testing.assert_array_equal(found[:, 4:], wide[:, 4:])
        exact = wide[:, :4] + lora_delta(up, down).reshape(4, 4, 3, 3)
        np.testing.assert_array_equal(found[:, :4], rounded(exact, np.float16))

    def test_empty_ranks_and_empty_tensors_change_nothing(self, tmp_path: Path) -> None:
        base = save(tmp_path / "base.safetensors", {"a.weight": random(0, 4, 6), "e.weight": random(0, 0, 6)})
        factors = {
            **{"a.lora_A.weight": random(0, 0, 6), "a.lora_B.weight": random(0, 4, 0)},
            **{"e.lora_A.weight": random(0, 2, 6), "e.lora_B.weight": random(0, 0, 2)},
        }
        fuse(base, [save(tmp_path / "lora.safetensors", factors)], tmp_path / "out.safetensors")
        assert {n: b for n, (_, b) in raw(base).items()} == {
            n: b for n, (_, b) in raw(tmp_path / "out.safetensors").items()
        }

    def test_no_adapter_and_no_dtype_is_a_copy(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        result = fuse(base, [(lora, 0)], tmp_path / "out.safetensors")
        assert raw(base) == raw(tmp_path / "out.safetensors")
        assert result.survival == {}

    def test_dtype_alone_converts(self, tmp_path: Path) -> None:
        base = save(tmp_path / "base.safetensors", random_arrays(small("sd1"), np.float32))
        fuse(base, [], tmp_path / "out.safetensors", dtype="fp16")
        before, after = load(base), load(tmp_path / "out.safetensors")
        for name, values in before.items():
            expected = rounded(values, np.float16) if values.dtype == np.float64 and values.size > 1 else values
            np.testing.assert_array_equal(after[name], expected)


class TestSameBytes:
    @pytest.mark.usefixtures("lane")
    def test_threads_memory_and_order_change_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bake.execute.chunk.CHUNK_ELEMENTS", 200)
        base, lora, _ = sd1_pair(tmp_path)
        arrays, _ = kohya_lora(small("sd1"), rank=3, seed=500)
        other = save(tmp_path / "other.safetensors", arrays)
        digests = set()
        for number, (threads, memory) in enumerate([(1, 2**30), (2, 1), (8, 2**20), (3, 2**16)]):
            adapters = [(lora, 0.7), (other, -0.4)]
            output = tmp_path / f"out{number}.safetensors"
            fuse(base, adapters if number % 2 else adapters[::-1], output, threads=threads, memory=memory)
            digests.add(sha256(output))
        assert len(digests) == 1

    def test_the_number_of_threads_of_torch_is_as_before(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        before = torch.get_num_threads()
        fuse(base, [lora], tmp_path / "out.safetensors")
        assert torch.get_num_threads() == before


class TestSurvival:
    def test_an_update_far_above_the_spacing_survives(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        assert min(fuse(base, [lora], tmp_path / "out.safetensors").survival.values()) > 0.99

    def test_an_update_below_the_spacing_is_reported_lost(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        assert max(fuse(base, [(lora, 1e-6)], tmp_path / "out.safetensors").survival.values()) < 0.1

    @pytest.mark.usefixtures("lane")
    def test_the_share_is_that_of_the_definition_in_every_16th_row(self, tmp_path: Path) -> None:
        base, lora, deltas = sd1_pair(tmp_path)
        result = fuse(base, [(lora, 0.002)], tmp_path / "out.safetensors")
        before, after = load(base), load(tmp_path / "out.safetensors")
        names = [name for name in deltas if name.startswith(UNET)]
        lost = sum(np.square(0.002 * deltas[n] - (after[n] - before[n]))[::16].sum() for n in names)
        update = sum(np.square(0.002 * deltas[n])[::16].sum() for n in names)
        assert result.survival["unet"] == pytest.approx(1 - (lost / update) ** 0.5, abs=1e-4)


class TestFailures:
    def assert_clean(self, folder: Path) -> None:
        assert not (folder / "out.safetensors").exists()
        assert not drafts(folder)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("bake")]

    @pytest.mark.usefixtures("lane")
    def test_overflow_of_fp16_is_refused_with_tensor_and_remedy(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        with pytest.raises(NonFinite, match=r"F16 ends at 65504.*--dtype bf16") as caught:
            fuse(base, [(lora, 1e7)], tmp_path / "out.safetensors")
        assert caught.value.details["tensor"] in SD1_MODULES.values()
        self.assert_clean(tmp_path)

    @pytest.mark.usefixtures("lane")
    def test_nan_in_a_touched_tensor_of_the_base_is_refused(self, tmp_path: Path) -> None:
        _, lora, _ = sd1_pair(tmp_path)
        name = next(iter(SD1_MODULES.values()))
        arrays = random_arrays(small("sd1"))
        arrays[name][0, 0] = np.nan
        with pytest.raises(NonFinite, match="the base holds NaN"):
            fuse(save(tmp_path / "base.safetensors", arrays), [lora], tmp_path / "out.safetensors")
        self.assert_clean(tmp_path)

    @pytest.mark.usefixtures("lane")
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_factor_that_is_not_finite_is_refused(self, tmp_path: Path, value: float) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        arrays = {name: array.astype(np.float16) for name, array in load(lora).items()}
        arrays[f"{next(iter(SD1_MODULES))}.lora_up.weight"][0, 0] = value
        with pytest.raises(NonFinite, match="an adapter holds NaN"):
            fuse(base, [save(lora, arrays)], tmp_path / "out.safetensors")
        self.assert_clean(tmp_path)

    @pytest.mark.parametrize(
        ("lane", "stage"),
        [
            *(("torch", stage) for stage in ("worker.as_bytes", "worker.write_at")),
            *(("torch", stage) for stage in ("pipeline.work_on", "pipeline.Worker")),
            *(("numpy", f"plain.pipeline.{stage}") for stage in ("as_bytes", "write_at", "Sum", "_Worker")),
            *(("numpy", f"plain.sums.{stage}") for stage in ("_load", "_norms", "survival_of")),
            *((lane, "engine.copy_range") for lane in ("torch", "numpy")),
        ],
        indirect=["lane"],
    )
    def test_a_failure_in_any_stage_stops_the_run_and_leaves_nothing(
        self, tmp_path: Path, lane: str, monkeypatch: pytest.MonkeyPatch, stage: str
    ) -> None:
        def fail(*arguments: object, **more: object) -> None:
            raise MemoryError("no more")

        base, lora, _ = sd1_pair(tmp_path)
        monkeypatch.setattr(f"bake.execute.{stage}", fail)
        with pytest.raises(MemoryError, match="no more"):
            fuse(base, [lora], tmp_path / "out.safetensors")
        self.assert_clean(tmp_path)

    def test_a_base_that_changes_during_the_run_is_noticed(
        self, tmp_path: Path, lane: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        module = worker if lane == "torch" else plain_pipeline
        original = module.write_at

        def touch(*arguments: object) -> None:
            base.touch()
            original(*arguments)

        monkeypatch.setattr(module, "write_at", touch)
        with pytest.raises(InputChanged):
            fuse(base, [lora], tmp_path / "out.safetensors", verify="none")
        self.assert_clean(tmp_path)

    def test_an_adapter_that_changed_since_the_plan_is_noticed(self, tmp_path: Path) -> None:
        from bake.api import build_plan, run_plan

        base, lora, _ = sd1_pair(tmp_path)
        plan = build_plan(base, [lora])
        lora.touch()
        with pytest.raises(InputChanged):
            run_plan(plan, tmp_path / "out.safetensors")
        self.assert_clean(tmp_path)


@pytest.mark.gpu
def test_cuda_gives_the_same_bytes(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    base, lora, _ = sd1_pair(tmp_path)
    for device in ("cuda", "cpu"):
        fuse(base, [lora], tmp_path / f"{device}.safetensors", device=device, verify="full")
    assert sha256(tmp_path / "cuda.safetensors") == sha256(tmp_path / "cpu.safetensors")
