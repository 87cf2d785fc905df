"""The support table is true: every fused algorithm, in every dialect, on every family that has the dialect."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import dits
import numpy as np
import pytest
from gen_docs import forms_for, prefixes_of
from models import llama, random_arrays, save_base
from support import Arrays, load, random, save

import bake
from bake.identify.checkpoint import BaseIdentity, identify_checkpoint
from bake.identify.families import FAMILIES
from bake.io.checkpoint import open_checkpoint
from bake.keys.dialects import Prefix, addresses, flatten
from bake.keys.factors import SUFFIXES, Algorithm
from bake.keys.modules import ModuleIndex
from bake.keys.places import Place

Shape = tuple[int, ...]

RANK, BLOCK = 2, 2

# factor -> its shape, in an update of a (rows, columns) weight; rows and columns are multiples of BLOCK.
FACTORS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "up": lambda rows, columns: (rows, RANK),
    "down": lambda rows, columns: (RANK, columns),
    "magnitude": lambda rows, columns: (rows, 1),
    "lora_e": lambda rows, columns: (RANK, 1),
    "diff": lambda rows, columns: (rows, columns),
    "value": lambda rows, columns: (rows, columns),
    "w1_a": lambda rows, columns: (rows, RANK),
    "w1_b": lambda rows, columns: (RANK, columns),
    "w2_a": lambda rows, columns: (rows, RANK),
    "w2_b": lambda rows, columns: (RANK, columns),
    "kron_w1": lambda rows, columns: (2, 2),
    "kron_w1_a": lambda rows, columns: (2, RANK),
    "kron_w1_b": lambda rows, columns: (RANK, 2),
    "kron_w2": lambda rows, columns: (rows // 2, columns // 2),
    "kron_w2_a": lambda rows, columns: (rows // 2, RANK),
    "kron_w2_b": lambda rows, columns: (RANK, columns // 2),
    "a1": lambda rows, columns: (columns, RANK),
    "a2": lambda rows, columns: (RANK, columns),
    "b1": lambda rows, columns: (rows, RANK),
    "b2": lambda rows, columns: (RANK, columns),
    "ia3_weight": lambda rows, columns: (rows,),
    "on_input": lambda rows, columns: (1,),
    "ia3_l": lambda rows, columns: (rows, 1),
    "oft_blocks": lambda rows, columns: (rows // BLOCK, BLOCK, BLOCK),
    "oft_diag": lambda rows, columns: (rows // BLOCK, BLOCK, BLOCK),
    "oft_r": lambda rows, columns: (columns // BLOCK, BLOCK * (BLOCK - 1) // 2),
    "boft_r": lambda rows, columns: (1, columns // BLOCK, BLOCK, BLOCK),
    "boft_s": lambda rows, columns: (rows, 1),
    "bias_indices": lambda rows, columns: (2, 1),
    "bias_values": lambda rows, columns: (1,),
    "bias_size": lambda rows, columns: (2,),
    "hra_u": lambda rows, columns: (columns, RANK),
}

# (row, factor) -> its shape, where two rows store a factor of one name differently.
OTHERWISE = {("boft", "oft_blocks"): lambda rows, columns: (1, rows // BLOCK, BLOCK, BLOCK)}
# Factors that are no weights.
VALUES: dict[str, Callable[[int, int], list[float]]] = {
    "on_input": lambda rows, columns: [0],
    "bias_indices": lambda rows, columns: [0, 0],
    "bias_size": lambda rows, columns: [rows, columns],
}
# Factors that the module's name tells, without a suffix of their own.
BARE = {"ia3_weight": "weight"}
ELSEWHERE = {"vera"}  # needs matrices that the whole file shares; tested with PEFT's own files

# Families whose tiny base comes from tests/dits.py; the others are UNets, see tests/names.py.
DITS: dict[str, Callable[[], Mapping[str, Shape]]] = {
    "sd3": dits.sd3,
    "flux": dits.flux,
    "flux2": dits.flux2,
    "chroma": dits.chroma,
    "auraflow": dits.auraflow,
    "pixart": dits.pixart,
    "sana": dits.sana,
    "lumina2": dits.lumina2,
    "z-image": dits.z_image,
    "hunyuan-video": dits.hunyuan,
    "wan": dits.wan,
    "qwen-image": dits.qwen_image,
    "ltxv": dits.ltx_video,
    "mochi": dits.mochi,
    "stable-cascade": dits.cascade_c,
}


def tiny_base(family: str, folder: Path) -> Path:
    """A base of `family` of some kilobytes."""
    if family == "language-model":
        save(folder / "base" / "model.safetensors", random_arrays(llama()))
        (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return folder / "base"
    if family in DITS:
        return save(folder / "base.safetensors", random_arrays(DITS[family]()))
    return save_base(folder / "base.safetensors", family)


def targets(base: Path) -> tuple[BaseIdentity, ModuleIndex, dict[str, tuple[str, str, Shape]]]:
    """(what the base is, its names, component -> one weight inside its blocks: its module, full name and shape).

    Text encoders are named as Hugging Face names them, for that is what every dialect does.
    """
    checkpoint = open_checkpoint(base)
    identity = identify_checkpoint(checkpoint)
    shapes = {name: info.shape for name, _, info in checkpoint.tensors()}
    index = ModuleIndex(identity.components, shapes)
    found = {}
    for component, spellings in index.spellings.items():
        if component == "vae":
            continue
        ordered = sorted(spellings.items(), key=lambda item: "resblocks" in item[0])
        found[component] = next(
            (path, places[0].tensor, shapes[places[0].tensor])
            for path, parameters in ordered
            for places in [parameters.get("weight", ())]
            if len(places) == 1
            and places[0] == Place(places[0].tensor)
            and any(part.isdecimal() for part in path.split("."))
            and len(shapes[places[0].tensor]) == 2
            and not any(size % BLOCK for size in shapes[places[0].tensor])
        )
    return identity, index, found


def module_name(prefix: Prefix, path: str) -> str:
    return prefix.text + (flatten(path) if prefix.style == "flat" else path)


def is_meant(module: str, prefix: Prefix, component: str, path: str, index: ModuleIndex) -> bool:
    """True if `module`, as `prefix` spells it, is a name for `path` in this component and in none before it.

    Text encoders share names, which without a prefix mean the first of them; some prefixes go on with
    names of their own.
    """
    spelled = flatten(path) if prefix.style == "flat" else path
    if prefix.components and all(reading.path != spelled for reading in addresses(module)):
        return False
    reached = (name for name in index.spellings if not prefix.components or name in prefix.components)
    return component == next((name for name in reached if path in index.spellings[name]), None)


def factors(form: Algorithm, module: str, shape: tuple[int, ...], seed: int) -> Arrays:
    """What an adapter with this algorithm stores for a weight of `shape`; small, so that sums stay finite."""
    unknown = set(form.required) - FACTORS.keys()
    assert not unknown, f"{form.name}: add the shapes of {unknown} to FACTORS"
    suffixes: Mapping[str, str] = BARE | {
        meaning.factor: suffix
        for suffix, meaning in reversed(SUFFIXES.items())
        if meaning.parameter == "weight" and not meaning.transposed
    }
    rows, columns = shape[0], math.prod(shape[1:])
    arrays: Arrays = {}
    for place, factor in enumerate(form.required):
        size = OTHERWISE.get((form.name, factor), FACTORS[factor])(rows, columns)
        values = random(seed + place, *size, spread=0.1)
        if factor in VALUES:
            values = np.reshape(np.array(VALUES[factor](rows, columns), float), size)
        arrays[f"{module}.{suffixes[factor]}"] = values.astype(np.float32)
    return arrays


CELLS = [
    (family.name, dialect)
    for family in FAMILIES.values()
    for dialect in dict.fromkeys(prefix.dialect for prefix in prefixes_of(family))
]


@pytest.mark.parametrize(("family", "dialect"), CELLS, ids=[" ".join(cell) for cell in CELLS])
def test_every_algorithm_is_fused(family: str, dialect: str, tmp_path: Path) -> None:
    base = tiny_base(family, tmp_path)
    identity, index, places = targets(base)
    assert identity.family == family or identity.language_model
    adapters, touched = [], set()
    for prefix in prefixes_of(FAMILIES[family]):
        for component in identity.components:
            if prefix.dialect != dialect or component.name not in places:
                continue
            path, name, shape = places[component.name]
            module = module_name(prefix, path)
            if not is_meant(module, prefix, component.name, path, index):
                continue
            for form in forms_for(prefix):
                if form.name in ELSEWHERE:
                    continue
                number = len(adapters)
                adapters.append(save(tmp_path / f"{number}.safetensors", factors(form, module, shape, 100 * number)))
                touched.add(name)
    if not adapters:
        pytest.skip(f"{dialect} names only text encoders, and the tiny base is a denoiser alone")
    output = tmp_path / ("out" if base.is_dir() else "out.safetensors")
    result = bake.fuse(base, [(adapter, 0.5) for adapter in adapters], output, verify="full")
    assert all(part.matched == part.total for part in result.plan.components.values())
    assert sum(part.total for part in result.plan.components.values()) == len(adapters)
    file = "model.safetensors" if base.is_dir() else ""
    before, after = load(base / file), load(output / file)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    biases = {name.removesuffix("weight") + "bias" for name in touched}  # LyCORIS' rotations turn them too
    assert touched <= changed <= touched | biases


def test_a_family_without_the_dialect_says_so() -> None:
    language = FAMILIES["language-model"]
    assert {prefix.dialect for prefix in prefixes_of(language)} == {"peft", "plain names"}
