"""What a dialect calls the modules of a model: the way from a base's names to an adapter's.

Reading is generous, bake knows every spelling there is. Writing is not: each row of each weight gets the one
name that the programs of the dialect write and read. Source: kohya sd-scripts networks/lora*.py, diffusers
loaders/lora_pipeline.py, PEFT utils/save_and_load.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal

from bake.keys import cascade, clip, tables, unet
from bake.keys.dialects import flatten
from bake.keys.modules import TABLES, Component
from bake.keys.places import Parameters
from bake.keys.tables import Layout, find_path

Shape = tuple[int, ...]
Names = Literal["kohya", "diffusers", "peft"]
NAMES: tuple[Names, ...] = ("kohya", "diffusers", "peft")

_UNETS = ("ldm unet", "diffusers unet")
# Families whose UNet kohya's scripts name as the original does; they name SD1's and SD2's as diffusers does.
_ORIGINAL_IN_KOHYA = ("sdxl", "sdxl-refiner")
# Families in which kohya's scripts number the text encoders; elsewhere there is one, `lora_te_`.
_NUMBERED_IN_KOHYA = ("sdxl", "sd3", "flux")
_LEVEL = "text_model."  # of CLIP, which transformers 5 dropped and every adapter has
_DEEPEST = 64  # layers of a text encoder

# Modules that are looked up by number, not multiplied: no LoRA of a layer is for them.
_LOOKUPS = re.compile(
    r"(?:.+\.)?(?:\w*embed_tokens|shared|\w*token_embedding|\w*position(?:al)?_embeddings?|relative_attention_bias|"
    r"embed_positions|word_embeddings|token_type_embeddings|wte|wpe|embed_in|pos_embed|position_ids)"
)


def usual_names(family: str, language_model: bool) -> Names:
    """The dialect in which adapters of a family are usually shared."""
    return "peft" if language_model or family == "language-model" else "kohya"


def is_layer(module: str, shape: Shape) -> bool:
    """True if the weight of `module` multiplies its input: a Linear layer or a convolution."""
    return len(shape) in (2, 3, 4, 5) and _LOOKUPS.fullmatch(module) is None


def spoken_modules(
    component: Component,
    family: str,
    modules: Mapping[str, Parameters],
    shapes: Mapping[str, Shape],
    names: Names,
    whole: bool = True,
) -> dict[str, Parameters]:
    """The modules of one component by the paths that a dialect writes, each row of each once.

    modules: as the base spells them. shapes: full tensor name -> shape. whole: these are all modules of the model,
    so its blocks can be counted; else the published model's are. What the dialect has no name of its own for keeps
    the base's.
    """
    naming = component.naming
    if naming in _UNETS:
        return _in_unet_layout(modules, _is_original(names, family), "" if whole else family)
    if naming == "stable-cascade":
        joined = cascade.with_projections(modules)
        return tables.in_layout(cascade.CASCADE, joined, shapes, _layout(names))
    if naming in TABLES:
        return tables.in_layout(TABLES[naming], modules, shapes, _layout(names))
    if naming == "openclip":
        return clip.hf_modules(modules, shapes)
    if naming == "hf clip":
        return {_with_level(path): parameters for path, parameters in modules.items()}
    if naming == "language model" and names == "kohya":
        return {path.removeprefix("model."): parameters for path, parameters in modules.items()}
    return dict(modules)


def _layout(names: Names) -> Layout:
    return "original" if names == "kohya" else "diffusers"


def _is_original(names: Names, family: str) -> bool:
    return names == "kohya" and family in _ORIGINAL_IN_KOHYA


def _in_unet_layout(modules: Mapping[str, Parameters], original: bool, published: str) -> dict[str, Parameters]:
    """published: the family whose published model the modules are of; "": they are a whole model themselves."""
    if published:
        ldm = unet.published_modules(published)
        translated = unet.translate(ldm)
        other = {name: module for module, name in translated.items()} if original else translated
    else:
        other = {} if unet.is_ldm(modules) == original else unet.translate(modules)
    return {other.get(module, module): parameters for module, parameters in modules.items()}


def _with_level(path: str) -> str:
    return path if path.startswith((_LEVEL, "text_projection")) else _LEVEL + path


def speaks(naming: str, path: str, names: Names) -> bool:
    """False for the path of a module that the dialect has under another name, or only as part of another one."""
    return naming not in TABLES or tables.is_in_layout(TABLES[naming], path, _layout(names))


def prefix_of(component: Component, family: str, names: Names) -> str:
    """What stands before the paths of a component's modules."""
    if names == "peft":
        return "base_model.model."
    number = component.name[2:] if component.name.startswith("te") else ""
    if not number:
        return "lora_unet_" if names == "kohya" else f"{_diffusers_model(component.naming)}."
    if family == "flux" and component.naming == "t5":
        number = "3" if names == "kohya" else "2"
    if names == "kohya":
        return f"lora_te{number if family in _NUMBERED_IN_KOHYA else ''}_"
    return "text_encoder." if number == "1" else f"text_encoder_{number}."


def _diffusers_model(naming: str) -> str:
    return "prior" if naming == "stable-cascade" else "unet" if naming in _UNETS else "transformer"


def spelled(prefix: str, path: str, names: Names) -> str:
    """The name of a module in a dialect, without suffix."""
    return prefix + (flatten(path) if names == "kohya" else path)


def dotted_path(naming: str, family: str, path: str, flat: bool) -> str | None:
    """The dotted path of an adapter's module in some layout of its model, told by its name alone; None: unknown.

    naming: of the component it is for. flat: `path` has "_" for its dots.
    """
    if naming in _UNETS:
        return _known_unet(family, flat).get(path)
    if naming in TABLES or naming == "stable-cascade":
        # What a table does not list is called the same in both layouts.
        table = cascade.CASCADE if naming == "stable-cascade" else TABLES[naming]
        return find_path(table, path, flat) or (None if flat else path)
    if naming in ("hf clip", "t5"):
        return _known_encoder(naming, flat).get(path)
    return None if flat else path


@cache
def _known_unet(family: str, flat: bool) -> dict[str, str]:
    """Every spelling of a UNet's module, flat or not -> its dotted path, in the layout of that spelling."""
    ldm = unet.published_modules(family)
    translated = unet.translate(ldm)
    paths = (*ldm, *translated.values())
    short = {path.removesuffix(".0"): path for path in paths if path.endswith(".to_out.0")}
    return _lookup({**{path: path for path in paths}, **short}, flat)


@cache
def _known_encoder(naming: str, flat: bool) -> dict[str, str]:
    if naming == "t5":
        return _lookup({path: path for path in _t5_modules()}, flat)
    paths = {path: path for path in _clip_modules()}
    return _lookup({**paths, **{path.removeprefix(_LEVEL): path for path in paths}}, flat)


def _lookup(paths: Mapping[str, str], flat: bool) -> dict[str, str]:
    return {flatten(spelling) if flat else spelling: path for spelling, path in paths.items()}


def _clip_modules() -> Iterable[str]:
    yield from (f"{_LEVEL}{name}" for name in ("final_layer_norm", "embeddings.token_embedding"))
    yield from (f"{_LEVEL}embeddings.position_embedding", "text_projection")
    attention = (f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"))
    for leaf in (*attention, "mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"):
        yield from (f"{_LEVEL}encoder.layers.{number}.{leaf}" for number in range(_DEEPEST))


def _t5_modules() -> Iterable[str]:
    yield from ("shared", "encoder.embed_tokens", "encoder.final_layer_norm")
    attention = (f"layer.0.SelfAttention.{leaf}" for leaf in ("q", "k", "v", "o", "relative_attention_bias"))
    dense = (f"layer.1.DenseReluDense.{leaf}" for leaf in ("wi", "wi_0", "wi_1", "wo"))
    for leaf in (*attention, *dense, "layer.0.layer_norm", "layer.1.layer_norm"):
        yield from (f"encoder.block.{number}.{leaf}" for number in range(_DEEPEST))
