"""Split models: a transformer or a UNet in one file, its text encoders in others, one LoRA for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import dits
import numpy as np
import pytest
from headers import factors, layers, union
from models import llama, random_arrays
from names import small
from support import Done, bake, load, lora_delta, random, raw, save

Shapes = dict[str, tuple[int, ...]]

CLIP_PREFIX = "cond_stage_model.transformer."
CLIP_L = {n.removeprefix(CLIP_PREFIX): s for n, s in small("sd1").items() if n.startswith(CLIP_PREFIX)}


def below(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def clip_g(layers: int = 32, width: int = 8) -> Shapes:
    """SDXL's and SD3's second text encoder in Hugging Face's names, as ComfyUI's clip_g.safetensors has them."""
    inside = {name: shape for name, shape in CLIP_L.items() if ".encoder.layers.0." in name}
    repeated = {
        name.replace("layers.0.", f"layers.{n}."): shape for n in range(layers) for name, shape in inside.items()
    }
    return CLIP_L | repeated | {"text_projection.weight": (width, width)}


def t5(blocks: int = 2, width: int = 8) -> Shapes:
    found: Shapes = {"shared.weight": (16, width), "encoder.embed_tokens.weight": (16, width)}
    for block in range(blocks):
        at = f"encoder.block.{block}.layer"
        found |= {f"{at}.0.SelfAttention.{leaf}.weight": (width, width) for leaf in "qkvo"}
        found |= {f"{at}.1.DenseReluDense.{leaf}.weight": (12, width) for leaf in ("wi_0", "wi_1")}
        found |= {f"{at}.1.DenseReluDense.wo.weight": (width, 12), f"{at}.0.layer_norm.weight": (width,)}
    return found | {"encoder.final_layer_norm.weight": (width,)}


QWEN = {name: shape for name, shape in llama().items() if name != "lm_head.weight"}
SDXL = small("sdxl")

# name -> the files of the stack, and where a LoRA's modules of each begin with kohya
STACKS: dict[str, tuple[dict[str, Shapes], dict[str, str]]] = {
    "flux": (
        {"flux1-dev": dits.flux(), "clip_l": CLIP_L, "t5xxl": t5()},
        {"flux1-dev": "lora_unet_", "clip_l": "lora_te1_", "t5xxl": "lora_te3_"},
    ),
    "flux, T5 as the second": (
        {"flux1-dev": dits.flux(), "clip_l": CLIP_L, "t5xxl": t5()},
        {"flux1-dev": "lora_unet_", "clip_l": "lora_te1_", "t5xxl": "lora_te2_"},
    ),
    "flux, dotted": (
        {"flux1-dev": dits.flux(), "clip_l": CLIP_L, "t5xxl": t5()},
        {"flux1-dev": "transformer.", "clip_l": "text_encoder.", "t5xxl": "text_encoder_2."},
    ),
    "sd3": (
        {"sd3": dits.sd3(), "clip_l": CLIP_L, "clip_g": clip_g(), "t5xxl": t5()},
        {"sd3": "lora_unet_", "clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5xxl": "lora_te3_"},
    ),
    "sd3, ComfyUI": (
        {"sd3": dits.sd3(), "clip_l": CLIP_L, "clip_g": clip_g(), "t5xxl": t5()},
        {
            **{"sd3": "diffusion_model.", "clip_l": "text_encoders.clip_l.transformer."},
            **{"clip_g": "text_encoders.clip_g.transformer.", "t5xxl": "text_encoders.t5xxl.transformer."},
        },
    ),
    "sdxl": (
        {"unet": below(SDXL, "model.diffusion_model."), "clip_l": CLIP_L, "clip_g": clip_g()},
        {"unet": "lora_unet_", "clip_l": "lora_te1_", "clip_g": "lora_te2_"},
    ),
    "wan": (
        {"wan": dits.wan(), "umt5_xxl": t5()},
        {"wan": "diffusion_model.", "umt5_xxl": "text_encoder."},
    ),
    "z-image": (
        {"z_image": dits.z_image(), "qwen_3_4b": QWEN},
        {"z_image": "lora_unet_", "qwen_3_4b": "lora_te_"},
    ),
    "z-image, ComfyUI": (
        {"z_image": dits.z_image(), "qwen_3_4b": QWEN},
        {"z_image": "diffusion_model.", "qwen_3_4b": "text_encoders.qwen3_4b.transformer."},
    ),
    "lumina2": (
        {"lumina_2": dits.lumina2(), "gemma_2_2b": QWEN},
        {"lumina_2": "lora_unet_", "gemma_2_2b": "lora_te_"},
    ),
}


def write_stack(folder: Path, files: Mapping[str, Shapes]) -> list[str | Path]:
    """The words that name a stack on the command line."""
    words: list[str | Path] = []
    for name, shapes in files.items():
        path = save(folder / f"{name}.safetensors", random_arrays(shapes, np.float32))
        words += [path] if not words else ["--also", path]
    return words


def write_lora(folder: Path, files: Mapping[str, Shapes], prefixes: Mapping[str, str]) -> tuple[Path, dict[str, str]]:
    """(a LoRA for every layer of a stack, "file/tensor" -> module)."""
    modules: dict[str, str] = {}
    shapes: list[Shapes] = []
    for name, prefix in prefixes.items():
        for module, shape in layers(files[name]).items():
            inner = module.removeprefix("model.") if name.startswith(("qwen", "gemma")) else module
            spelled = prefix + (inner.replace(".", "_") if prefix.endswith("_") else inner)
            modules[f"{name}/{module}.weight"] = spelled
            shapes.append(factors(spelled, shape, alpha=False))
    arrays = {name: random(place, *shape) for place, (name, shape) in enumerate(union(shapes).items())}
    return save(folder / "lora.safetensors", {n: a.astype(np.float32) for n, a in arrays.items()}), modules


def check(folder: Path, out: Path, lora: Path, modules: Mapping[str, str], weights: Mapping[str, float]) -> None:
    """Every tensor of `out` is what float64 says; a file's weight is `weights[file]`, 1 if it is not listed."""
    factor = load(lora)
    for path in sorted(out.iterdir()):
        before, after, bytes_before, bytes_after = (
            load(folder / path.name),
            load(path),
            raw(folder / path.name),
            raw(path),
        )
        assert before.keys() == after.keys()
        weight = weights.get(path.stem, 1.0)
        for name in before:
            module = modules.get(f"{path.stem}/{name}")
            if module is None or weight == 0:
                assert bytes_before[name] == bytes_after[name], name
                continue
            update = lora_delta(factor[f"{module}.lora_up.weight"], factor[f"{module}.lora_down.weight"])
            exact = before[name] + weight * update.reshape(before[name].shape)
            np.testing.assert_allclose(after[name], exact, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", STACKS)
def test_every_file_of_a_stack_is_fused_into_a_file_of_its_own(tmp_path: Path, name: str) -> None:
    files, prefixes = STACKS[name]
    words, (lora, modules) = write_stack(tmp_path, files), write_lora(tmp_path, files, prefixes)
    out = tmp_path / "out"
    done = bake("fuse", *words, "-l", lora, "-o", out, "--json")
    assert done.code == 0, done.out + done.err
    assert sorted(path.stem for path in out.iterdir()) == sorted(files)
    found = done.json["components"]
    assert sum(part["matched"] for part in found.values()) == sum(part["total"] for part in found.values())
    assert len(found) == len(files)
    assert done.json["tensors"]["fused"] == len(modules)
    check(tmp_path, out, lora, modules, {})
    assert bake("verify", out, "--full", "--search", tmp_path).code == 0


FLUX, FLUX_PREFIXES = STACKS["flux"]


class TestChoices:
    @pytest.mark.parametrize(
        ("lora_words", "words", "weights"),
        [
            (":0.5:te=0.25", (), {"flux1-dev": 0.5, "clip_l": 0.25, "t5xxl": 0.25}),
            (":1:unet=0", (), {"flux1-dev": 0}),
            ("", ("--only", "te"), {"flux1-dev": 0}),
            ("", ("--only", "te1"), {"flux1-dev": 0, "t5xxl": 0}),
            ("", ("--only", "transformer"), {"clip_l": 0, "t5xxl": 0}),
        ],
    )
    def test_weights_and_components(
        self, tmp_path: Path, lora_words: str, words: tuple[str, ...], weights: dict[str, float]
    ) -> None:
        base, (lora, modules) = write_stack(tmp_path, FLUX), write_lora(tmp_path, FLUX, FLUX_PREFIXES)
        done = bake("fuse", *base, "-l", f"{lora}{lora_words}", *words, "-o", tmp_path / "out")
        assert done.code == 0, done.err
        check(tmp_path, tmp_path / "out", lora, modules, weights)
        assert bake("verify", tmp_path / "out", "--full", "--search", tmp_path).code == 0


def plan(folder: Path, *words: object) -> Done:
    lora, _ = write_lora(folder, FLUX, FLUX_PREFIXES)
    return bake("plan", *words, "-l", lora)


class TestRefusals:
    def test_modules_of_an_encoder_that_is_not_there_name_the_remedy(self, tmp_path: Path) -> None:
        words = write_stack(tmp_path, FLUX)
        done = plan(tmp_path, words[0])
        assert done.code == 4
        assert "the base has no te1" in done.err
        assert "The base has no te1, te3. Name the file that has it with --also FILE" in done.err
        assert plan(tmp_path, words[0], "--only", "transformer").code == 0

    def test_two_files_of_one_name(self, tmp_path: Path) -> None:
        base, *_ = write_stack(tmp_path, {"model": dits.flux()})
        other, *_ = write_stack(tmp_path / "te", {"model": CLIP_L})
        done = plan(tmp_path, base, "--also", other)
        assert done.code == 2
        assert "two files of the stack are called model.safetensors" in done.err

    @pytest.mark.parametrize("again", ["flux1-dev", "clip_l"])
    def test_one_file_twice(self, tmp_path: Path, again: str) -> None:
        done = plan(tmp_path, *write_stack(tmp_path, FLUX), "--also", tmp_path / f"{again}.safetensors")
        assert done.code == 2
        assert f"{again}.safetensors is named twice" in done.err

    def test_a_file_and_a_link_to_it(self, tmp_path: Path) -> None:
        words = write_stack(tmp_path, FLUX)
        (tmp_path / "other.safetensors").symlink_to(tmp_path / "clip_l.safetensors")
        done = plan(tmp_path, *words, "--also", tmp_path / "other.safetensors")
        assert done.code == 2
        assert "other.safetensors is named twice" in done.err

    def test_two_encoders_of_one_kind(self, tmp_path: Path) -> None:
        other, *_ = write_stack(tmp_path / "other", {"clip_l_other": CLIP_L})
        done = plan(tmp_path, *write_stack(tmp_path, FLUX), "--also", other)
        assert done.code == 2
        assert "two files hold a te1" in done.err

    def test_a_file_that_is_no_model(self, tmp_path: Path) -> None:
        words = write_stack(tmp_path, FLUX)
        lora, _ = write_lora(tmp_path, FLUX, FLUX_PREFIXES)
        stray = save(tmp_path / "stray.safetensors", {"a.b": random(0, 2, 2)})
        for file in (lora, stray):
            done = plan(tmp_path, *words, "--also", file)
            assert done.code == 2, done.err
            assert f"{file.name}: no part of an image model that bake knows" in done.err

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        done = plan(tmp_path, *write_stack(tmp_path, FLUX), "--also", tmp_path / "none.safetensors")
        assert done.code in (2, 3)
        assert "none.safetensors" in done.err


def write_folder(folder: Path, parts: Mapping[str, Shapes]) -> Path:
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "model_index.json").write_text("{}")
    for name, shapes in parts.items():
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        save(folder / "pipeline" / name / f"{stem}.safetensors", random_arrays(shapes, np.float32))
    return folder / "pipeline"


def lora_for(folder: Path, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    names = union(factors(prefix + module, shape, alpha=False) for module, shape in layers(shapes).items())
    arrays = {name: random(place, *shape).astype(np.float32) for place, (name, shape) in enumerate(names.items())}
    return save(folder / f"{prefix}lora.safetensors", arrays)


class TestDiffusersFolders:
    @pytest.mark.parametrize(
        ("prefix", "changed"),
        [
            ("transformer.", "transformer"),
            ("transformer_2.", "transformer_2"),
            ("diffusion_model.", "transformer"),
            ("diffusion_model_2.", "transformer_2"),
            ("", "transformer"),
        ],
    )
    def test_an_adapter_goes_to_one_of_wans_two_transformers(self, tmp_path: Path, prefix: str, changed: str) -> None:
        """Both have the same names; without a 2 in its prefix an adapter means the first, never both."""
        base = write_folder(tmp_path, {"transformer": dits.wan(), "transformer_2": dits.wan(), "text_encoder": t5()})
        done = bake("fuse", base, "-l", lora_for(tmp_path, prefix, dits.wan()), "-o", tmp_path / "out", "--json")
        assert done.code == 0, done.err
        count = len(layers(dits.wan()))
        assert done.json["components"] == {changed: {"matched": count, "total": count}}
        for path in sorted(base.rglob("*.safetensors")):
            same = raw(path) == raw(tmp_path / "out" / path.relative_to(base))
            assert same == (path.parent.name != changed)

    def test_the_prior_of_stable_cascade(self, tmp_path: Path) -> None:
        parts = {"prior": dits.cascade_c(), "text_encoder": clip_g()}
        base = write_folder(tmp_path, parts)
        names = union(
            factors(prefix + module.replace(".", "_"), shape, alpha=False)
            for prefix, part in (("lora_prior_unet_", "prior"), ("lora_prior_te_", "text_encoder"))
            for module, shape in layers(parts[part]).items()
        )
        lora = save(tmp_path / "lora.safetensors", {name: random(0, *shape) for name, shape in names.items()})
        done = bake("plan", base, "-l", lora, "--json")
        assert done.code == 0, done.err
        assert {name: part["matched"] for name, part in done.json["components"].items()} == {
            "unet": len(layers(parts["prior"])),
            "te1": len(layers(parts["text_encoder"])),
        }
