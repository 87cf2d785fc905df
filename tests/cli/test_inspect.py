"""bake inspect"""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from models import SD1_MODULES, UNET, kohya_lora, llama, peft_lora, random_arrays, save_base, sd1_pair
from names import small
from support import DIFFUSERS_LORA, KOHYA_LORA, SD1_BASE, bake, save


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


def test_ranks_and_alphas_are_counted_by_component() -> None:
    components = bake("inspect", KOHYA_LORA, "--json").json["components"]
    assert components["te1"] == {
        "modules": 72,
        "algorithms": [{"value": "lora", "count": 72}],
        "ranks": [{"value": 2, "count": 72}],
        "alphas": [{"value": 1.0, "count": 72}],
        "scales": [{"value": 0.5, "count": 72}],
    }
    assert "unet      192 modules: lora; rank 2; alpha 1; scale 0.5" in bake("inspect", KOHYA_LORA).out
    assert "alpha none stored" in bake("inspect", DIFFUSERS_LORA).out


def test_several_ranks_are_shown_with_their_counts(tmp_path: Path) -> None:
    one, _ = kohya_lora(small("sd1"), dict(list(SD1_MODULES.items())[:1]), rank=1, alpha=None)
    two, _ = kohya_lora(small("sd1"), dict(list(SD1_MODULES.items())[1:5]), alpha=4)
    path = save(tmp_path / "a.safetensors", one | two)
    assert (
        "unet      5 modules: lora; rank 2 x 4, 1 x 1; alpha 4 x 4, none stored x 1; scale 2 x 4, 1 x 1"
        in bake("inspect", path).out
    )


def test_trigger_words_and_training_facts_are_shown(tmp_path: Path) -> None:
    arrays, _ = kohya_lora(small("sd1"))
    told = {"ss_tag_frequency": json.dumps({"10_sks dog": {"grass": 3}}), "modelspec.license": "CC0"}
    path = save(tmp_path / "a.safetensors", arrays, told)
    assert bake("inspect", path, "--json").json["training"] == {
        "triggers": [{"text": "sks dog", "source": "ss_tag_frequency: 10_sks dog"}],
        "tags": [{"tag": "grass", "count": 3}],
        "facts": {"license": "CC0"},
        "unread": [],
    }
    out = bake("inspect", path).out
    assert "trigger   sks dog (ss_tag_frequency: 10_sks dog)\ntags      grass 3" in out
    assert "training  license: CC0" in out


def test_the_base_that_a_peft_configuration_names_is_told(tmp_path: Path) -> None:
    save(tmp_path / "l" / "adapter_model.safetensors", peft_lora(llama(), ["model.layers.0.mlp.up_proj.weight"]))
    (tmp_path / "l" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/llama"})
    )
    found = bake("inspect", tmp_path / "l", "--json").json
    assert found["training"]["facts"]["base_model"] == "org/llama"
    assert found["components"]["model"]["scales"] == [{"value": 2.0, "count": 1}]


def test_what_a_file_says_cannot_drive_the_terminal(tmp_path: Path) -> None:
    arrays, _ = kohya_lora(small("sd1"))
    path = save(tmp_path / "a.safetensors", arrays, {"ss_output_name": "\x1b[2Jgone", "modelspec.title": "a\u202eb"})
    for out in (bake("inspect", path).out, bake("inspect", path, "-v").out):
        assert "\x1b" not in out
        assert "\u202e" not in out
        assert "\\x1b[2Jgone" in out


def test_an_adapter_against_a_base_it_fits(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    found = bake("inspect", lora, "--against", base, "--json").json["coverage"]
    assert (found["fits"], found["refusal"], found["unmatched"], found["misfits"]) == (True, None, [], [])
    assert found["components"] == {"unet": {"matched": 5, "total": 5}, "te1": {"matched": 1, "total": 1}}
    assert (found["base"]["family"], found["base"]["layout"]) == ("sd1", "original")
    lines = bake("inspect", lora, "--against", base).out.splitlines()
    assert lines[-3:] == [
        "matched   unet 5/5, te1 1/1",
        "verdict   it fits: all 6 modules have a place in the base",
        f"run       {found['command']}",
    ]


def runs(command: str, folder: Path) -> bool:
    """True if the command that was offered fuses, as typed into a shell in `folder`."""
    words = shlex.split(command)
    assert words[:2] == ["bake", "fuse"]
    words[words.index("-o") + 1] = str(folder / words[words.index("-o") + 1])
    return bake(*words[1:]).code == 0


def test_the_command_that_is_offered_works_also_with_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    base, lora, _ = sd1_pair(folder)
    odd = lora.rename(folder / "my style:0.5.safetensors")
    assert runs(bake("inspect", odd, "--against", base, "--json").json["coverage"]["command"], tmp_path)


def test_a_module_without_a_place_is_listed_with_the_names_that_come_near(tmp_path: Path) -> None:
    base, _, _ = sd1_pair(tmp_path)
    arrays, _ = kohya_lora(small("sd1"))
    right = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = save(tmp_path / "a.safetensors", {key.replace(right, right + "q"): value for key, value in arrays.items()})
    found = bake("inspect", lora, "--against", base, "--json").json["coverage"]
    assert (found["fits"], found["refusal"]["exit"]) == (False, 4)
    (entry,) = found["unmatched"]
    assert (entry["module"], entry["reason"]) == (right + "q", "no such module in the base's unet")
    assert entry["candidates"][0] == entry["nearest"] == right.removeprefix("lora_unet_")
    assert len(entry["candidates"]) == 3
    assert found["verdict"] == "it fits in part; 1 of 6 modules have no place and would be left out"
    assert "--allow-unmatched" in found["command"]
    assert runs(found["command"], tmp_path)
    assert (
        f"unmatched {right}q: no such module in the base's unet; nearest: {right.removeprefix('lora_unet_')},"
        in bake("inspect", lora, "--against", base).out
    )


def test_a_base_without_the_text_encoder_gets_the_command_that_leaves_it_out(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    unet = {name: array for name, array in random_arrays(small("sd1")).items() if name.startswith(UNET)}
    base = save(tmp_path / "unet.safetensors", unet)
    found = bake("inspect", lora, "--against", base, "--json").json["coverage"]
    assert found["components"]["te1"] == {"matched": 0, "total": 1}
    assert "the base has no te1; --also FILE adds one" in found["verdict"]
    assert "--only unet" in found["command"]
    assert runs(found["command"], tmp_path)


def test_another_family_is_told_with_coverage_and_both_shapes(tmp_path: Path) -> None:
    sdxl = save_base(tmp_path / "xl.safetensors", "sdxl")
    done = bake("inspect", KOHYA_LORA, "--against", sdxl, "--json")
    assert done.code == 0
    found = done.json["coverage"]
    assert (found["fits"], found["refusal"]["exit"], found["command"]) == (False, 5, None)
    assert (done.json["family"], found["base"]["family"]) == ("sd1", "sdxl")
    assert found["base"]["evidence"] == ["label_emb.0.0.weight"]
    assert found["components"]["te1"] == {"matched": 72, "total": 72}
    placed = found["components"]["unet"]["matched"] + len(found["unmatched"]) + len(found["misfits"])
    assert placed == found["components"]["unet"]["total"] == 192
    widened = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    reason = next(entry["reason"] for entry in found["misfits"] if entry["module"] == widened)
    assert "the update is 8 x 8" in reason
    assert "is [8, 16]" in reason
    assert found["verdict"].startswith("it does not fit: ")
    assert found["verdict"].endswith("Use a base of the adapter's family.")
    out = bake("inspect", KOHYA_LORA, "--against", sdxl).out
    assert "more (-v shows all)\nverdict   it does not fit" in out
    assert "run  " not in out


def test_one_wrong_shape_is_a_misfit_and_everything_else_still_counts(tmp_path: Path) -> None:
    base, _, _ = sd1_pair(tmp_path)
    arrays, _ = kohya_lora(small("sd1"))
    arrays["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = np.ones((5, 2, 1, 1), np.float16)
    found = bake("inspect", save(tmp_path / "a.safetensors", arrays), "--against", base, "--json").json["coverage"]
    assert found["components"]["unet"] == {"matched": 4, "total": 5}
    assert [entry["module"] for entry in found["misfits"]] == ["lora_unet_mid_block_attentions_0_proj_in"]
    assert found["verdict"].startswith("it does not fit: ")


def test_an_adapter_that_contradicts_itself_has_a_verdict_and_no_coverage(tmp_path: Path) -> None:
    base, _, _ = sd1_pair(tmp_path)
    arrays, _ = kohya_lora(small("sd1"))
    for factor in ("lora_up.weight", "lora_down.weight"):
        twin = arrays[f"lora_unet_mid_block_attentions_0_proj_in.{factor}"]
        arrays[f"lora_unet_middle_block_1_proj_in.{factor}"] = twin + 1
    found = bake("inspect", save(tmp_path / "a.safetensors", arrays), "--against", base, "--json").json["coverage"]
    assert (found["refusal"]["code"], found["components"], found["command"]) == ("duplicate-target", {}, None)


def test_a_quantised_base_is_the_verdict(tmp_path: Path) -> None:
    _, lora, _ = sd1_pair(tmp_path)
    packed = random_arrays(small("sd1")) | {"a.weight.absmax": np.ones(1, np.float32)}
    found = bake("inspect", lora, "--against", save(tmp_path / "q.safetensors", packed), "--json").json["coverage"]
    assert (found["fits"], found["base"]["quantised"]) == (False, "bitsandbytes 4-bit")
    assert "16-bit original" in found["verdict"]


def test_a_base_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert bake("inspect", KOHYA_LORA, "--against", tmp_path / "none.safetensors").code == 3


@pytest.mark.parametrize("words", [("--against", SD1_BASE), ("--norms",)])
def test_what_only_adapters_have_is_not_asked_of_checkpoints(words: tuple[object, ...]) -> None:
    done = bake("inspect", SD1_BASE, *words)
    assert done.code == 2
    assert f"{words[0]} is for adapters" in done.err


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


def test_what_bake_does_not_fuse_is_described_all_the_same(tmp_path: Path) -> None:
    save(tmp_path / "l" / "adapter_model.safetensors", peft_lora(llama(), ["model.layers.0.mlp.up_proj.weight"]))
    (tmp_path / "l" / "adapter_config.json").write_text(json.dumps({"peft_type": "NEWEST"}))
    found = bake("inspect", tmp_path / "l", "--json").json
    assert (found["kind"], found["modules"], found["supported"]) == ("adapter", 1, False)
    assert "NEWEST" in found["refusal"]
    assert "NEWEST" in bake("inspect", tmp_path / "l").out


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
