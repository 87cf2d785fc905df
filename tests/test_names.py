"""Every published model, and a full adapter for it in every dialect: all of it lands, each row once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from headers import factors, layers, union, write_listed, write_shapes
from listed_models import BASES, LANGUAGE, MODELS, layers_of, list_path
from names import Shapes, read_list
from speaking import CASCADE, DIALECTS, PEFT, Dialect, Layers, spoken
from tiling import touched

from bake import build_plan
from bake.errors import BakeError
from bake.identify.adapter import Adapter, identify_adapter
from bake.identify.checkpoint import BaseIdentity, identify_checkpoint
from bake.identify.families import title
from bake.io.adapter import open_adapter
from bake.io.checkpoint import open_checkpoint
from bake.plan.base import check_family

# Layers of a base that no adapter can name, and why.
UNNAMED = (
    "cond_stage_model.model.transformer.resblocks.23.",  # SD2 stops one layer earlier
    "cond_stage_model.model.text_projection",  # of SD2, which nothing reads
)
VAE = ("first_stage_model.", "vae/", "vae.")
ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoder", "text_encoders.")

# The first lists of a family meet every dialect, the others one of each kind: flat and dotted, of both layouts.
KINDS = ("kohya", "ComfyUI", "LyCORIS", "diffusers")
FIRST = {MODELS[model].family: base for model, base in reversed(BASES) if MODELS[model].original == base}


def dialects_for(model: str, base: str) -> list[Dialect]:
    if base not in FIRST.values():
        return [dialect for dialect in DIALECTS if dialect.name in KINDS]
    return [*DIALECTS, CASCADE] if MODELS[model].family == "stable-cascade" else list(DIALECTS)


def matrices(shapes: Shapes, with_encoders: bool) -> set[str]:
    """The tensors that a full adapter has to reach, told by their own names."""
    found = {f"{name}.weight" for name in layers(shapes)}
    found |= {name for name in shapes if name.endswith(("in_proj_weight", ".text_projection"))}
    left_out = VAE if with_encoders else VAE + ENCODERS
    return {name for name in found if not name.startswith((*left_out, *UNNAMED))}


def full_names(path: Path, folder: str) -> Shapes:
    """The tensors of a list, with the folder that lists of one folder leave out."""
    about, shapes = read_list(path)
    alone = len({file.rpartition("/")[0] for file in about.get("files", {})}) == 1
    return {(folder if alone else "") + name: shape for name, shape in shapes.items()}


@pytest.mark.parametrize(("model", "base"), BASES, ids=[base for _, base in BASES])
def test_a_full_adapter_in_every_dialect_lands_on_every_row_once(
    shared: Path, tmp_path: Path, model: str, base: str
) -> None:
    path, every = list_path(shared, base), layers_of(shared, model)
    written = write_listed(tmp_path / base, path)
    shapes = full_names(path, MODELS[model].folder)
    for dialect in dialects_for(model, base):
        if not every.speaks(dialect):
            continue
        adapter = write_shapes(tmp_path / "lora.safetensors", spoken(dialect, every))
        plan = build_plan(written, [adapter])
        assert plan.family == MODELS[model].family
        assert plan.unmatched == (), dialect.name
        assert all(part.matched == part.total for part in plan.components.values()), dialect.name
        assert touched(plan) == matrices(shapes, bool(dialect.encoders)), dialect.name
        found = identify_adapter(open_adapter(adapter))
        assert plan.family in found.families, dialect.name
        assert found.family == plan.family, dialect.name


def peft_of(shapes: Shapes, *suffixes: str) -> Shapes:
    return union(
        factors("base_model.model." + name, shape, *PEFT)
        for name, shape in layers(shapes).items()
        if not suffixes or name.endswith(suffixes)
    )


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_peft_adapter_for_every_linear_of_a_language_model(shared: Path, tmp_path: Path, name: str) -> None:
    _, shapes = read_list(list_path(shared, name))
    base = write_listed(tmp_path / name, list_path(shared, name))
    if name == "gpt2_small":  # stored (in, out), and PEFT's factors are not
        linear = {module: shape[::-1] for module, shape in layers(shapes).items()}
    else:
        linear = layers(shapes)
    names = union(factors(f"base_model.model.{module}", shape, *PEFT) for module, shape in linear.items())
    plan = build_plan(base, [write_shapes(tmp_path / "lora.safetensors", names)])
    assert plan.unmatched == ()
    assert touched(plan) == {f"{module}.weight" for module in linear}


# A name list of a class with another name for the same model: base, list whose names the adapter has.
MOVED = [
    ("qwen25_vl_3b_old", "qwen25_vl_3b_new"),
    ("qwen25_vl_3b_new", "qwen25_vl_3b_old"),
    ("qwen3moe_small_fused", "qwen3moe_small"),
]


@pytest.mark.parametrize(("base", "other"), MOVED)
def test_a_peft_adapter_in_the_names_of_another_release(shared: Path, tmp_path: Path, base: str, other: str) -> None:
    _, shapes = read_list(list_path(shared, base))
    _, theirs = read_list(list_path(shared, other))
    written = write_listed(tmp_path / base, list_path(shared, base))
    plan = build_plan(written, [write_shapes(tmp_path / "lora.safetensors", peft_of(theirs))])
    assert plan.unmatched == ()
    stacks = {name for name in shapes if ".experts." in name}
    assert touched(plan) == {f"{module}.weight" for module in layers(shapes)} | stacks


# Published LoRAs by their keys, a base, further files of it, and how many modules land where.
KEYS = [
    ("flux_lora_kohya", "flux1", {"transformer": 304}),
    ("flux_lora_diffusers", "flux1", {"transformer": 494}),
    ("flux_dora_onetrainer", "flux1", {"transformer": 266, "te1": 72, "te3": 168}),
    ("flux_lora_kohya", "folder", {"transformer": 304}),
    ("flux_lora_diffusers", "folder", {"transformer": 494}),
    ("flux_dora_onetrainer", "folder", {"transformer": 266, "te1": 72, "te2": 168}),
    ("qwen_image_lora_diffusers", "qwen", {"transformer": 3}),
]


@pytest.mark.parametrize(("name", "base", "components"), KEYS)
def test_the_keys_of_published_loras_find_their_places(
    shared: Path, tmp_path: Path, name: str, base: str, components: dict[str, int]
) -> None:
    content = json.loads((shared / "data" / "keys" / f"{name}.json").read_text())
    shapes = {key: tuple(shape) for key, shape in content.get("tensors", content).items()}
    lora = write_shapes(tmp_path / "lora.safetensors", shapes)
    lists = {
        "flux1": ["flux1_dev_original", "clip_l_comfy", "t5xxl_fp16_comfy"],
        "folder": ["flux1_dev_diffusers", "flux1_dev_encoders_diffusers"],
        "qwen": ["qwen_image_original"],
    }[base]
    paths = [list_path(shared, each) for each in lists]
    if base == "folder":
        written, also = write_listed(tmp_path / base, *paths), []
    else:
        written, *also = (write_listed(tmp_path / path.name.partition(".")[0], path) for path in paths)
    plan = build_plan(written, [lora], also=also)
    assert {component: part.matched for component, part in plan.components.items()} == components
    assert plan.unmatched == ()
    terms = [term.module for _, tensor in plan.tensors() for term in tensor.terms]
    assert len(set(terms)) == sum(components.values())


def test_sd1_modules_are_where_another_tools_map_has_them(shared: Path, tmp_path: Path) -> None:
    content = json.loads((shared / "data" / "keys" / "sd1_ldm_to_diffusers.json").read_text())
    theirs = {ours: name for ours, name in content["ldm_diffusers_keymap"].items() if name.startswith(("unet_", "te_"))}
    _, shapes = read_list(list_path(shared, "sd15_original"))
    names = {}
    for tensor, name in theirs.items():
        if tensor.removesuffix(".weight") in layers(shapes):
            prefix, _, path = name.removesuffix(".weight").partition("_")
            spelled = {"unet": "lora_unet_", "te": "lora_te_"}[prefix] + path.replace(".", "_")
            names[spelled] = tensor
    assert len(names) > 350
    lora = union(factors(module, shapes[tensor]) for module, tensor in names.items())
    base = write_listed(tmp_path / "base", list_path(shared, "sd15_original"))
    plan = build_plan(base, [write_shapes(tmp_path / "lora.safetensors", lora)])
    found = {term.module: tensor.name for _, tensor in plan.tensors() for term in tensor.terms}
    assert found == names


# What these hold is in no row of names that tells a family: BERT's and T5's layers.
UNTOLD = ("minilm_l6", "t5_large")
WRONG_DIALECTS = ("kohya", "ComfyUI", "LyCORIS", "OneTrainer", "diffusers", "bare original", "bare diffusers")
ONE_EACH = (
    *("sd15", "sd21", "sdxl", "sdxl-refiner", "flux1_dev", "chroma", "flux2_dev", "sd3_medium", "sd35_medium"),
    *("auraflow", "pixart_sigma", "lumina2", "zimage", "hunyuanvideo", "wan21_i2v_14b", "qwen_image", "ltx_video"),
    *("cascade-c", "cascade-b"),
)


def bases_of(shared: Path, folder: Path) -> list[tuple[str, Path, BaseIdentity]]:
    """(family, path, identity) of one base of each family in each layout."""
    found = []
    for model in ONE_EACH:
        for name in filter(None, (MODELS[model].original, MODELS[model].diffusers)):
            found.append((MODELS[model].family, write_listed(folder / name, list_path(shared, name))))
    found.append(("language-model", write_listed(folder / "llama", list_path(shared, "llama31_8b"))))
    found.append(("language-model", write_listed(folder / "gpt2", list_path(shared, "gpt2_small"))))
    return [(family, path, identify_checkpoint(open_checkpoint(path))) for family, path in found]


def full_adapters(shared: Path, folder: Path) -> list[tuple[str, Path, Adapter]]:
    """(family, path, identity) of a full adapter of each family in several dialects, text encoders left out."""
    found = []
    for model in ONE_EACH:
        every = layers_of(shared, model)
        for dialect in DIALECTS:
            if dialect.name in WRONG_DIALECTS:
                names = spoken(dialect, Layers(every.original, every.diffusers))
                path = write_shapes(folder / f"{model} {dialect.name}.safetensors", names)
                found.append((MODELS[model].family, path))
    for name in ("llama31_8b", "gpt2_small", "whisper_small"):
        names = peft_of(read_list(list_path(shared, name))[1])
        found.append(("language-model", write_shapes(folder / f"{name}.safetensors", names)))
    return [(family, path, identify_adapter(open_adapter(path))) for family, path in found]


def plan_if_family_fits(identity: BaseIdentity, base: Path, lora: Path, adapter: Adapter) -> None:
    """What `build_plan` does, in less time for the thousands of pairs that names alone refuse."""
    check_family(identity, adapter)
    build_plan(base, [lora])


def test_a_full_adapter_of_one_family_is_refused_by_every_other_and_both_are_named(
    shared: Path, tmp_path: Path
) -> None:
    bases, adapters = bases_of(shared, tmp_path), full_adapters(shared, tmp_path)
    pairs = [(a, b) for a in adapters for b in bases if a[0] != b[0]]
    assert len(pairs) > 4000
    for (family, lora, adapter), (_, base, identity) in pairs:
        with pytest.raises(BakeError) as refusal:
            plan_if_family_fits(identity, base, lora, adapter)
        said = (lora.name, base.name, refusal.value.message)
        assert refusal.value.exit_code == 5, said
        assert title(family) in refusal.value.message, said
        assert title(identity.family) in refusal.value.message, said


@pytest.mark.parametrize("name", UNTOLD)
def test_an_adapter_whose_names_tell_no_family_matches_nothing_of_another(
    shared: Path, tmp_path: Path, name: str
) -> None:
    lora = write_shapes(tmp_path / "lora.safetensors", peft_of(read_list(list_path(shared, name))[1]))
    for _, base, _ in bases_of(shared, tmp_path):
        with pytest.raises(BakeError) as refusal:
            build_plan(base, [lora])
        assert refusal.value.exit_code == 4, refusal.value.message
        assert refusal.value.details["matched"] == 0
