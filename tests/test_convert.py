"""Conversion between dialects: names change, and what is fused does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import kohya_lora, llama, lora_factors, peft_lora, random_arrays, save_base, sd1_pair
from names import small
from support import Arrays, bake, load, metadata, random, raw, save
from test_support import tiny_base

from bake import combine, convert, fuse, resize
from bake.errors import DuplicateTarget, UnmatchedModules, Unsupported, UsageError

QKV = "double_blocks.0.img_attn.qkv"
LINEAR1 = "single_blocks.1.linear1"


def flux_lora(folder: Path, alpha: float = 2.0) -> Path:
    """A kohya LoRA for projections that diffusers has in three and four pieces, and one for a whole layer."""
    arrays: Arrays = {}
    for place, (module, shape) in enumerate({QKV: (24, 8), LINEAR1: (56, 8), "img_in": (8, 4)}.items()):
        name = f"lora_unet_{module.replace('.', '_')}"
        up, down = lora_factors(shape, seed=place)
        arrays |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        arrays[f"{name}.alpha"] = np.array(alpha, np.float16)
    return save(folder / "kohya.safetensors", arrays, {"ss_base_model_version": "flux1"})


def fused(base: Path, adapter: Path, folder: Path) -> dict[str, tuple[str, bytes]]:
    out = folder / "fused.safetensors"
    fuse(base, [adapter], out, overwrite=True, record=False)
    return raw(out)


@pytest.mark.parametrize("alpha", [2.0, 1.0, 0.75])
def test_there_and_back_is_the_same_file_and_all_fuse_alike(alpha: float, tmp_path: Path) -> None:
    base, first = tiny_base("flux", tmp_path), flux_lora(tmp_path, alpha)
    diffusers = convert(first, tmp_path / "diffusers.safetensors", names="diffusers").output
    peft = convert(diffusers, tmp_path / "peft", names="peft").output
    again = convert(peft, tmp_path / "again.safetensors", names="kohya").output
    assert raw(again) == raw(first)
    expected = fused(base, first, tmp_path)
    for other in (diffusers, peft, again):
        assert fused(base, other, tmp_path) == expected
    assert "transformer.single_transformer_blocks.1.proj_mlp.lora_B.weight" in raw(diffusers)
    assert "base_model.model.transformer_blocks.0.attn.to_k.lora_A.weight" in raw(peft / "adapter_model.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_unet_and_text_encoders_of_the_unets(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base.safetensors", family)
    shapes = small(family)
    begin = "model.diffusion_model."
    wanted = {name for name in shapes if name.startswith(begin) and ("proj_in.weight" in name or "skip" in name)}
    modules = {
        f"diffusion_model.{name[len(begin) :].removesuffix('.weight')}": name for name in wanted if "weight" in name
    }
    arrays, _ = kohya_lora(shapes, dict(sorted(modules.items())), alpha=4.0)
    versions = {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0"}
    comfy = save(tmp_path / "comfy.safetensors", arrays, {"ss_base_model_version": versions[family]})
    kohya = convert(comfy, tmp_path / "kohya.safetensors", names="kohya").output
    diffusers = convert(kohya, tmp_path / "diffusers.safetensors", names="diffusers").output
    expected = fused(base, comfy, tmp_path)
    assert fused(base, kohya, tmp_path) == fused(base, diffusers, tmp_path) == expected
    body = "input_blocks_4_1" if family == "sdxl" else "down_blocks_1_attentions_0"
    assert f"lora_unet_{body}_proj_in.lora_up.weight" in raw(kohya)
    assert "unet.down_blocks.1.attentions.0.proj_in.lora_B.weight" in raw(diffusers)


def test_text_encoders_get_their_prefixes(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    done = convert(lora, tmp_path / "d.safetensors", names="diffusers")
    assert "text_encoder.text_model.encoder.layers.11.mlp.fc2.lora_A.weight" in raw(done.output)
    assert fused(base, done.output, tmp_path) == fused(base, lora, tmp_path)
    with pytest.raises(UsageError, match="--only"):
        convert(lora, tmp_path / "peft", names="peft")
    half = convert(lora, tmp_path / "peft", names="peft", only=["te"])
    assert any("left out" in note for note in half.notes)


def test_alpha_is_said_or_folded_into_the_factors(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path, alpha=0.5)  # a quarter of the rank: a power of two
    told = convert(lora, tmp_path / "told.safetensors", names="diffusers")
    assert any("--fold-alpha" in note for note in told.notes)
    assert json.loads(metadata(told.output)["lora_adapter_metadata"])["unet.lora_alpha"] == 0.5
    folded = convert(lora, tmp_path / "folded.safetensors", names="diffusers", fold_alpha=True)
    assert not folded.notes
    assert folded.error == 0
    settings = json.loads(metadata(folded.output)["lora_adapter_metadata"])
    assert settings["unet.lora_alpha"] == settings["unet.r"] == 2
    assert fused(base, folded.output, tmp_path) == fused(base, lora, tmp_path)


def test_diffusers_loads_what_is_converted(tmp_path: Path) -> None:
    """Ranks and alphas that diffusers makes a configuration of are the modules' own."""
    peft = pytest.importorskip("peft")
    done = convert(flux_lora(tmp_path, 0.5), tmp_path / "d.safetensors", names="diffusers")
    settings = json.loads(metadata(done.output)["lora_adapter_metadata"])
    config = peft.LoraConfig(**{key.removeprefix("transformer."): value for key, value in settings.items()})
    assert (config.r, config.lora_alpha) == (2, 0.5)
    assert len(config.target_modules) == 8


def test_trainers_of_split_projections_are_joined(tmp_path: Path) -> None:
    """diffusers' q, k and v with factors of their own become one block-diagonal LoRA of three times the rank."""
    base = tiny_base("flux", tmp_path)
    arrays: Arrays = {}
    for place, leaf in enumerate(("to_q", "to_k", "to_v")):
        up, down = lora_factors((8, 8), seed=7 * place)
        name = f"transformer.transformer_blocks.0.attn.{leaf}"
        arrays |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
    lora = save(tmp_path / "d.safetensors", arrays)
    done = convert(lora, tmp_path / "k.safetensors", names="kohya", base=base)
    assert done.ranks == (6,)
    found = load(done.output)
    assert float(found["lora_unet_double_blocks_0_img_attn_qkv.alpha"]) == 6
    assert fused(base, done.output, tmp_path) == fused(base, lora, tmp_path)
    arrays.pop("transformer.transformer_blocks.0.attn.to_v.lora_B.weight")
    arrays.pop("transformer.transformer_blocks.0.attn.to_v.lora_A.weight")
    with pytest.raises(Unsupported, match="parts of projections"):
        convert(save(tmp_path / "two.safetensors", arrays), tmp_path / "x.safetensors", names="kohya", base=base)


def test_dora_keeps_its_magnitudes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base.safetensors", "sd1")
    shapes = small("sd1")
    tensor = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    names = {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": tensor,
        "lora_unet_down_blocks_0_resnets_0_conv1": conv,
    }
    arrays, _ = kohya_lora(shapes, names, alpha=2.0)
    for module, name in names.items():
        ones = (1,) * (len(shapes[name]) - 2)
        arrays[f"{module}.dora_scale"] = np.abs(random(3, shapes[name][0], 1, *ones)).astype(np.float32) + 0.5
    lora = save(tmp_path / "k.safetensors", arrays, {"ss_base_model_version": "sd_v1"})
    there = convert(lora, tmp_path / "d.safetensors", names="diffusers").output
    assert json.loads(metadata(there)["lora_adapter_metadata"])["unet.use_dora"] is True
    back = convert(there, tmp_path / "b.safetensors", names="kohya").output
    assert raw(back) == raw(lora)
    assert fused(base, back, tmp_path) == fused(base, lora, tmp_path)


def test_other_algorithms_stay_in_kohyas_names(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    arrays = {
        f"{name}.hada_{each}": random(place, *shape).astype(np.float16)
        for place, (each, shape) in enumerate({"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 8)}.items())
    }
    arrays |= {"transformer.x_embedder.diff": random(9, 8, 4).astype(np.float16)}
    lora, base = save(tmp_path / "l.safetensors", arrays), tiny_base("flux", tmp_path)
    done = convert(lora, tmp_path / "k.safetensors", names="kohya", base=base)
    assert {"lora_unet_double_blocks_0_img_attn_proj.hada_w1_a", "lora_unet_img_in.diff"} <= set(raw(done.output))
    assert fused(base, done.output, tmp_path) == fused(base, lora, tmp_path)
    with pytest.raises(Unsupported, match="loha"):
        convert(lora, tmp_path / "d.safetensors", names="diffusers", base=base)


def test_peft_in_peft_out_for_language_models(tmp_path: Path) -> None:
    shapes = llama()
    arrays = peft_lora(shapes, ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"])
    lora = tmp_path / "lora"
    save(lora / "adapter_model.safetensors", arrays)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": True}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    done = convert(lora, tmp_path / "again", names="peft")
    found = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert found["lora_alpha"] == pytest.approx(3 * 2**0.5)  # alpha / sqrt(2), as alpha / 2
    assert not found["use_rslora"]
    assert raw(done.output / "adapter_model.safetensors") == raw(lora / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="PEFT"):
        convert(lora, tmp_path / "k.safetensors", names="kohya")


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    done = bake("convert", base, "-o", tmp_path / "o.safetensors", "--names", "kohya")
    assert done.code == 2
    assert "is a checkpoint, and --names is for adapters" in done.err
    arrays = load(lora)
    one = "lora_unet_mid_block_attentions_0_proj_in"
    twice = {
        f"unet.mid_block.attentions.0.proj_in.{end}": arrays[f"{one}.{old}"]
        for end, old in (("lora_B.weight", "lora_up.weight"), ("lora_A.weight", "lora_down.weight"))
    }
    with pytest.raises(DuplicateTarget, match="two names"):
        convert(save(tmp_path / "twice.safetensors", arrays | twice), tmp_path / "o.safetensors", names="kohya")
    lost = {f"lora_unet_down_blocks_7_nowhere.lora_{end}.weight": np.ones((2, 2)) for end in ("up", "down")}
    with pytest.raises(UnmatchedModules, match="--base"):
        convert(save(tmp_path / "lost.safetensors", arrays | lost), tmp_path / "o.safetensors", names="diffusers")
    with pytest.raises(UsageError, match="--names"):
        convert(lora, tmp_path / "o.safetensors", names="a1111")
    assert not (tmp_path / "o.safetensors").exists()


def test_the_output_is_never_the_input(tmp_path: Path) -> None:
    _, lora, _ = sd1_pair(tmp_path)
    before = lora.read_bytes()
    for words in (("convert", lora, "--names", "kohya"), ("resize", lora, "--rank", 1), ("combine", lora, lora)):
        done = bake(*words, "-o", lora, "--overwrite")
        assert done.code == 8
        assert lora.read_bytes() == before


def test_an_error_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lora, _ = sd1_pair(tmp_path)
    out = save(tmp_path / "o.safetensors", {"old": np.ones(1)})
    before = out.read_bytes()

    def broken(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bake.execute.adapter_file.NewAdapter._verify", broken)
    with pytest.raises(KeyboardInterrupt):
        convert(lora, out, names="kohya", overwrite=True)
    assert out.read_bytes() == before
    assert not list(tmp_path.glob(".*draft*"))


def test_every_verb_takes_every_dialect_it_writes(tmp_path: Path) -> None:
    base, first = tiny_base("flux", tmp_path), flux_lora(tmp_path)
    peft = convert(first, tmp_path / "peft", names="peft").output
    small_one = resize(peft, tmp_path / "small", rank=1)
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 1
    both = combine([first, peft], tmp_path / "both.safetensors")
    assert both.error == 0
    for adapter in (small_one.output, both.output):
        fused(base, adapter, tmp_path)


@pytest.mark.parametrize("how", [{"rank": 1}, {"keep": "fro=0.9"}], ids=str)
def test_an_adapter_resized_in_any_dialect_is_the_same(tmp_path: Path, how: dict[str, Any]) -> None:
    """Ranks and alphas that stand in metadata or a configuration are the new ones, module by module."""
    base, first = tiny_base("flux", tmp_path), flux_lora(tmp_path, 0.75)
    arrays = load(first)
    arrays["lora_unet_img_in.lora_up.weight"][:, 1:] *= 0.01  # a rank of 1 is enough for this one
    first = save(first, arrays, {"ss_base_model_version": "flux1"})
    one = resize(first, tmp_path / "r.safetensors", dtype="fp32", **how)
    assert len(one.ranks) == (1 if "rank" in how else 2)
    expected = fused(base, one.output, tmp_path)
    for names, output in (("diffusers", "d.safetensors"), ("peft", "p")):
        there = convert(one.output, tmp_path / f"first-{output}", names=names)
        whole = convert(first, tmp_path / output, names=names).output
        done = resize(whole, tmp_path / f"r-{output}", dtype="fp32", **how)
        # Cut in pieces, q, k and v have singular values, and ranks, of their own.
        assert fused(base, there.output, tmp_path) == expected
        again = convert(done.output, tmp_path / f"again-{names}.safetensors", names="kohya", base=base)
        fuse(base, [again.output], tmp_path / "one.safetensors", overwrite=True, dtype="fp32")
        fuse(base, [done.output], tmp_path / "two.safetensors", overwrite=True, dtype="fp32")
        fuse(base, [whole], tmp_path / "whole.safetensors", overwrite=True, dtype="fp32")
        results = [load(tmp_path / f"{name}.safetensors") for name in ("one", "two", "whole")]
        before = load(base)
        lost = sum(((results[1][name] - results[2][name]) ** 2).sum() for name in before)
        size = sum(((results[2][name] - before[name]) ** 2).sum() for name in before)
        assert done.error == pytest.approx((lost / size) ** 0.5, rel=1e-3)
        assert all(np.allclose(results[0][name], results[1][name], atol=1e-6) for name in before)


def test_arrays_are_small() -> None:
    assert sum(values.nbytes for values in random_arrays(small("sd1")).values()) < 1_000_000
