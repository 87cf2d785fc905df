"""The tensors of a component by their names in the other layout, and where the layouts keep components."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from bake.keys import clip, tables, unet, vae
from bake.keys.modules import TABLES
from bake.keys.places import SCALE, Parameters, Place, split_parameter
from bake.keys.tables import Layout

Shape = tuple[int, ...]


class Respelt(NamedTuple):
    """One tensor as a layout has it."""

    places: tuple[Place, ...]  # the rows of stored tensors that it is made of, in its order
    shape: Shape


class Slot(NamedTuple):
    """Where the layouts keep a component."""

    component: str  # what it is called in the original layout
    folder: str  # in a diffusers folder
    prefix: str  # in a single file
    clip: str = "hf clip"  # how the original layout names a CLIP that is kept there
    is_t5: bool = False
    unread: tuple[str, ...] = ()  # beginnings of original names that diffusers has no place for, as nothing reads them

    @property
    def namings(self) -> tuple[str, ...]:
        """How the tensors of a text encoder or a VAE that fits here may be named."""
        if self.component == "vae":
            return ("vae",)
        return ("t5",) if self.is_t5 else ("hf clip", "openclip")


_MODEL = "model.diffusion_model."
_UNET, _TRANSFORMER = Slot("unet", "unet", _MODEL), Slot("transformer", "transformer", _MODEL)
_FIRST_STAGE, _VAE = Slot("vae", "vae", "first_stage_model."), Slot("vae", "vae", "vae.")
_CLIP_L = Slot("te1", "text_encoder", "text_encoders.clip_l.transformer.")
_T5 = "text_encoders.t5xxl.transformer."
_LAST_OF_H = ("transformer.resblocks.23.", "text_projection")  # SD2 reads its text encoder before these
# family -> its slots, as AUTOMATIC1111, ComfyUI and the published files have them
SLOTS: dict[str, tuple[Slot, ...]] = {
    "sd1": (_UNET, Slot("te1", "text_encoder", "cond_stage_model.transformer."), _FIRST_STAGE),
    "sd2": (_UNET, Slot("te1", "text_encoder", "cond_stage_model.model.", "openclip", unread=_LAST_OF_H), _FIRST_STAGE),
    "sdxl": (
        _UNET,
        Slot("te1", "text_encoder", "conditioner.embedders.0.transformer."),
        Slot("te2", "text_encoder_2", "conditioner.embedders.1.model.", "openclip"),
        _FIRST_STAGE,
    ),
    "sdxl-refiner": (
        _UNET,
        Slot("te2", "text_encoder_2", "conditioner.embedders.0.model.", "openclip"),
        _FIRST_STAGE,
    ),
    "sd3": (
        _TRANSFORMER,
        _CLIP_L,
        Slot("te2", "text_encoder_2", "text_encoders.clip_g.transformer."),
        Slot("te3", "text_encoder_3", _T5, is_t5=True),
        _FIRST_STAGE,
    ),
    "flux": (_TRANSFORMER, _CLIP_L, Slot("te3", "text_encoder_2", _T5, is_t5=True), _VAE),
    "chroma": (_TRANSFORMER, Slot("te3", "text_encoder", _T5, is_t5=True), _VAE),
    **dict.fromkeys(
        ("flux2", "auraflow", "pixart", "lumina2", "z-image", "wan", "qwen-image", "ltxv"), (_TRANSFORMER, _VAE)
    ),
}
# Of these families only these variants: bake has no name list of the others to be held against.
VARIANTS: dict[str, tuple[str | None, ...]] = {"wan": (None, "image-to-video"), "pixart": (None,)}
_BARE = ("transformer",)  # components that are published without a prefix where they are alone

# What original layouts call `scale` and diffusers `weight`, in these families.
_SCALED_FAMILIES = ("flux", "chroma", "flux2")
_SCALED_NORMS = (".query_norm", ".key_norm", "distilled_guidance_layer.norms.")
_RESPELT_AS_THEY_ARE = ("t5",)


def respell(tensors: Mapping[str, Shape], naming: str, layout: Layout, slot: Slot) -> dict[str, Respelt] | None:
    """A component's tensors by their names in `layout`; None if no table has them.

    tensors: name below the component's prefix -> shape. naming: as in `Component`. What the layout has no place for
    is not among the places of the result.
    """
    own: dict[str, Parameters] = {}
    for name in tensors:
        module, parameter = split_parameter(name)
        own.setdefault(module, {})[parameter] = (Place(name),)
    if naming in ("hf clip", "openclip"):
        return _respelt_clip(own, tensors, naming, slot.clip if layout == "original" else "hf clip", slot)
    modules = _in_layout(own, tensors, naming, layout)
    if modules is None:
        return None
    found: dict[str, Respelt] = {}
    for module, parameters in modules.items():
        for parameter, places in parameters.items():
            name = _tensor_name(module, parameter, places[0].tensor, naming, layout)
            shape = _shape(places, tensors)
            if naming == "vae" and parameter == "weight" and vae.is_projection(module):
                shape = (*shape[:2], 1, 1) if layout == "original" else shape[:2]
            found[name] = Respelt(places, shape)
    return found


def _in_layout(
    own: Mapping[str, Parameters], tensors: Mapping[str, Shape], naming: str, layout: Layout
) -> dict[str, Parameters] | None:
    """Modules by their names in a layout; None if no table has them."""
    if naming in ("ldm unet", "diffusers unet"):
        if (naming == "ldm unet") == (layout == "original"):
            return dict(own)
        names = unet.translate(own)
        return {names[module]: parameters for module, parameters in own.items() if module in names}
    if naming == "vae":
        return vae.in_layout(own, tensors, layout)
    if naming in TABLES:
        return tables.in_layout(TABLES[naming], own, tensors, layout)
    return dict(own) if naming in _RESPELT_AS_THEY_ARE else None


def _respelt_clip(
    own: Mapping[str, Parameters], tensors: Mapping[str, Shape], naming: str, wanted: str, slot: Slot
) -> dict[str, Respelt]:
    if naming == "hf clip" and wanted == "openclip":
        return {name: Respelt(places, _shape(places, tensors)) for name, places in clip.openclip_tensors(own).items()}
    if naming == wanted == "openclip":
        return {name: Respelt((Place(name),), shape) for name, shape in tensors.items()}
    if naming == "openclip":
        read = {path: each for path, each in own.items() if not f"{path}.".startswith(tuple(_dotted(slot.unread)))}
        modules = clip.hf_modules(read, tensors)
        named = {
            f"{path}.{parameter}": places
            for path, parameters in modules.items()
            for parameter, places in parameters.items()
            if path != "logit_scale"  # a number of CLIP's training
        }
    else:
        named = {clip.with_level(name): (Place(name),) for name in tensors}
    return {name: Respelt(places, _shape(places, tensors)) for name, places in named.items()}


def _dotted(beginnings: Iterable[str]) -> Iterable[str]:
    return (each if each.endswith(".") else f"{each}." for each in beginnings)


def _tensor_name(module: str, parameter: str, source: str, naming: str, layout: Layout) -> str:
    """What a parameter is called there. source: a tensor that it is made of, which tells if it is a bare one."""
    if parameter != "weight":
        return f"{module}.{parameter}"
    if not source.endswith((".weight", SCALE)):
        return module
    is_scale = layout == "original" and naming in _SCALED_FAMILIES and any(each in module for each in _SCALED_NORMS)
    return module + (SCALE if is_scale else ".weight")


def _shape(places: tuple[Place, ...], tensors: Mapping[str, Shape]) -> Shape:
    first = tensors[places[0].tensor]
    if places[0].transposed:
        return tuple(reversed(first))
    if len(places) == 1 and places[0].rows is None:
        return first
    return (sum(_height(place, tensors) for place in places), *first[1:])


def _height(place: Place, tensors: Mapping[str, Shape]) -> int:
    first, last = place.rows or (0, tensors[place.tensor][0])
    return last - first


def prefix_of(slot: Slot, others: bool) -> str:
    """What the names of a component begin with in a single file. others: it is not alone there."""
    return slot.prefix if others or slot.component not in _BARE else ""
