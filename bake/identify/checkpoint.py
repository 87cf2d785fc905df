"""What a base is: its family, its layout and where its components are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bake.errors import UsageError
from bake.identify.fingerprints import families_by_names
from bake.io.checkpoint import Checkpoint
from bake.keys.modules import Component
from bake.keys.places import split_parameter

Shape = tuple[int, ...]

_LDM_UNET = "input_blocks.0.0.weight"
_DIFFUSERS_UNET = "down_blocks.0.resnets.0.conv1.weight"
_HF_CLIP = "embeddings.token_embedding.weight"
_OPENCLIP = "transformer.resblocks.0.attn.in_proj_weight"
_VAES = ("encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight")

# Where single files keep their components. A text encoder's slot (te1, te2) follows from its depth.
#   prefix                                  what it holds     seen in
_PREFIXES = (
    ("model.diffusion_model.", "unet"),  #                    all original-layout files
    ("cond_stage_model.transformer.", "te"),  #               SD1
    ("cond_stage_model.model.", "te"),  #                     SD2
    ("conditioner.embedders.0.transformer.", "te"),  #        SDXL
    ("conditioner.embedders.0.model.", "te"),  #              SDXL refiner
    ("conditioner.embedders.1.model.", "te"),  #              SDXL
    ("first_stage_model.", "vae"),
    ("unet.", "unet"),
    ("", "unet"),
    ("", "te"),
    ("", "vae"),
)
_DIFFUSERS_FOLDERS = {
    "unet": "unet",
    "transformer": "transformer",
    "text_encoder": "te1",
    "text_encoder_2": "te2",
    "text_encoder_3": "te3",
    "vae": "vae",
}
_CLIP_LAYER = re.compile(r"(?:text_model\.)?(?:encoder\.layers|transformer\.resblocks)\.(\d+)\.")
_BIGG_DEPTH = 32  # layers of OpenCLIP bigG, the second text encoder of SDXL; CLIP-L has 12, OpenCLIP H 23 or 24
_VARIANTS = {9: "inpainting", 8: "instruct-pix2pix"}  # by input channels of the first convolution


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """What bake knows about a base before any adapter is looked at."""

    family: str  # key of FAMILIES, a language model's model_type, or "unknown"
    layout: str  # "original", "diffusers", "huggingface" or "plain"
    components: tuple[Component, ...]
    variant: str | None = None  # "inpainting", "instruct-pix2pix"
    language_model: bool = False
    evidence: tuple[str, ...] = ()  # the names that convinced


def identify_checkpoint(checkpoint: Checkpoint) -> BaseIdentity:
    """The identity of `checkpoint`, from names, shapes and its config files."""
    groups: dict[str, dict[str, Shape]] = {}
    for part in checkpoint.files:
        inside = groups.setdefault(part.group, {})
        inside.update((name, info.shape) for name, info in part.file.tensors.items())
    components: list[Component] = []
    for group, shapes in groups.items():
        folder = group.rstrip("/")
        found = (
            _component_of_folder(folder, shapes)
            if checkpoint.packaging == "diffusers"
            else _components_of_file(group, shapes)
        )
        for component in found:
            if any(other.name == component.name for other in components):
                raise UsageError(f"{checkpoint.root}: two files hold a {component.name}; name only one of them")
            components.append(component)
    return _identify(checkpoint, tuple(components), groups)


def _component_of_folder(folder: str, shapes: Mapping[str, Shape]) -> list[Component]:
    name = _DIFFUSERS_FOLDERS.get(folder, folder)
    naming = {"unet": "diffusers unet", "te": _clip_naming(shapes) or "plain"}.get(name.rstrip("0123456789"), "plain")
    return [Component(name, folder + "/", naming)]


def _components_of_file(group: str, shapes: Mapping[str, Shape]) -> list[Component]:
    """The components of one file or one sharded set; a single "model" where none is recognised."""
    found: list[Component] = []
    for prefix, kind in _PREFIXES:
        if not prefix and found:
            break
        inside = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
        naming = {"unet": _unet_naming, "te": _clip_naming, "vae": _vae_naming}[kind](inside)
        if naming is not None:
            name = kind if kind != "te" else _text_encoder_slot(inside)
            found.append(Component(name, group + prefix, naming))
    return found or [Component("model", group, "plain")]


def _unet_naming(names: Mapping[str, Shape]) -> str | None:
    if _LDM_UNET in names:
        return "ldm unet"
    return "diffusers unet" if _DIFFUSERS_UNET in names and "conv_in.weight" in names else None


def _clip_naming(names: Mapping[str, Shape]) -> str | None:
    if _HF_CLIP in names or "text_model." + _HF_CLIP in names:
        return "hf clip"
    return "openclip" if _OPENCLIP in names and "token_embedding.weight" in names else None


def _vae_naming(names: Mapping[str, Shape]) -> str | None:
    return "plain" if any(sentinel in names for sentinel in _VAES) else None


def _text_encoder_slot(names: Mapping[str, Shape]) -> str:
    layers = {int(found[1]) for found in map(_CLIP_LAYER.match, names) if found is not None}
    return "te2" if len(layers) >= _BIGG_DEPTH else "te1"


def _identify(
    checkpoint: Checkpoint, components: tuple[Component, ...], groups: Mapping[str, Mapping[str, Shape]]
) -> BaseIdentity:
    shapes = {group + name: shape for group, names in groups.items() for name, shape in names.items()}
    unet = next((component for component in components if component.name == "unet"), None)
    if unet is not None:
        family, variant, evidence = _unet_family(unet, shapes)
        layout = "original" if unet.naming == "ldm unet" else "diffusers"
        return BaseIdentity(family, layout, components, variant, evidence=evidence)
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


def _unet_family(unet: Component, shapes: Mapping[str, Shape]) -> tuple[str, str | None, tuple[str, ...]]:
    """(family, variant, evidence): from which blocks exist and how many axes they have, not from widths."""
    names = {name[len(unet.prefix) :]: shape for name, shape in shapes.items() if name.startswith(unet.prefix)}
    is_ldm = unet.naming == "ldm unet"
    channels = names["input_blocks.0.0.weight" if is_ldm else "conv_in.weight"][1]
    variant = _VARIANTS.get(channels)
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
