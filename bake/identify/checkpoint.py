"""What a base is: its family, its layout and where its components are."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from bake.errors import UsageError
from bake.identify.fingerprints import families_by_names
from bake.identify.signs import find_sign, variant_of
from bake.io.checkpoint import Checkpoint
from bake.keys.modules import TABLES, Component
from bake.keys.places import split_parameter

Shape = tuple[int, ...]

_LDM_UNET = "input_blocks.0.0.weight"
_DIFFUSERS_UNET = "down_blocks.0.resnets.0.conv1.weight"
_HF_CLIP = "embeddings.token_embedding.weight"
_OPENCLIP = "transformer.resblocks.0.attn.in_proj_weight"
_T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
_T5_DECODER = "decoder.block.0.layer.0.SelfAttention.q.weight"
_VAES = ("encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight")

# Where single files keep their components. Where the prefix does not tell the slot of a text encoder, its depth does.
#   prefix                                  what it holds     seen in
_PREFIXES = (
    ("model.diffusion_model.", "model"),  #                   all original-layout files
    ("diffusion_model.", "model"),
    ("net.", "model"),  #                                     NVIDIA's originals
    ("cond_stage_model.transformer.", "te"),  #               SD1
    ("cond_stage_model.model.", "te"),  #                     SD2
    ("conditioner.embedders.0.transformer.", "te"),  #        SDXL
    ("conditioner.embedders.0.model.", "te"),  #              SDXL refiner
    ("conditioner.embedders.1.model.", "te"),  #              SDXL
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),  #                                       ComfyUI, since SD3
    ("unet.", "model"),
    ("transformer.", "model"),
    ("", "model"),
    ("", "te"),
    ("", "vae"),
)
# SD3 and everything after it; the name in the middle is the encoder's.
_TEXT_ENCODERS = re.compile(r"text_encoders\.(\w+)\.transformer\.")
_SLOTS = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}

_DIFFUSERS_FOLDERS = {
    "unet": "unet",
    "transformer": "transformer",
    "text_encoder": "te1",
    "text_encoder_2": "te2",
    "text_encoder_3": "te3",
    "vae": "vae",
}
_UNETS = {"ldm unet", "diffusers unet"}
_DIFFUSION_MODELS = {*_UNETS, "stable-cascade", *TABLES}

# Adapters number a T5 as their trainer does: Flux's is the second text encoder for diffusers and the third for
# kohya, and where it is the only one, it is the first. (family, naming) -> names it answers to, if they are free.
_ANSWERS = {
    ("sd3", "t5"): ("te3",),
    ("flux", "t5"): ("te2", "te3"),
    ("sdxl-refiner", "hf clip"): ("te1", "te2"),  # its only text encoder is SDXL's second
    ("sdxl-refiner", "openclip"): ("te1", "te2"),
    ("stable-cascade", "hf clip"): ("te1", "te2"),  # its only text encoder is a CLIP-G
    ("stable-cascade", "stable-cascade"): ("unet",),  # stage B, where stage C is not there
}
_ANY_T5 = ("te1", "te2", "te3")
_CLIP_LAYER = re.compile(r"(?:text_model\.)?(?:encoder\.layers|transformer\.resblocks)\.(\d{1,4})\.")
_BIGG_DEPTH = 32  # layers of OpenCLIP bigG, the second text encoder of SDXL; CLIP-L has 12, OpenCLIP H 23 or 24
_VARIANTS = {9: "inpainting", 8: "instruct-pix2pix", 5: "depth"}  # by input channels of the first convolution


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """What bake knows about a base before any adapter is looked at."""

    family: str  # key of FAMILIES, a language model's model_type, or "unknown"
    layout: str  # "original", "diffusers", "huggingface" or "plain"
    components: tuple[Component, ...]
    variant: str | None = None  # "inpainting", "instruct-pix2pix", "schnell", "3.5-medium", ...
    language_model: bool = False
    evidence: tuple[str, ...] = ()  # the names that convinced


def identify_checkpoint(checkpoint: Checkpoint) -> BaseIdentity:
    """The identity of `checkpoint`, from names, shapes and its config files."""
    groups: dict[str, dict[str, Shape]] = {}
    for part in checkpoint.files:
        inside = groups.setdefault(part.group, {})
        inside.update((name, info.shape) for name, info in part.file.tensors.items())
    components: list[Component] = []
    unrecognised: list[str] = []
    for group, shapes in groups.items():
        found = (
            [_component_of_folder(group.rstrip("/"), shapes)]
            if checkpoint.packaging == "diffusers"
            else _components_of_file(group, shapes)
        )
        if checkpoint.packaging == "stack" and [component.naming for component in found] == ["hf"]:
            unrecognised.append(group)
            continue
        for component in found:
            if any(other.name == component.name for other in components):
                raise UsageError(f"{checkpoint.root}: two files hold a {component.name}; name only one of them")
            components.append(component)
    for group in unrecognised:
        components.append(_language_model(group, groups[group], components))
    identity = _identify(checkpoint, tuple(components), groups)
    return replace(identity, components=tuple(_with_answers(identity.family, components)))


def _component_of_folder(folder: str, shapes: Mapping[str, Shape]) -> Component:
    name = _DIFFUSERS_FOLDERS.get(folder, folder)
    kind = "te" if name in _ANY_T5 else "vae" if name == "vae" else "model"
    naming = _KINDS[kind](shapes)
    if naming == "stable-cascade" and folder == "prior":
        name = "unet"  # stage C, which adapters are made for
    if naming is None:
        naming = "diffusers unet" if name == "unet" else "language model" if name in _ANY_T5 else "plain"
    return Component(name, folder + "/", naming)


def _components_of_file(group: str, shapes: Mapping[str, Shape]) -> list[Component]:
    """The components of one file or one sharded set; a single "model" where none is recognised."""
    found: list[Component] = []
    encoders = dict.fromkeys(match[0] for match in map(_TEXT_ENCODERS.match, shapes) if match is not None)
    for prefix, kind in (*((encoder, "te") for encoder in encoders), *_PREFIXES):
        if not prefix and (kind != "model" or any(other.naming in _DIFFUSION_MODELS for other in found)) and found:
            continue
        inside = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
        naming = _KINDS[kind](inside)
        if naming is None and prefix in encoders:
            naming = "language model"
        if naming is not None:
            name = _component_name(kind, naming, prefix, inside)
            while kind == "te" and any(other.name == name for other in found):
                name = f"te{int(name[2:]) + 1}"
            found.append(Component(name, group + prefix, naming))
    found.sort(key=lambda component: (component.naming not in _DIFFUSION_MODELS, component.name))
    return found or [Component("model", group, "hf")]


def _language_model(group: str, shapes: Mapping[str, Shape], others: Iterable[Component]) -> Component:
    """The text encoder in a file of a stack that holds a language model; raises UsageError if it holds none."""
    families, _ = families_by_names(split_parameter(name)[0] for name in shapes)
    if "language-model" not in families:
        raise UsageError(
            f"{group.rstrip('/')}: no part of an image model that bake knows, such as a UNet, a transformer or a "
            f"text encoder (it holds {next(iter(shapes), 'nothing')!r}). Adapters are given with -l."
        )
    taken = {component.name for component in others}
    name = next(name for name in map("te{}".format, itertools.count(1)) if name not in taken)
    return Component(name, group, "language model")


def _component_name(kind: str, naming: str, prefix: str, inside: Mapping[str, Shape]) -> str:
    if kind == "model":
        return "unet" if naming in _UNETS or naming == "stable-cascade" else "transformer"
    if kind == "vae":
        return kind
    encoder = _TEXT_ENCODERS.match(prefix)
    return _SLOTS.get(encoder[1] if encoder is not None else "") or _text_encoder_slot(naming, inside)


def _model_naming(names: Mapping[str, Shape]) -> str | None:
    if _LDM_UNET in names:
        return "ldm unet"
    if _DIFFUSERS_UNET in names and "conv_in.weight" in names:
        return "diffusers unet"
    sign = find_sign(names)
    return sign.family if sign is not None else None


def _text_encoder_naming(names: Mapping[str, Shape]) -> str | None:
    if _HF_CLIP in names or "text_model." + _HF_CLIP in names:
        return "hf clip"
    if _T5 in names and _T5_DECODER not in names:
        return "t5"
    return "openclip" if _OPENCLIP in names and "token_embedding.weight" in names else None


def _vae_naming(names: Mapping[str, Shape]) -> str | None:
    return "vae" if any(sentinel in names for sentinel in _VAES) else None


_KINDS = {"model": _model_naming, "te": _text_encoder_naming, "vae": _vae_naming}


def _text_encoder_slot(naming: str, names: Mapping[str, Shape]) -> str:
    if naming == "t5":
        return "te3"
    layers = {int(found[1]) for found in map(_CLIP_LAYER.match, names) if found is not None}
    return "te2" if len(layers) >= _BIGG_DEPTH else "te1"


def _with_answers(family: str, components: Iterable[Component]) -> Iterator[Component]:
    """The components, each with the further names it answers to in a base of this family."""
    components = list(components)
    taken = {component.name for component in components}
    for component in components:
        wanted = _ANSWERS.get((family, component.naming), _ANY_T5 if component.naming == "t5" else ())
        yield replace(component, also=tuple(name for name in wanted if name not in taken))


def _identify(
    checkpoint: Checkpoint, components: tuple[Component, ...], groups: Mapping[str, Mapping[str, Shape]]
) -> BaseIdentity:
    shapes = {group + name: shape for group, names in groups.items() for name, shape in names.items()}
    models = [component for component in components if component.naming in _DIFFUSION_MODELS]
    if models:
        model = next((component for component in models if component.name == "unet"), models[0])
        names = {name[len(model.prefix) :]: shape for name, shape in shapes.items() if name.startswith(model.prefix)}
        if model.naming in _UNETS:
            family, variant, evidence = _unet_family(model.naming == "ldm unet", names)
            layout = "original" if model.naming == "ldm unet" else "diffusers"
            return BaseIdentity(family, layout, components, variant, evidence=evidence)
        sign = find_sign(names)
        assert sign is not None, model
        by_diffusers = checkpoint.packaging == "diffusers" or "_class_name" in checkpoint.configs.get("", {})
        layout = sign.layout if sign.layout != "either" else "diffusers" if by_diffusers else "original"
        return BaseIdentity(sign.family, layout, components, variant_of(sign.family, names), evidence=sign.present)
    if checkpoint.packaging == "diffusers":
        class_name = str(checkpoint.configs.get("transformer/", {}).get("_class_name", "unknown"))
        return BaseIdentity(class_name, "diffusers", components)
    if [component.name for component in components] != ["model"]:
        return BaseIdentity("unknown", "plain", components, evidence=tuple(c.prefix for c in components))
    config = checkpoint.configs.get("", {})
    if "model_type" in config:
        return BaseIdentity(str(config["model_type"]), "huggingface", components, None, True, ("config.json",))
    families, telling = families_by_names(split_parameter(name)[0] for name in shapes)
    family = min(families) if len(families) == 1 else "unknown"
    return BaseIdentity(family, "plain", components, None, family == "language-model", (telling,) if telling else ())


def _unet_family(is_ldm: bool, names: Mapping[str, Shape]) -> tuple[str, str | None, tuple[str, ...]]:
    """(family, variant, evidence): from which blocks exist and how many axes they have, not from widths."""
    first = names["input_blocks.0.0.weight" if is_ldm else "conv_in.weight"]
    variant = _VARIANTS.get(first[1]) if len(first) > 1 else None
    embedding = "label_emb.0.0.weight" if is_ldm else "add_embedding.linear_1.weight"
    fourth_level = "input_blocks.9.0.op.weight" if is_ldm else "down_blocks.3.resnets.0.conv1.weight"
    if embedding in names:
        if fourth_level in names:
            return "sdxl-refiner", variant, (embedding, fourth_level)
        return "sdxl", variant, (embedding,)
    projection = "input_blocks.1.1.proj_in.weight" if is_ldm else "down_blocks.0.attentions.0.proj_in.weight"
    if projection not in names:
        return "unknown", variant, ()
    axes = len(names[projection])
    return ("sd1" if axes == 4 else "sd2"), variant, (f"{projection} has {axes} axes",)
