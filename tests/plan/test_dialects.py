"""A full adapter in every dialect on a model of every family: every row once, and where diffusers' converter has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import dits
import numpy as np
import pytest
from covering import Rows, converted
from headers import layers, write_header, write_shapes
from names import small
from speaking import DIALECTS, Dialect, Layers, spoken
from support import bake
from tiling import touched

from bake import build_plan
from bake.plan.model import Plan

Shapes = dict[str, tuple[int, ...]]
UNET = "model.diffusion_model."


def original_of(name: str) -> Shapes:
    """A model of two blocks at the width that diffusers' converter takes for granted."""
    _, _, build, _, width = dits.MODELS[name]
    return build(width, 768) if name == "lumina2" else build(width)


def below(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


ORIGINAL = [dialect for dialect in DIALECTS if dialect.layout == "original"]
DIFFUSERS = [dialect for dialect in DIALECTS if dialect.layout == "diffusers"]


@pytest.mark.parametrize("dialect", ORIGINAL, ids=[dialect.name for dialect in ORIGINAL])
@pytest.mark.parametrize("name", [*dits.MODELS, "hunyuan-comfy"])
def test_the_base_by_its_own_names(tmp_path: Path, name: str, dialect: Dialect) -> None:
    shapes = dits.hunyuan_comfy() if name == "hunyuan-comfy" else original_of(name)
    base = write_shapes(tmp_path / "base.safetensors", shapes)
    plan = build_plan(base, [write_shapes(tmp_path / "lora.safetensors", spoken(dialect, Layers(layers(shapes), {})))])
    found = {tensor.name: term.module for _, tensor in plan.tensors() for term in tensor.terms}
    flat = dialect.prefix.endswith("_")
    assert found == {
        f"{module}.weight": dialect.prefix + (module.replace(".", "_") if flat else module) for module in layers(shapes)
    }
    assert touched(plan) == set(found)


@pytest.mark.parametrize("name", dits.MODELS)
def test_a_base_by_the_other_layouts_names(tmp_path: Path, name: str) -> None:
    original = original_of(name)
    diffusers, rows, their_rows = converted(name, original)
    both = Layers(layers(original), layers(diffusers))
    for base, here, dialects, modules, there in (
        (original, rows, DIFFUSERS, both.diffusers, their_rows),
        (diffusers, their_rows, ORIGINAL, both.original, rows),
    ):
        written = write_shapes(tmp_path / "base.safetensors", base)
        reachable = {row for module in modules for row in there[f"{module}.weight"].tolist()}
        for dialect in dialects:
            plan = build_plan(written, [write_shapes(tmp_path / "lora.safetensors", spoken(dialect, both))])
            assert plan.unmatched == ()
            assert touched(plan) == {tensor for tensor in base if here[tensor][0] in reachable}, dialect.name
            check_rows(plan, {spelled(dialect, module): module for module in modules}, here, there)


def spelled(dialect: Dialect, module: str) -> str:
    return dialect.prefix + (module.replace(".", "_") if dialect.prefix.endswith("_") else module)


def check_rows(plan: Plan, modules: Mapping[str, str], here: Rows, there: Rows) -> None:
    """Every row of an update meets the row of the base that the converter made it of."""
    for _, tensor in plan.tensors():
        for term in tensor.terms:
            update = there[f"{modules[term.module]}.weight"][slice(*term.part)]
            np.testing.assert_array_equal(here[tensor.name][slice(*term.rows)], update, err_msg=term.module)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_a_unet_by_its_original_names(tmp_path: Path, family: str) -> None:
    shapes = small(family)
    base = write_shapes(tmp_path / "base.safetensors", shapes)
    original = layers(below(shapes, UNET))
    plan = build_plan(base, [write_shapes(tmp_path / "lora.safetensors", spoken(DIALECTS[0], Layers(original, {})))])
    found = {tensor.name: term.module for _, tensor in plan.tensors() for term in tensor.terms}
    assert found == {f"{UNET}{module}.weight": f"lora_unet_{module.replace('.', '_')}" for module in original}
    assert touched(plan) == set(found)


@pytest.mark.parametrize("name", dits.MODELS)
def test_inspect_names_family_and_dialect(tmp_path: Path, name: str) -> None:
    modules = layers(original_of(name))
    for dialect in ORIGINAL:
        lora = write_shapes(tmp_path / "lora.safetensors", spoken(dialect, Layers(modules, {})))
        found = bake("inspect", lora, "--json").json
        assert found["kind"] == "adapter"
        assert found["modules"] == len(modules)
        assert found["unknown"] == []
        assert dits.MODELS[name][0] in found["families"]
        assert found["family"] in (dits.MODELS[name][0], None), dialect.name
        if dialect.title != "bare":
            assert found["dialects"] == [dialect.title]


@pytest.mark.parametrize(("version", "noted"), [("flux1", True), ("chroma", False), ("", False)])
def test_a_lora_whose_metadata_names_another_family_with_the_same_names_is_fused_with_a_note(
    tmp_path: Path, version: str, noted: bool
) -> None:
    """Flux's attention LoRAs fit Chroma, and people use them there; they shall know."""
    shapes = original_of("chroma")
    base = write_shapes(tmp_path / "base.safetensors", shapes)
    attention = {module: shape for module, shape in layers(shapes).items() if ".img_attn." in module}
    names = spoken(DIALECTS[0], Layers(attention, {}))
    typed = {name: ("F16", shape) for name, shape in names.items()}
    lora = write_header(tmp_path / "lora.safetensors", typed, {"ss_base_model_version": version})
    plan = build_plan(base, [lora])
    told = "its metadata says it was trained on Flux.1 (flux), and the base is Chroma"
    assert any(told in note for note in plan.notes) == noted
