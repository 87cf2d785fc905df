"""Extraction: the printed error is the measured one, whatever the family, layout, dialect and dtype."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import random_arrays, save_base
from names import small
from numpy.typing import NDArray
from support import Arrays, bake, load, metadata, random, raw, save
from test_support import DITS, tiny_base

from bake import combine, extract, fuse, resize
from bake.errors import BakeError, FamilyMismatch, Mismatch, NonFinite, ShapeMismatch, UsageError
from bake.plan.extraction import ExtractionRequest, plan_extraction

WEIGHTS = ("model.diffusion_model.", "cond_stage_model.", "conditioner.")


def tune(arrays: Arrays, spread: float = 0.01, matrices: bool = True, seed: int = 77) -> Arrays:
    """The same tensors with small changes: to matrices and convolutions alone, or to every float."""
    return {
        name: (values + random(seed + place, *values.shape, spread=spread)).astype(np.float32)
        if values.dtype.kind == "f" and (values.ndim > 1 or not matrices)
        else values
        for place, (name, values) in enumerate(arrays.items())
    }


def pair(folder: Path, family: str = "sd1", matrices: bool = True) -> tuple[Path, Path]:
    """(tuned, base) of a family in the original layout, in float32; only what adapters are for is changed."""
    arrays = random_arrays(small(family), np.float32)
    changed = tune({name: values for name, values in arrays.items() if name.startswith(WEIGHTS)}, matrices=matrices)
    return save(folder / "tuned.safetensors", arrays | changed), save(folder / "base.safetensors", arrays)


def distance(one: Mapping[str, NDArray[Any]], two: Mapping[str, NDArray[Any]]) -> float:
    """The Frobenius norm of the difference of all floats."""
    squares = (((one[name] - two[name]) ** 2).sum() for name in one if one[name].dtype.kind == "f")
    return float(np.sqrt(sum(map(float, squares))))


def measured_error(tuned: Path, base: Path, fused: Path) -> float:
    """|tuned - fused| / |tuned - base|, from the files."""
    goal = load(tuned)
    return distance(goal, load(fused)) / distance(goal, load(base))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_full_rank_lora_gives_the_tuned_model_back(family: str, tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, family, matrices=False)
    done = extract(
        tuned, base, tmp_path / "l.safetensors", rank=10**6, dtype="fp32", full_rest=True, only=["unet", "te"]
    )
    assert set(done.counts) <= {"lora", "full", "unchanged"}
    unet, names = "lora_unet_", set(load(done.output))
    conv = "down_blocks_0_resnets_0" if family == "sd1" else "input_blocks_1_0"
    norm, layer = ("norm1", "conv1") if family == "sd1" else ("in_layers_0", "in_layers_2")
    assert {f"{unet}{conv}_{norm}.w_norm", f"{unet}{conv}_{norm}.b_norm", f"{unet}{conv}_{layer}.diff_b"} <= names
    assert done.error < 1e-7
    fuse(base, [done.output], tmp_path / "fused.safetensors")
    assert measured_error(tuned, base, tmp_path / "fused.safetensors") < 3e-7  # the base's own rounding comes on top


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_printed_error_is_the_measured_one_through_resizing_and_fusing(dtype: str, tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    done = extract(tuned, base, tmp_path / "lora.safetensors", rank=3, dtype=dtype)
    fuse(base, [done.output], tmp_path / "fused.safetensors")
    assert done.error == pytest.approx(measured_error(tuned, base, tmp_path / "fused.safetensors"), rel=1e-4)
    assert 0.1 < done.error < 1

    smaller = resize(done.output, tmp_path / "small.safetensors", rank=1)
    fuse(base, [smaller.output], tmp_path / "again.safetensors")
    first, second = load(tmp_path / "fused.safetensors"), load(tmp_path / "again.safetensors")
    assert smaller.error == pytest.approx(distance(first, second) / distance(first, load(base)), rel=1e-4)
    twice = [each.rank for each in smaller.modules]
    assert set(twice) == {1}


@pytest.mark.parametrize("family", [*DITS, "language-model"])
@pytest.mark.parametrize("names", ["kohya", "diffusers", "peft"])
def test_every_family_in_every_dialect(family: str, names: str, tmp_path: Path) -> None:
    base = tiny_base(family, tmp_path)
    model = base / "model.safetensors" if base.is_dir() else base
    tuned = tmp_path / "tuned"
    save(tuned / model.name, tune(random_like(model)))
    if base.is_dir():
        (tuned / "config.json").write_bytes((base / "config.json").read_bytes())
    where = tmp_path / ("lora" if names == "peft" else "lora.safetensors")
    arguments = (tuned if base.is_dir() else tuned / model.name, base, where)
    if family == "language-model" and names != "peft":
        with pytest.raises(UsageError, match="PEFT"):
            extract(*arguments, names=names)
        return
    done = extract(*arguments, names=names, rank=100, dtype="fp32")
    out = tmp_path / ("out" if base.is_dir() else "out.safetensors")
    fuse(base, [where], out, dtype="fp32")
    found = measured_error(tuned / model.name, model, out / model.name if base.is_dir() else out)
    assert found == pytest.approx(done.error, rel=1e-4, abs=1e-6)
    assert {each.parameter for each in done.modules if each.kind == "lora"} == {"weight"}


def random_like(path: Path) -> Arrays:
    return {
        name: values.astype(np.float32) if values.dtype.kind == "f" else values for name, values in load(path).items()
    }


def gpt2(layers: int = 2, width: int = 16) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small GPT-2, whose Linear weights are stored (in, out)."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (20, width), "wpe.weight": (8, width)}
    for layer in range(layers):
        for leaf, shape in (
            *(("attn.c_attn", (width, 3 * width)), ("attn.c_proj", (width, width))),
            *(("mlp.c_fc", (width, 4 * width)), ("mlp.c_proj", (4 * width, width))),
        ):
            shapes |= {f"h.{layer}.{leaf}.weight": shape, f"h.{layer}.{leaf}.bias": shape[1:]}
        shapes |= {f"h.{layer}.ln_1.{leaf}": (width,) for leaf in ("weight", "bias")}
    return shapes


@pytest.mark.parametrize("rank", [3, 100])
def test_layers_that_are_stored_the_other_way_round(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bake.execute.extract._BLOCK_ELEMENTS", 100)
    arrays = random_arrays(gpt2(), np.float32)
    for name, values in (("base", arrays), ("tuned", tune(arrays, matrices=False))):
        save(tmp_path / name / "model.safetensors", values)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2Model"]}))
    tuned, base = tmp_path / "tuned", tmp_path / "base"
    plan = plan_extraction(ExtractionRequest(tuned, base))
    assert plan.data_bytes == 2 * sum(values.nbytes for values in arrays.values())
    done = extract(tuned, base, tmp_path / "lora", rank=rank, dtype="fp32", full_rest=True, memory=0)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    factors = load(tmp_path / "lora" / "adapter_model.safetensors")
    assert factors["base_model.model.h.0.attn.c_attn.lora_B.weight"].shape == (48, min(rank, 16))
    fuse(base, [tmp_path / "lora"], tmp_path / "out")
    files = [folder / "model.safetensors" for folder in (tuned, base, tmp_path / "out")]
    assert measured_error(*files) == pytest.approx(done.error, rel=1e-4, abs=3e-7)
    assert (done.error < 1e-6) == (rank == 100)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_the_announced_bytes_are_those_of_the_tensors(family: str, names: Any, tmp_path: Path) -> None:
    """Also where one stored projection is several modules of the dialect."""
    base = tiny_base(family, tmp_path)
    plan = plan_extraction(ExtractionRequest(tuned=base, base=base, names=names))
    stretches = [each for found in plan.differences for each in (*found.tuned, *found.base)]
    whole = {(each.stored.input, each.stored.name): each.stored.span for each in stretches}
    assert len(stretches) > len(whole) or names == "kohya"
    assert plan.data_bytes == sum(end - begin for begin, end in whole.values())


def test_kohyas_names_are_those_of_kohya(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, "sdxl")
    names = set(load(extract(tuned, base, tmp_path / "l.safetensors", rank=2).output))
    block = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    layer = "encoder_layers_1_self_attn_q_proj"
    for module in (block, f"lora_te1_text_model_{layer}", f"lora_te2_text_model_{layer}"):
        assert {f"{module}.lora_up.weight", f"{module}.lora_down.weight", f"{module}.alpha"} <= names
    arrays = load(tmp_path / "l.safetensors")
    conv = "lora_unet_input_blocks_1_0_in_layers_2"
    assert arrays[f"{conv}.lora_down.weight"].shape[2:] == (3, 3)
    assert arrays[f"{conv}.lora_up.weight"].shape[2:] == (1, 1)
    assert float(arrays[f"{conv}.alpha"]) == 2
    told = metadata(tmp_path / "l.safetensors")
    assert told["ss_network_dim"] == told["ss_network_alpha"] == "2"
    assert told["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    record = json.loads(told["bake.adapter"])
    assert [each["name"] for each in record["inputs"]] == ["tuned.safetensors", "base.safetensors"]
    assert all(len(each["sha256"]) == 64 for each in record["inputs"])


def test_the_models_may_be_in_different_layouts_and_dtypes(tmp_path: Path) -> None:
    """The tuned one is a bare UNet in diffusers' names, in half precision."""
    from bake.keys.unet import translate

    tuned, base = pair(tmp_path)
    begin = "model.diffusion_model."
    unet = {name[len(begin) :]: values for name, values in load(tuned).items() if name.startswith(begin)}
    modules = {name.rpartition(".")[0] for name in unet}
    other = translate(modules)
    bare = {
        f"{other.get(m, m)}.{leaf}": values for name, values in unet.items() for m, _, leaf in [name.rpartition(".")]
    }
    bare_path = save(tmp_path / "unet.safetensors", {name: values.astype(np.float16) for name, values in bare.items()})
    one = extract(tuned, base, tmp_path / "one.safetensors", rank=2, only=["unet"])
    two = extract(bare_path, base, tmp_path / "two.safetensors", rank=2)
    assert [each.module for each in one.modules] == [each.module for each in two.modules]
    assert two.error == pytest.approx(one.error, rel=0.05)
    assert any("te1" in note for note in two.notes)


def test_what_is_no_layer_is_listed_and_counted(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, matrices=False)
    done = extract(tuned, base, tmp_path / "l.safetensors", rank=10**6, dtype="fp32")
    lost = {each.module for each in done.modules if each.kind == "left-out"}
    assert "lora_unet_conv_norm_out" in lost
    assert "lora_te_text_model_embeddings_token_embedding" in lost
    goal, old = load(tuned), load(base)
    fuse(base, [done.output], tmp_path / "f.safetensors")
    assert done.left_out == pytest.approx(
        distance(goal, load(tmp_path / "f.safetensors")) / distance(goal, old), rel=1e-4
    )


def test_of_the_vae_nothing_is_stored_and_that_is_said(tmp_path: Path) -> None:
    arrays = random_arrays(small("sd1"), np.float32)
    changed = tune(arrays)
    vae = [name for name in arrays if name.startswith("first_stage_model.")]
    base = save(tmp_path / "base.safetensors", arrays)
    lacking = {name: values for name, values in changed.items() if name != vae[0]}
    done = extract(save(tmp_path / "t.safetensors", lacking), base, tmp_path / "l.safetensors", rank=1, full_rest=True)
    of_vae = [each for each in done.modules if each.component == "vae"]
    assert {each.kind for each in of_vae} == {"left-out", "unchanged"}
    assert done.left_out > 0
    assert not [name for name in load(done.output) if "first_stage" in name]
    assert "1 tensors of the vae are called differently in the two models: not compared" in done.notes
    assert any("tensors belong to no model (e.g. alphas_cumprod): not compared" in note for note in done.notes)


def test_what_only_float64_tells_apart_is_found(tmp_path: Path) -> None:
    arrays = random_arrays(small("sd1"), np.float64)
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    nudged = arrays | {name: arrays[name] * (1 + 2.0**-40)}
    tuned, base = (save(tmp_path / f"{n}.safetensors", each) for n, each in enumerate((nudged, arrays)))
    done = extract(tuned, base, tmp_path / "l.safetensors", rank=100, dtype="fp32")
    assert [each.module for each in done.modules if each.kind == "lora"] == ["lora_unet_mid_block_attentions_0_proj_in"]
    assert done.error < 1e-6


def test_dora_of_a_row_of_zeros_is_a_row_of_zeros(tmp_path: Path) -> None:
    tuned, base = (load(path) for path in pair(tmp_path))
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    for number, arrays in enumerate((tuned, base)):
        arrays[name][0] = 0
        kept = {key: values.astype(np.float32) for key, values in arrays.items()}
        save(tmp_path / f"{number}.safetensors", kept)
    files = tmp_path / "0.safetensors", tmp_path / "1.safetensors"
    done = extract(*files, tmp_path / "dora.safetensors", rank=2, only=["unet"], dora=True)
    fuse(files[1], [done.output], tmp_path / "f.safetensors")
    assert 0 < done.error < 1
    assert not load(tmp_path / "f.safetensors")[name][0].any()


def test_dora_keeps_the_lengths_of_the_rows(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    plain = extract(tuned, base, tmp_path / "plain.safetensors", rank=2, only=["unet"])
    done = extract(tuned, base, tmp_path / "dora.safetensors", rank=2, only=["unet"], dora=True)
    fuse(base, [done.output], tmp_path / "f.safetensors")
    begin = "model.diffusion_model."
    goal, old, found = (
        {name: values for name, values in load(path).items() if name.startswith(begin)}
        for path in (tuned, base, tmp_path / "f.safetensors")
    )
    left_out = done.left_out * distance(goal, old)
    assert done.error == pytest.approx(distance(goal, found) / distance(goal, old), rel=1e-3)
    assert done.error < plain.error
    assert left_out < 1e-9
    assert raw(done.output)["lora_unet_mid_block_attentions_0_proj_in.dora_scale"][0] == "F32"


def test_rules_choose_the_rank_of_each_module(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    differences = {name: load(tuned)[name] - load(base)[name] for name in load(base) if name.startswith("cond_stage")}
    done = extract(tuned, base, tmp_path / "l.safetensors", keep="fro=0.8", rank=100, only=["te"])
    for each in done.modules:
        if each.kind == "lora":
            name = each.module.removeprefix("lora_te_text_model_encoder_layers_").replace("self_attn_", "self_attn.")
            number, _, rest = name.partition("_")
            path = (
                f"cond_stage_model.transformer.text_model.encoder.layers.{number}.{rest.replace('mlp_', 'mlp.')}.weight"
            )
            values = np.linalg.svd(differences[path], compute_uv=False)
            shares = np.sqrt(np.cumsum(values**2) / (values**2).sum())
            assert each.rank == int(np.argmax(shares >= 0.8)) + 1
    assert metadata(done.output)["ss_network_dim"] == "Dynamic"


def test_clamping_is_off_unless_asked_for(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    plain = extract(tuned, base, tmp_path / "a.safetensors", rank=4)
    cut = extract(tuned, base, tmp_path / "b.safetensors", rank=4, clamp_quantile=0.9)
    assert cut.error > plain.error


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    for name in ("a", "b"):
        extract(tuned, base, tmp_path / f"{name}.safetensors", rank=2, svd="randomised", only=["te"])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_difference_that_is_too_large_to_hold_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bake.execute.extract._BLOCK_ELEMENTS", 256)
    tuned, base = pair(tmp_path)
    how: Any = {"rank": 2, "svd": "randomised", "dtype": "fp32", "only": ["te"]}
    held = extract(tuned, base, tmp_path / "a.safetensors", **how)
    read = extract(tuned, base, tmp_path / "b.safetensors", memory=0, **how)
    assert read.error == pytest.approx(held.error, rel=1e-12)
    assert raw(held.output) == raw(read.output)


def test_peft_keeps_embeddings_and_norms_as_whole_modules(tmp_path: Path) -> None:
    base = tiny_base("language-model", tmp_path)
    tuned = tmp_path / "tuned"
    save(tuned / "model.safetensors", tune(random_like(base / "model.safetensors"), matrices=False))
    (tuned / "config.json").write_bytes((base / "config.json").read_bytes())
    done = extract(tuned, base, tmp_path / "lora", rank=100, dtype="fp32", full_rest=True)
    assert done.left_out == 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert "model.embed_tokens" in config["modules_to_save"]
    assert config["peft_type"] == "LORA"
    fuse(base, [tmp_path / "lora"], tmp_path / "out", dtype="fp32")
    found = measured_error(
        tuned / "model.safetensors", base / "model.safetensors", tmp_path / "out" / "model.safetensors"
    )
    assert found < 1e-6


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers in an old way
def test_peft_loads_what_is_extracted(tmp_path: Path) -> None:
    """PEFT's own merge of the extracted adapter is the tuned model."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "proj" in name:
                values.add_(torch.randn_like(values) * 0.02)
    model.save_pretrained(tmp_path / "tuned")
    done = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "lora", rank=100, dtype="fp32")
    assert done.error < 1e-6
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(again, tmp_path / "lora").merge_and_unload()
    for name, values in model.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), values, rtol=0, atol=1e-6)


REFUSALS: list[tuple[dict[str, Any], type[BakeError], str]] = [
    ({"only": ["te2"]}, UsageError, "te2"),
    ({"names": "peft"}, UsageError, "--only"),
    ({"names": "a1111"}, UsageError, "--names"),
    ({"dtype": "fp8"}, UsageError, "--dtype"),
    ({"names": "diffusers", "full_rest": True}, UsageError, "--full-rest"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSALS)
def test_requests_that_are_refused(
    arguments: dict[str, Any], error: type[BakeError], words: str, tmp_path: Path
) -> None:
    tuned, base = pair(tmp_path)
    output = tmp_path / ("lora" if arguments.get("names") == "peft" else "lora.safetensors")
    with pytest.raises(error, match=words):
        extract(tuned, base, output, **arguments)
    assert not output.exists()


def test_models_that_do_not_fit_together(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    output = tmp_path / "lora.safetensors"
    with pytest.raises(FamilyMismatch, match="Stable Diffusion XL"):
        extract(tuned, save_base(tmp_path / "xl.safetensors", "sdxl"), output)
    arrays = {name: values.astype(np.float32) for name, values in load(base).items()}
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    with pytest.raises(ShapeMismatch, match="mid_block_attentions_0_proj_in"):
        extract(tuned, save(tmp_path / "wide.safetensors", arrays | {name: arrays[name][:, :-1]}), output)
    lacking = save(tmp_path / "less.safetensors", {key: values for key, values in arrays.items() if key != name})
    with pytest.raises(Mismatch, match="--allow-unmatched"):
        extract(tuned, lacking, output)
    with pytest.raises(Mismatch, match=r"only .*tuned\.safetensors has 1 of"):
        extract(tuned, lacking, output)
    with pytest.raises(Mismatch, match=r"only .*base\.safetensors has 1 of"):
        extract(lacking, base, output)
    done = extract(tuned, lacking, output, allow_unmatched=True, rank=1)
    assert any("proj_in" in note for note in done.notes)
    with pytest.raises(Mismatch, match="no layer in common that a LoRA could be for"):
        extract(tuned, base, tmp_path / "other.safetensors", only=["vae"])
    bad = save(tmp_path / "nan.safetensors", arrays | {name: arrays[name] * np.float32("nan")})
    with pytest.raises(NonFinite, match="proj_in"):
        extract(tuned, bad, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="do not differ"):
        extract(base, base, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()
    assert not list(tmp_path.glob(".*draft*"))


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    name = "model.diffusion_model.middle_block.1.proj_in.weight_scale"
    scaled = save(tmp_path / "q.safetensors", random_like(base) | {name: np.ones(1, np.float32)})
    done = bake("extract", tuned, scaled, "-o", tmp_path / "l.safetensors")
    assert done.code == 6
    assert "16-bit" in done.err


def test_the_command_line(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, matrices=False)
    words = ("extract", tuned, base, "-o", tmp_path / "l.safetensors", "--rank", "2")
    assert bake(*words, "--dry-run").code == 0
    assert bake(*words, "--dry-run", "--json").json["components"]["unet"]["lora"] > 0
    assert not (tmp_path / "l.safetensors").exists()
    done = bake(*words, "--json").json
    assert done["error"] == pytest.approx(
        np.sqrt(
            sum((each["error"] * each["norm"]) ** 2 for each in done["modules"])
            / sum(each["norm"] ** 2 for each in done["modules"])
        )
    )
    assert done["parameters"]["lora"] == sum(each["kind"] == "lora" for each in done["modules"])
    assert bake(*words).code == 8
    text = bake(*words, "--overwrite")
    assert text.code == 0
    assert f"error {done['error']:.4g} in all" in text.out
    assert "left out" in text.out
    assert bake("extract", tuned, base, "-o", tmp_path / "l.txt").code == 8


def test_extracted_and_combined_is_the_sum(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    done = extract(tuned, base, tmp_path / "l.safetensors", rank=2, dtype="fp32")
    both = combine([(done.output, 0.5), (done.output, 0.5)], tmp_path / "b.safetensors")
    assert both.error < 1e-6
