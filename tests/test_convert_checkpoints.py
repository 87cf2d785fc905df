"""Checkpoints in other layouts, without parts, in shards, with added components: bytes move, none is lost unsaid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import save_folder
from models import kohya_lora, llama, peft_lora, random_arrays, save_base
from names import small
from support import Arrays, bake, load, random, raw, rounded, save, ulps
from test_merging import tuned

from bake import check_output, convert, run_plan
from bake.api import plan_recipe
from bake.plan.recipe import AdapterChoice, MergeChoice, Recipe

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FOLDERS = {
    "sd1": "unet text_encoder vae",
    "sd2": "unet text_encoder vae",
    "sdxl": "unet text_encoder text_encoder_2 vae",
}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


def like_folder(folder: Path, family: str, **more: Any) -> Path:
    """What a diffusers folder has beside weights."""
    index: dict[str, Any] = {"_class_name": "Pipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    for name in [*FOLDERS[family].split(), *more]:
        index[name] = ["diffusers", CLASSES.get(name, "CLIPTextModel")]
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(more.get(name, {})))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def folder_of(path: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor of a folder as (dtype, bytes), under the name of its file's folder."""
    return {
        f"{file.parent.relative_to(path).as_posix()}/{name}": value
        for file in path.rglob("*.safetensors")
        for name, value in raw(file).items()
    }


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """(family, original file, a folder like it) of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    return (
        request.param,
        save_base(folder / "a.safetensors", request.param),
        like_folder(folder / "like", request.param),
    )


def test_original_becomes_the_folder_that_diffusers_converter_makes(model, tmp_path: Path) -> None:
    family, original, like = model
    arrays = load(original)
    done = bake(
        "convert", original, "-o", tmp_path / "out", "--layout", "diffusers", "--like", like, "--verify", "full"
    )
    assert done.code == 0, done.err
    found = folder_of(tmp_path / "out")
    if family == "sd2":  # its text encoder is read before the last block
        arrays = {name: array for name, array in arrays.items() if ".resblocks.23." not in name}
        assert "left out" in done.out
    due = folder_of(save_folder(tmp_path / "due", {n: a.astype(np.float16) for n, a in arrays.items()}))
    if family == "sd2":
        due = {name: value for name, value in due.items() if name.startswith(("unet/", "vae/"))}
        encoder = {name for name in found if name.startswith("text_encoder/")}
        assert len(encoder) == 4 + 23 * 16
        assert not any(".23." in name for name in encoder)
        found = {name: value for name, value in found.items() if name in due}
    floats = {name: value for name, value in found.items() if value[0] == "F16"}
    assert floats == {name: value for name, value in due.items() if name in floats}
    assert due.keys() == found.keys()
    assert (tmp_path / "out" / "scheduler" / "scheduler_config.json").is_file()


def test_there_and_back_again_every_byte_is_the_same(model, tmp_path: Path) -> None:
    _family, original, like = model
    for words in (
        (original, "-o", tmp_path / "d", "--layout", "diffusers", "--like", like),
        (tmp_path / "d", "-o", tmp_path / "b.safetensors", "--layout", "original"),
        (tmp_path / "b.safetensors", "-o", tmp_path / "e", "--layout", "diffusers", "--like", like),
    ):
        done = bake("convert", *words, "--verify", "full")
        assert done.code == 0, done.err
    back, begun = raw(tmp_path / "b.safetensors"), raw(original)
    lost = set(begun) - set(back)
    assert {name: begun[name] for name in back} == back
    parts = (UNET, VAE, "cond_stage_model.", "conditioner.")
    unread = (".resblocks.23.", "logit_scale", "text_projection", "position_ids")
    assert all(not name.startswith(parts) or any(word in name for word in unread) for name in lost)
    assert folder_of(tmp_path / "e") == folder_of(tmp_path / "d")


def test_layout_merge_vae_lora_cast_and_shards_are_one_rounding(tmp_path: Path) -> None:
    base = random_arrays(small("sd1"))
    a, b = save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", tuned(base, 5))
    lora, deltas = kohya_lora(small("sd1"))
    recipe = Recipe(
        MergeChoice("weighted_sum", (a, b), parameters={"alpha": 0.3}),
        (AdapterChoice(save(tmp_path / "l.safetensors", lora), 0.8),),
        layout="diffusers",
        like=like_folder(tmp_path / "like", "sd1"),
        replaced={"vae": b},
        shard_size=20_000,
        dtype="fp16",
    )
    out = tmp_path / "out"
    result = run_plan(plan_recipe(recipe), out, verify="full")
    assert result.report is not None
    assert result.report.ok
    assert len(list((out / "unet").glob("*-of-*.safetensors"))) > 2
    exact = {
        name: load(b)[name]
        if name.startswith(VAE)
        else array + 0.3 * (load(b)[name] - array) + 0.8 * deltas.get(name, 0)
        for name, array in load(a).items()
    }
    back = tmp_path / "back.safetensors"
    assert bake("convert", out, "-o", back, "--layout", "original").code == 0
    written = load(back)
    for name in (*deltas, VAE + "encoder.conv_in.weight", UNET + "input_blocks.1.1.proj_in.weight"):
        assert ulps(written[name], exact[name], exact[name]) <= 0.5 + 1e-9, name
    assert check_output(out, search=[tmp_path]).ok


def test_verify_replays_a_recorded_conversion(model, tmp_path: Path) -> None:
    _family, original, like = model
    words = ("--layout", "diffusers", "--like", like, "--drop", "vae", "--shard-size", "9KB", "--dtype", "te=bf16")
    done = bake("convert", original, "-o", tmp_path / "out", *words)
    assert done.code == 0, done.err
    done = bake("verify", tmp_path / "out", "--search", original.parent, "--full")
    assert done.code == 0, done.err
    file = next((tmp_path / "out" / "unet").glob("*00002-of*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert bake("verify", tmp_path / "out", "--search", original.parent, "--full").code == 9


def test_shards_follow_the_rules_of_hugging_face(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    arrays = random_arrays(llama(3))
    path = save(tmp_path / "a.safetensors", arrays)
    out = tmp_path / "out"
    assert bake("convert", path, "-o", out, "--shard-size", "700").code == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    order = {name: arrays[name] for name in raw(path)}
    due = (
        hub.split_state_dict_into_shards_factory(
            order, get_storage_size=lambda a: a.nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=700
        )
        if hasattr(hub, "split_state_dict_into_shards_factory")
        else None
    )
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    files = sorted(out.glob("*.safetensors"))
    assert {name: file.name for file in files for name in raw(file)} == index["weight_map"]
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    for file in files:
        stored = raw(file)
        assert sum(len(data) for _, data in stored.values()) <= 700 or len(stored) == 1
    if due is not None:
        assert len(files) == len(due.filename_to_tensors)
    assert [file.name for file in files][-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    joined = tmp_path / "joined.safetensors"
    assert bake("convert", out, "-o", joined, "--shard-size", "none").code == 0
    assert raw(joined) == raw(path)


def test_a_shard_of_everything_has_no_index(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", random_arrays(llama(1)))
    assert bake("convert", path, "-o", tmp_path / "out", "--shard-size", "5GB").code == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_scaled_weights_keep_their_scales_in_their_shard(tmp_path: Path) -> None:
    path = save_base(tmp_path / "a.safetensors", "sdxl")
    out = tmp_path / "out"
    done = bake(
        "convert", path, "-o", out, "--dtype", "unet=fp8_e4m3fn_scaled", "--shard-size", "9KB", "--verify", "full"
    )
    assert done.code == 0, done.err
    scales = 0
    for file in out.glob("*.safetensors"):
        names = raw(file)
        for name in names:
            if name.endswith(".weight_scale"):
                scales += 1
                assert name.removesuffix("_scale") in names
    assert scales > 100
    assert (
        bake("convert", out, "-o", tmp_path / "wide.safetensors", "--dtype", "fp16", "--shard-size", "none").code == 0
    )


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arrays]:
    """A checkpoint with averaged weights, training state and something else, and what it is without."""
    base = {name: array for name, array in random_arrays(small("sd1")).items() if not name.startswith("model_ema")}
    extra: Arrays = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": (array * 2).astype(np.float32)
        for name, array in base.items()
        if name.startswith(UNET)
    }
    extra |= {"model_ema.decay": np.array(0.9, np.float32), "model_ema.num_updates": np.array(3, np.int32)}
    extra |= {f"{VAE}loss.logvar": np.ones(1, np.float32), "optimizer_states.0.state.0.exp_avg": np.ones(5, np.float32)}
    extra |= {"global_step": np.array(470000, np.int64), "callbacks.best": np.ones(2, np.float32)}
    path = tmp_path_factory.mktemp("training") / "full.safetensors"
    return save(path, base | extra), base


def test_pruning_leaves_the_model_alone(training: tuple[Path, Arrays], tmp_path: Path) -> None:
    path, base = training
    done = bake("convert", path, "-o", tmp_path / "o.safetensors", "--drop", "ema", "--drop", "training", "--json")
    assert done.code == 0, done.err
    assert sum(note.startswith("dropped") for note in json.loads(done.out)["notes"]) == 2
    assert raw(tmp_path / "o.safetensors") == {name: value for name, value in raw(path).items() if name in base}


def test_averaged_weights_can_take_the_place_of_the_others(training: tuple[Path, Arrays], tmp_path: Path) -> None:
    path, base = training
    assert bake("convert", path, "-o", tmp_path / "o.safetensors", "--ema", "use", "--dtype", "fp16").code == 0
    written = load(tmp_path / "o.safetensors")
    assert not any(name.startswith("model_ema") for name in written)
    for name, array in base.items():
        np.testing.assert_array_equal(written[name], array * (2.0 if name.startswith(UNET) else 1.0), name)


@pytest.mark.parametrize("what", ["ema", "training", "te2", "nonsense"])
def test_dropping_what_is_not_there_is_refused(what: str, tmp_path: Path) -> None:
    base = save(tmp_path / "a.safetensors", random_arrays(llama(1)))
    done = bake("convert", base, "-o", tmp_path / "o.safetensors", "--drop", what)
    assert done.code == 2
    assert f"--drop {what}" in done.err
    assert not (tmp_path / "o.safetensors").exists()


def test_dropping_everything_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "a.safetensors", random_arrays(llama(1)))
    done = bake("convert", base, "-o", tmp_path / "o.safetensors", "--drop", "model")
    assert done.code == 2
    assert "nothing of a.safetensors would be left" in done.err


def test_a_component_of_a_diffusers_folder_goes_with_its_files(tmp_path: Path) -> None:
    base = save_folder(like_folder(tmp_path / "a", "sdxl"), random_arrays(small("sdxl")))
    like_folder(tmp_path / "like", "sdxl")
    (base / "model_index.json").write_text((tmp_path / "like" / "model_index.json").read_text())
    out = tmp_path / "out"
    assert bake("convert", base, "-o", out, "--drop", "te2").code == 0
    assert not (out / "text_encoder_2").exists()
    index = json.loads((out / "model_index.json").read_text())
    assert index["text_encoder_2"] == [None, None]
    assert index["text_encoder"] != [None, None]
    back = tmp_path / "back"
    done = bake("convert", out, "-o", back, "--replace", f"te2={base}", "--verify", "full")
    assert done.code == 0, done.err
    assert folder_of(back) == folder_of(base)
    assert json.loads((back / "model_index.json").read_text()) == json.loads((base / "model_index.json").read_text())


def test_a_bare_unet_gets_a_vae_and_text_encoders(tmp_path: Path) -> None:
    arrays = random_arrays(small("sdxl"))
    whole = save(tmp_path / "whole.safetensors", arrays)
    cut = {p: {n.removeprefix(p): a for n, a in arrays.items() if n.startswith(p)} for p in (UNET, VAE)}
    unet = save(tmp_path / "unet.safetensors", cut[UNET])
    vae = save(tmp_path / "vae.safetensors", cut[VAE])
    folder = save_folder(tmp_path / "folder", arrays)
    out = tmp_path / "out.safetensors"
    words = ("--vae", vae, "--replace", f"te1={whole}", "--replace", f"te2={folder}", "--verify", "full")
    done = bake("convert", unet, "-o", out, *words)
    assert done.code == 0, done.err
    written, due = raw(out), raw(whole)
    assert written == {name: due[name] for name in written}
    assert {name for name in due if name.startswith((UNET, VAE, "conditioner."))} - set(written) <= {
        "conditioner.embedders.1.model.logit_scale"
    }
    assert bake("verify", out, "--search", tmp_path).code == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("{sd1}", "--layout", "diffusers"), 2, "--like"),
        (("{sd1}", "--layout", "diffusers", "--like", "{folder}"), 3, "no diffusers folder"),
        (("{sd1}", "--layout", "diffusers", "--like", "{wrong}"), 5, "configuration of another model"),
        (("{sd1}", "--like", "{like}"), 2, "--like is for"),
        (("{llm}", "--layout", "original"), 6, "not a family"),
        (("{sd1}", "--replace", "te2={sd1}"), 5, "knows unet, te1, vae"),
        (("{sd1}", "--names", "peft"), 2, "is for adapters"),
        (("{lora}", "--layout", "original", "--names", "peft"), 2, "is for checkpoints"),
        (("{lora}",), 2, "--names"),
        (("{sd1}", "--shard-size", "0"), 2, "--shard-size"),
        (("{sd1}", "--shard-size", "5GB"), 2, "the output is a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, code: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    files = {
        "sd1": save_base(tmp_path / "sd1.safetensors"),
        "llm": save(tmp_path / "llm.safetensors", random_arrays(llama(1))),
        "lora": save(tmp_path / "lora.safetensors", kohya_lora(small("sd1"))[0]),
        "folder": tmp_path / "folder",
        "like": like_folder(tmp_path / "like", "sd1"),
        "wrong": like_folder(tmp_path / "wrong", "sd1"),
    }
    (tmp_path / "wrong" / "unet" / "config.json").write_text('{"cross_attention_dim": 768}')
    done = bake("convert", *(word.format(**files) for word in words), "-o", tmp_path / "o.safetensors")
    assert (done.code, says in done.err) == (code, True), done
    assert not (tmp_path / "o.safetensors").exists()


def test_a_pickle_becomes_safetensors(tmp_path: Path) -> None:
    import torch

    shared = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {
        "model.embed_tokens.weight": shared,
        "lm_head.weight": shared,
        "model.norm.weight": shared[:, 1],
        "model.layers.0.self_attn.q_proj.weight": shared.t(),
        "model.counter": torch.tensor(3),
    }
    content = {"state_dict": state, "optimizer_states": [{"a": torch.ones(2)}], "epoch": 2, "global_step": 7}
    torch.save(content, tmp_path / "a.ckpt")
    out = tmp_path / "o.safetensors"
    done = bake("convert", tmp_path / "a.ckpt", "-o", out, "--verify", "full")
    assert done.code == 0, done.err
    assert "optimizer_states" in done.out
    assert "nothing is changed" not in done.out
    written = load(out)
    for name, tensor in state.items():
        np.testing.assert_array_equal(written[name], tensor.numpy(), name)
    assert bake("verify", out).code == 0


def test_a_conversion_without_a_change_says_so(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", random_arrays(llama(1)))
    done = bake("convert", path, "-o", tmp_path / "o.safetensors")
    assert done.code == 0
    assert "nothing is changed" in done.out
    assert raw(tmp_path / "o.safetensors") == raw(path)


def test_the_function_converts_both_kinds(tmp_path: Path) -> None:
    path = save_base(tmp_path / "a.safetensors")
    done = convert(path, tmp_path / "o.safetensors", dtype={"vae": "fp32"})
    assert done.output == tmp_path / "o.safetensors"
    lora = save(tmp_path / "l.safetensors", kohya_lora(small("sd1"))[0])
    assert convert(lora, tmp_path / "d.safetensors", names="diffusers").verb == "convert"


def test_a_merge_takes_an_adapter_from_a_peft_folder(tmp_path: Path) -> None:
    base = random_arrays(llama(1))
    a, b = save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", tuned(base, 3))
    tensor = "model.layers.0.self_attn.q_proj.weight"
    lora = peft_lora(llama(1), [tensor])
    save(tmp_path / "lora" / "adapter_model.safetensors", lora)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    merged = MergeChoice("weighted_sum", (a, b), parameters={"alpha": 0.5})
    out = tmp_path / "o.safetensors"
    run_plan(plan_recipe(Recipe(merged, (AdapterChoice(tmp_path / "lora"),))), out, verify="full")
    up, down = (lora[f"base_model.model.{tensor.removesuffix('.weight')}.lora_{end}.weight"] for end in "BA")
    halves = (load(a)[tensor] + load(b)[tensor]) / 2
    exact = halves + up.astype(np.float64) @ down
    np.testing.assert_array_equal(load(out)[tensor], rounded(exact, np.float16))


def test_fusing_into_another_layout_is_fusing_after_the_conversion(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "folder", random_arrays(small("sdxl")))
    lora = {}
    for place, module in enumerate(("layers_3_self_attn_q_proj", "layers_3_self_attn_v_proj")):
        name = f"lora_te2_text_model_encoder_{module}"
        lora[f"{name}.lora_up.weight"] = random(place, 8, 2).astype(np.float16)
        lora[f"{name}.lora_down.weight"] = random(place + 9, 2, 8).astype(np.float16)
    style = save(tmp_path / "style.safetensors", lora)
    one, two, three = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "three"))
    for words in (
        ("fuse", folder, "-l", style, "-o", one, "--layout", "original", "--verify", "full"),
        ("convert", folder, "-o", two, "--layout", "original"),
        ("fuse", two, "-l", style, "-o", three),
    ):
        done = bake(*words)
        assert done.code == 0, done.err
    assert raw(one) == raw(three)
    assert raw(one) != raw(two)


def test_a_stack_of_files_becomes_one(tmp_path: Path) -> None:
    arrays = random_arrays(small("sdxl"))
    prefixes = {"unet": UNET, "vae": VAE, "g": "conditioner.embedders.1.model."}
    files = {
        key: save(tmp_path / f"{key}.safetensors", {n.removeprefix(p): a for n, a in arrays.items() if n.startswith(p)})
        for key, p in prefixes.items()
    }
    out = tmp_path / "out.safetensors"
    also = ("--also", files["vae"], "--also", files["g"])
    done = bake("convert", files["unet"], *also, "-o", out, "--layout", "original", "--verify", "full")
    assert done.code == 0, done.err
    whole = raw(save(tmp_path / "whole.safetensors", arrays))
    assert raw(out) == {name: whole[name] for name in whole if name.startswith(tuple(prefixes.values()))}


def test_side_files_of_a_stranger_do_not_lead_out_of_their_folder(tmp_path: Path) -> None:
    base = save_base(tmp_path / "a.safetensors")
    like = like_folder(tmp_path / "like", "sd1")
    (tmp_path / "secret.txt").write_text("secret")
    (like / "readme.txt").symlink_to(tmp_path / "secret.txt")
    done = bake("convert", base, "-o", tmp_path / "o", "--layout", "diffusers", "--like", like)
    assert done.code == 3
    assert "a link out of its folder" in done.err
    (like / "readme.txt").unlink()
    (like / "model_index.json").write_text("[")
    done = bake("convert", base, "-o", tmp_path / "o", "--layout", "diffusers", "--like", like)
    assert done.code == 3
    assert not (tmp_path / "o").exists()
