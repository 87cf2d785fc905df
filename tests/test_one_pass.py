"""Merges, replaced components, adapters and casts in one plan: nothing is rounded before everything is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import kohya_lora, llama, peft_lora, random_arrays
from names import small
from support import Arrays, bake, load, metadata, random, raw, rounded, save, ulps
from test_merging import tuned

from bake import build_plan, check_output, fuse, run_plan
from bake.api import plan_recipe
from bake.errors import BakeError, Mismatch, NonFinite, UnmatchedModules, Unsupported
from bake.plan.recipe import AdapterChoice, MergeChoice, Recipe

VAE, TE = "first_stage_model.", "cond_stage_model."
PARTS = ("model.diffusion_model.", TE, VAE)


def stored(folder: Path, name: str, arrays: Arrays) -> Path:
    return save(folder / f"{name}.safetensors", arrays, {"format": "pt"})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints, three LoRAs and a VAE of its own, in its own dtype."""
    folder = tmp_path_factory.mktemp("parts")
    base = random_arrays(small("sd1"))
    vae = {
        name.removeprefix(VAE): random(place, *array.shape, spread=0.3).astype(np.float32)
        for place, (name, array) in enumerate(base.items())
        if name.startswith(VAE)
    }
    loras = {f"lora{seed}": kohya_lora(small("sd1"), seed=seed)[0] for seed in (1, 2, 3)}
    return {
        "a": stored(folder, "a", base),
        "b": stored(folder, "b", tuned(base, 7)),
        "vae": stored(folder, "vae", vae),
        **{name: stored(folder, name, arrays) for name, arrays in loras.items()},
    }


def merged_recipe(parts: dict[str, Path], **more: Any) -> Recipe:
    weights = {"lora1": 0.8, "lora2": -0.5, "lora3": 1.25}
    given: dict[str, Any] = {
        "base": MergeChoice("weighted_sum", (parts["a"], parts["b"]), parameters={"alpha": 0.3}),
        "adapters": tuple(AdapterChoice(parts[name], weight) for name, weight in weights.items()),
        "replaced": {"vae": parts["vae"]},
        "dtype": "fp16",
    }
    return Recipe(**{**given, **more})


def exact(parts: dict[str, Path]) -> Arrays:
    """What the recipe makes, in float64."""
    a, b, vae = (load(parts[name]) for name in ("a", "b", "vae"))
    values = dict(a)
    for name, array in a.items():
        if name.startswith(PARTS) and array.size > 1:
            values[name] = array + (b[name] - array) * 0.3
        if name.startswith(VAE):
            values[name] = vae[name.removeprefix(VAE)]
    for seed, weight in ((1, 0.8), (2, -0.5), (3, 1.25)):
        for name, update in kohya_lora(small("sd1"), seed=seed)[1].items():
            values[name] = values[name] + weight * update
    return values


def test_merge_loras_vae_and_cast_are_the_float64_result_rounded_once(parts, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = run_plan(plan_recipe(merged_recipe(parts)), out, verify="full")
    assert result.report is not None
    assert result.report.equal_share == 1
    due = exact(parts)
    written = load(out)
    assert written.keys() == due.keys()
    for name, found in written.items():
        # sums in another order differ in the last bits of float64, and halves tie now and then
        assert ulps(found, due[name], due[name]) < 0.5 + 1e-9, name
        assert np.count_nonzero(found != rounded(due[name], np.float16)) <= found.size // 200, name


def test_two_roundings_would_give_something_else(parts, tmp_path: Path) -> None:
    """The test above would not notice an intermediate file if that changed nothing."""
    run_plan(plan_recipe(merged_recipe(parts)), tmp_path / "once.safetensors")
    run_plan(plan_recipe(merged_recipe(parts, adapters=())), tmp_path / "between.safetensors")
    adapters = merged_recipe(parts).adapters
    fuse(tmp_path / "between.safetensors", adapters, tmp_path / "twice.safetensors")
    assert raw(tmp_path / "once.safetensors") != raw(tmp_path / "twice.safetensors")


def test_the_bytes_depend_on_nothing_else(parts, tmp_path: Path) -> None:
    found = set()
    for number, (threads, memory) in enumerate([(1, 64 << 20), (2, 512 << 20), (3, 4 << 30)]):
        adapters = merged_recipe(parts).adapters[:: -1 if number % 2 else 1]
        out = tmp_path / f"{number}.safetensors"
        run_plan(plan_recipe(merged_recipe(parts, adapters=adapters)), out, threads=threads, memory=memory)
        found.add(out.read_bytes())
    assert len(found) == 1


def test_the_recipe_replays_and_web_uis_find_everything(parts, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run_plan(plan_recipe(merged_recipe(parts)), out)
    assert check_output(out, search=[parts["a"].parent], full=True).ok
    record = json.loads(metadata(out)["bake.recipe"])
    assert [model["name"] for model in record["merge"]["models"]] == ["a.safetensors", "b.safetensors"]
    assert record["replaced"]["vae"]["name"] == "vae.safetensors"
    assert len(record["adapters"]) == 3
    recipe = json.loads(metadata(out)["sd_merge_recipe"])
    assert (recipe["interp_method"], recipe["multiplier"]) == ("Weighted sum", 0.3)
    assert {lora["weight"] for lora in recipe["loras"]} == {0.8, -0.5, 1.25}
    assert recipe["replaced"]["vae"]["name"] == "vae.safetensors"


@pytest.mark.parametrize("method", ["slerp", "cosine_a", "crossover", "ties"])
def test_every_reach_of_method_takes_adapters(parts, tmp_path: Path, method: str) -> None:
    base = parts["a"] if method == "ties" else None
    models = (parts["b"], parts["a"]) if base else (parts["a"], parts["b"])
    parameters = {"density": 0.5} if method == "ties" else {"alpha": 0.3}
    recipe = merged_recipe(parts, base=MergeChoice(method, models, base, parameters))
    result = run_plan(plan_recipe(recipe), tmp_path / "out.safetensors", verify="full")
    assert result.report is not None
    assert result.report.equal_share == 1
    run_plan(plan_recipe(merged_recipe(parts, base=recipe.base, adapters=())), tmp_path / "plain.safetensors")
    assert raw(tmp_path / "out.safetensors") != raw(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("dtype", ["bf16", "fp32", {"unet": "fp8_e4m3fn"}, {"unet": "fp8_e4m3fn_scaled"}])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_merged_and_fused_into_every_dtype(parts, tmp_path: Path, dtype: Any, rounding: str) -> None:
    recipe = merged_recipe(parts, dtype=dtype, rounding=rounding, seed=5)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    result = run_plan(plan_recipe(recipe), one, verify="full", threads=1)
    assert result.report is not None
    assert result.report.ok
    assert result.survival["unet"] > 0.5
    run_plan(plan_recipe(recipe), two, threads=2)
    assert one.read_bytes() == two.read_bytes()


def test_adapters_that_transform_weights_see_merged_ones(tmp_path: Path) -> None:
    arrays = random_arrays(llama())
    a, b = stored(tmp_path, "a", arrays), stored(tmp_path, "b", tuned(arrays, 3))
    name = "model.layers.0.self_attn.q_proj"
    lora = peft_lora(llama(), [name + ".weight"])
    height = llama()[name + ".weight"][0]
    magnitude = np.abs(random(5, height, spread=2.0)) + 1
    lora[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude.astype(np.float32)
    adapter = stored(tmp_path, "dora", lora)
    recipe = Recipe(MergeChoice("weighted_sum", (a, b), parameters={"alpha": 0.25}), (AdapterChoice(adapter),))
    result = run_plan(plan_recipe(recipe), tmp_path / "out.safetensors", verify="full")
    assert result.report is not None
    assert result.report.ok
    one, two = load(a)[name + ".weight"], load(b)[name + ".weight"]
    down, up = (load(adapter)[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    whole = one + (two - one) * 0.25 + up @ down * 1.0
    rows = np.linalg.norm(whole, axis=1, keepdims=True)
    found = load(tmp_path / "out.safetensors")[name + ".weight"]
    due = whole / rows * magnitude[:, None]
    ratio = float((found / due).mean())  # alpha / rank of the adapter is not the point here
    assert abs(ratio - 1) < 0.05


def test_a_component_alone_is_replaced_byte_for_byte(parts, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = bake("fuse", parts["a"], "--replace", f"te1={parts['b']}", "--vae", parts["b"], "-o", out, "--json")
    assert done.code == 0, done.err
    a, b, found = raw(parts["a"]), raw(parts["b"]), raw(out)
    for name in a:
        assert found[name] == (b if name.startswith((TE, VAE)) else a)[name], name
    assert done.json["replaced"] == {"te1": "b.safetensors", "vae": "b.safetensors"}
    assert done.json["tensors"]["copied"] == len(a)


def test_adapters_reach_a_replaced_component(parts, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = run_plan(build_plan(parts["a"], [(parts["lora1"], 1.0)], replaced={"te1": parts["b"]}), out, verify="full")
    assert result.report is not None
    assert result.report.equal_share == 1
    b, updates = load(parts["b"]), kohya_lora(small("sd1"), seed=1)[1]
    touched = [name for name in updates if name.startswith(TE)]
    assert touched
    for name in touched:
        np.testing.assert_array_equal(load(out)[name], rounded(b[name] + updates[name], np.float16))


def test_a_vae_in_the_names_of_diffusers_fits(parts, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = {"block_out_channels": [4, 8, 16, 16], "layers_per_block": 2, "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    import torch
    from safetensors.torch import load_file, save_file

    ldm = {f"{VAE}{name}": tensor for name, tensor in load_file(parts["vae"]).items()}
    converted = convert_ldm_vae_checkpoint(ldm, {**config, **blocks})
    known = dict(AutoencoderKL(**config, **blocks).state_dict())
    assert set(converted) <= set(known)
    save_file({name: tensor.contiguous() for name, tensor in converted.items()}, tmp_path / "vae.safetensors")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for vae, out in ((parts["vae"], one), (tmp_path / "vae.safetensors", two)):
        done = bake("fuse", parts["a"], "--vae", vae, "-o", out)
        assert done.code == 0, done.err
    assert raw(one) == raw(two)
    assert torch.equal(load_file(two)[VAE + "decoder.conv_in.weight"], ldm[VAE + "decoder.conv_in.weight"].half())


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        (["--replace", "te2={b}"], Mismatch, "none that bake knows the place of"),
        (["--vae", "{lora1}"], BakeError, ""),
        (["--replace", "vae={other}"], Mismatch, ""),
        (["--vae", "{vae}", "--replace", "vae={b}"], None, "two files are named for vae"),
    ],
)
def test_what_cannot_be_replaced_is_refused(parts, tmp_path: Path, words: list[str], kind: Any, says: str) -> None:
    other = {
        name: random(1, *(size + 1 for size in array.shape)).astype(np.float16)
        for name, array in load(parts["vae"]).items()
    }
    files = {**parts, "other": stored(tmp_path, "other", other)}
    done = bake("fuse", parts["a"], *(word.format(**files) for word in words), "-o", tmp_path / "out.safetensors")
    assert done.code in ({2} if kind is None else {2, 3, 5, 6})
    assert says in done.err
    assert not (tmp_path / "out.safetensors").exists()


def test_unmatched_modules_and_bad_numbers_are_refused_as_ever(parts, tmp_path: Path) -> None:
    lora = load(parts["lora1"])
    strange = {name.replace("lora_unet_", "lora_unet_no_"): array.astype(np.float16) for name, array in lora.items()}
    with pytest.raises(UnmatchedModules):
        plan_recipe(merged_recipe(parts, adapters=(AdapterChoice(stored(tmp_path, "strange", strange)),)))
    huge = merged_recipe(parts, adapters=(AdapterChoice(parts["lora1"], 1e9),))
    with pytest.raises(NonFinite, match="Lower the weight"):
        run_plan(plan_recipe(huge), tmp_path / "out.safetensors")
    far = MergeChoice("weighted_sum", (parts["a"], parts["b"]), parameters={"alpha": 1e9})
    with pytest.raises(NonFinite, match="Choose other parameters"):
        run_plan(plan_recipe(merged_recipe(parts, base=far, adapters=())), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_scaled_component_is_not_replaced_in_part(parts, tmp_path: Path) -> None:
    fuse(parts["a"], [], tmp_path / "fp8.safetensors", dtype={"unet": "fp8_e4m3fn_scaled"})
    with pytest.raises(Unsupported, match="scaled fp8"):
        build_plan(tmp_path / "fp8.safetensors", [], replaced={"unet": parts["b"]})
