"""Every spelling of every module of a base, so that an adapter's names are looked up, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from bake.keys import cascade, clip, hf, t5, tables, unet, vae
from bake.keys.auraflow import AURAFLOW
from bake.keys.dialects import Address, flatten
from bake.keys.flux import FLUX, FLUX2
from bake.keys.hunyuan import HUNYUAN
from bake.keys.ltx import LTX_VIDEO
from bake.keys.lumina import LUMINA2, Z_IMAGE
from bake.keys.mochi import MOCHI
from bake.keys.pixart import PIXART, SANA
from bake.keys.places import SCALE, Parameters, Place, split_parameter
from bake.keys.qwen import QWEN_IMAGE
from bake.keys.sd3 import SD3
from bake.keys.wan import WAN

Shape = tuple[int, ...]
Aliases = Callable[[Mapping[str, Parameters], Mapping[str, Shape]], dict[str, Parameters]]

# Families whose two layouts are the two sides of one table.
TABLES: dict[str, tables.Table] = {
    "sd3": SD3,
    "flux": FLUX,
    "chroma": FLUX,
    "flux2": FLUX2,
    "auraflow": AURAFLOW,
    "pixart": PIXART,
    "sana": SANA,
    "lumina2": LUMINA2,
    "z-image": Z_IMAGE,
    "hunyuan-video": HUNYUAN,
    "wan": WAN,
    "qwen-image": QWEN_IMAGE,
    "ltxv": LTX_VIDEO,
    "mochi": MOCHI,
}

# How a component's tensors are named -> the function that knows the other spellings of its modules.
NAMINGS: dict[str, Aliases] = {
    "ldm unet": unet.aliases,
    "diffusers unet": unet.aliases,
    "stable-cascade": cascade.cascade_aliases,
    **{family: partial(tables.aliases, table) for family, table in TABLES.items()},
    "hf clip": clip.hf_aliases,
    "openclip": clip.openclip_aliases,
    "t5": t5.aliases,
    "vae": vae.aliases,
    "language model": hf.encoder_aliases,
    "hf": hf.aliases,
    "plain": lambda modules, shapes: {},
}


@dataclass(frozen=True, slots=True)
class Component:
    """One model inside a base."""

    name: str  # "unet", "transformer", "te1", "te2", "te3", "vae", "model"
    prefix: str  # what its tensor names begin with
    naming: str  # key of NAMINGS
    also: tuple[str, ...] = ()  # further names it answers to, where no component of the base has them

    def answers(self, names: tuple[str, ...]) -> bool:
        """True if an address for one of `names` may mean this component."""
        return self.name in names or any(name in names for name in self.also)


class Found(NamedTuple):
    """What an address resolved to."""

    component: str
    module: str  # the spelling that matched
    parameters: Parameters


class ModuleIndex:
    """All spellings of the modules of all components of one base."""

    def __init__(self, components: tuple[Component, ...], shapes: Mapping[str, Shape]) -> None:
        """`shapes`: full tensor name -> shape, of the whole base."""
        self.components = components
        self.own: dict[str, dict[str, Parameters]] = {}  # component -> module as the base spells it -> its parameters
        self.spellings: dict[str, dict[str, Parameters]] = {}
        for component, names in split_by_component(components, shapes):
            own: dict[str, Parameters] = {}
            for name in names:
                module, parameter = split_parameter(name[len(component.prefix) :])
                if name.endswith(SCALE) and f"{component.prefix}{module}.weight" in shapes:
                    module = name[len(component.prefix) :]  # a scale beside a weight is another thing
                own.setdefault(module, {})[parameter] = (Place(name),)
            self.own[component.name] = own
            self.spellings[component.name] = _attention(own) | own | NAMINGS[component.naming](own, shapes)
        self._flat: dict[str, dict[str, str]] = {}

    def _flat_names(self, component: str) -> dict[str, str]:
        """flat spelling -> dotted spelling, made when a flat dialect first asks."""
        if component not in self._flat:
            flat: dict[str, str] = {}
            spellings = self.spellings[component]
            for path in spellings:
                other = flat.setdefault(flatten(path), path)
                if spellings[other] != spellings[path]:
                    raise AssertionError(f"{component}: {flatten(path)} means both {other} and {path}")
            self._flat[component] = flat
        return self._flat[component]

    def find(self, address: Address) -> Found | None:
        """The module that `address` names, or None. Numbers are resolved by `bake.keys.numbered`."""
        for name in self.names(address):
            path: str | None = address.path
            if address.style == "flat":
                path = self._flat_names(name).get(address.path)
            if path is not None and path in self.spellings[name]:
                return Found(name, path, self.spellings[name][path])
        if address.style == "dotted" and not address.components:
            return self._find_by_full_name(address.path)
        return None

    def names(self, address: Address) -> Iterator[str]:
        """The components of this base in which `address` looks."""
        for component in self.components:
            if not address.components or component.answers(address.components):
                yield component.name

    def _find_by_full_name(self, path: str) -> Found | None:
        for component in self.components:
            below = path[len(component.prefix) :]
            if component.prefix and path.startswith(component.prefix) and below in self.spellings[component.name]:
                return Found(component.name, below, self.spellings[component.name][below])
        return None


def _attention(modules: Mapping[str, Parameters]) -> dict[str, Parameters]:
    """PyTorch's MultiheadAttention as the module it is, with its fused projection, a bare parameter, as the weight.

    Source: PEFT tuners/lora/layer.py MultiheadAttention, whose factors stand under the module's own name.
    """
    ends = (("in_proj_weight", "weight"), ("in_proj_bias", "bias"))
    found: dict[str, Parameters] = {}
    for path, parameters in modules.items():
        for end, parameter in ends:
            if path.endswith("." + end):
                found.setdefault(path[: -len(end) - 1], {})[parameter] = parameters["weight"]
    return found


def split_by_component(components: Sequence[Component], names: Iterable[str]) -> Iterator[tuple[Component, list[str]]]:
    """Each component with its tensor names; a name belongs to the longest prefix it begins with."""
    ordered = sorted(components, key=lambda component: -len(component.prefix))
    owned: dict[str, list[str]] = {component.name: [] for component in components}
    for name in names:
        owner = next((component for component in ordered if name.startswith(component.prefix)), None)
        if owner is not None:
            owned[owner.name].append(name)
    for component in components:
        yield component, owned[component.name]
