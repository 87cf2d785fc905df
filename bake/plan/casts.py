"""Which dtype every tensor is stored in, and what has to lie beside scaled fp8 weights."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bake.dtypes import DTYPES, OUTPUT_DTYPES
from bake.errors import Unsupported, UsageError
from bake.identify.scaled import ScaledBase, ScaledLayer, listed_layers
from bake.io.checkpoint import CheckpointFile
from bake.io.header import TensorInfo
from bake.keys.modules import Component
from bake.keys.scaled import LAYERS_KEY, NEW, OLD, WEIGHT, WRITTEN, Generation
from bake.plan.match import Matching
from bake.plan.model import Rescaling
from bake.plan.recipe import EVERY, ROUNDINGS, Recipe, is_text_encoder
from bake.plan.tokens import Growth

# The weights inside numbered blocks. What lies before and after these, the first and last layers and the embedders
# of time, text and size, is kept as it is: so do the fp8 files of ComfyUI's and Kijai's, and musubi-tuner.
_IN_A_BLOCK = re.compile(r"(?:^|\.)\d+\.(?:\d+\.)*[A-Za-z_].*\.(?:weight|in_proj_weight)$")
# Words of module names inside blocks that are kept all the same: norms, embeddings and tables of positions.
_KEPT = ("norm", "ln_", "emb", "bias", "distilled_guidance")
_DENOISERS = ("unet", "transformer", "model")  # how their names begin; "transformer_2", too
_CLIPS = ("hf clip", "openclip")  # namings of text encoders for which not every ComfyUI looks for scales
_FULL_PRECISION = "full_precision_matrix_mult"  # the layer's input is not rounded to fp8: it has no scale of its own
_MARKED = "\0\0"  # a marker of two elements says the same for all layers of a component


def check_casts(recipe: Recipe, components: Sequence[Component]) -> None:
    """Raise UsageError for dtypes, components and roundings that there are none of."""
    present = [component.name for component in components]
    for name, dtype in recipe.dtypes.items():
        if dtype != "keep" and dtype not in OUTPUT_DTYPES:
            raise UsageError(f"--dtype {dtype}: no such dtype; there are keep, {', '.join(OUTPUT_DTYPES)}")
        if name not in (EVERY, *present) and not (name == "te" and any(map(is_text_encoder, present))):
            raise UsageError(f"--dtype {name}={dtype}: the base has no such component; it has {', '.join(present)}")
    if recipe.rounding not in ROUNDINGS:
        raise UsageError(f"--rounding {recipe.rounding}: there are {', '.join(ROUNDINGS)}")


class Beside(NamedTuple):
    """One tensor of the output that lies beside scaled weights and is not copied from the base."""

    name: str  # as in the file
    dtype: str
    shape: tuple[int, ...]
    like: str  # full name of the weight it belongs to
    scale_of: str | None = None
    content: str | None = None


@dataclass(frozen=True)
class Casting:
    """Decides about dtypes and scales, one tensor of the base at a time."""

    recipe: Recipe
    components: Sequence[Component]
    scaled: ScaledBase
    matching: Matching
    growth: Growth

    def component_of(self, full: str) -> str:
        """The component that a tensor belongs to; "" for none. The longest prefix owns a name."""
        owner = self._owner(full)
        return owner.name if owner is not None else ""

    @functools.cached_property
    def _owners(self) -> list[Component]:
        return sorted(self.components, key=lambda component: -len(component.prefix))

    def _owner(self, full: str) -> Component | None:
        return next((component for component in self._owners if full.startswith(component.prefix)), None)

    def dtype(self, full: str, info: TensorInfo) -> str:
        """The stored dtype of an output tensor: integers, and markers of one element or none, stay as they are."""
        asked = self.recipe.dtype_for(self.component_of(full))
        if asked == "keep" or not DTYPES[info.dtype].computable:
            return info.dtype
        tag = OUTPUT_DTYPES[asked]
        is_number = math.prod(info.shape) > 1 or full in self.scaled.layers
        return tag if is_number and (DTYPES[tag].bits > 8 or self._is_narrowed(full, info, asked)) else info.dtype

    def _is_narrowed(self, full: str, info: TensorInfo, asked: str) -> bool:
        """True if fp8 is for this tensor: a matrix or convolution inside a block, or one that is scaled fp8 already."""
        if full in self.scaled.layers:
            return True
        owner = self._owner(full)
        if owner is None or not (self._is_named(owner) or _takes_fp8(owner, asked)):
            return False
        inside = full[len(owner.prefix) :].lower()
        if math.prod(info.shape) <= 1:
            return False
        fits = len(info.shape) == 2 and inside.endswith(WEIGHT) if asked in WRITTEN else len(info.shape) >= 2
        return fits and _IN_A_BLOCK.search(inside) is not None and not any(word in inside for word in _KEPT)

    def _is_named(self, owner: Component) -> bool:
        """True if --dtype names the component, not only all of them."""
        return owner.name in self.recipe.dtypes or (is_text_encoder(owner.name) and "te" in self.recipe.dtypes)

    def _stays(self, layer: ScaledLayer) -> bool:
        """True if a scaled layer of the base stays one of the same kind."""
        asked = self.recipe.dtype_for(self.component_of(layer.weight))
        return asked == "keep" or (WRITTEN.get(asked), OUTPUT_DTYPES[asked]) == (layer.generation, layer.dtype)

    def _is_touched(self, full: str) -> bool:
        return full in self.matching.changed or full in self.matching.padded or full in self.growth.rows

    def generation(self, full: str, info: TensorInfo) -> Generation | None:
        """How the layer with this weight is scaled in the output; None if it is not."""
        layer = self.scaled.layers.get(full)
        if layer is not None and self._stays(layer):
            return layer.generation
        asked = self.recipe.dtype_for(self.component_of(full))
        return WRITTEN[asked] if asked in WRITTEN and self._is_narrowed(full, info, asked) else None

    def rescaling(self, full: str, info: TensorInfo) -> Rescaling | None:
        """The new scale of a weight; None if it has none, or keeps the one it has with every byte."""
        generation = self.generation(full, info)
        if generation is None or not full.endswith(WEIGHT):
            return None
        layer = self.scaled.layers.get(full)
        stays = layer is not None and self._stays(layer)
        if stays and not self._is_touched(full):
            return None
        self._check(full, layer)
        by_row = layer is not None and stays and layer.by_row
        return Rescaling(full.removesuffix(WEIGHT) + generation.scale, by_row)

    def source_scale(self, full: str) -> str | None:
        """The tensor that the source of another counts times; None for plain values and for what is copied."""
        layer = self.scaled.layers.get(full)
        if layer is None or full in self.matching.replaced or (self._stays(layer) and not self._is_touched(full)):
            return None
        self._check(full, layer)
        return layer.scale

    def _check(self, full: str, layer: ScaledLayer | None) -> None:
        grows = full in self.growth.rows or (layer is not None and full in self.matching.padded)
        if grows or (layer is not None and full in self.matching.added.values()):
            raise Unsupported(
                f"{full} is scaled fp8, and would have to grow or to be stored twice: fuse into the 16-bit original.",
                tensor=full,
            )

    def dropped(self, part: CheckpointFile) -> set[str]:
        """The base's tensors (as in the file) that are not in the output, or are there with new content."""
        gone: set[str] = set()
        for full, layer in self.scaled.layers.items():
            if full.startswith(part.group) and full.removeprefix(part.group) in part.file.tensors:
                if not self._stays(layer):
                    gone.update(layer.beside)
                elif self._is_touched(full):
                    gone.add(layer.scale)
        for marker in self.scaled.markers:
            owner = marker.removesuffix(OLD.marker or "")
            under = [layer for layer in self.scaled.layers.values() if layer.weight.startswith(owner)]
            if not any(layer.generation is OLD and self._stays(layer) for layer in under):
                gone.add(marker)
        return {name.removeprefix(part.group) for name in gone if name.startswith(part.group)}

    def beside(self, part: CheckpointFile, names: Iterable[str]) -> Iterator[Beside]:
        """What is written anew beside the weights among the tensors `names` of one file."""
        marked: dict[str, Beside] = {}
        for name in names:
            full = part.group + name
            info = part.file.tensors.get(name)
            rescaling = self.rescaling(full, info) if info is not None else None
            if info is None or rescaling is None:
                continue
            layer = self.scaled.layers.get(full)
            stays = layer is not None and self._stays(layer)
            scale = part.file.tensors[layer.scale.removeprefix(part.group)].shape if layer is not None and stays else ()
            yield Beside(rescaling.name.removeprefix(part.group), "F32", scale, full, scale_of=name)
            if stays:
                continue
            tag = self.dtype(full, info)
            if self.generation(full, info) is NEW:
                settings = json.dumps({"format": DTYPES[tag].torch, _FULL_PRECISION: True})
                shape = (len(settings.encode()),)
                yield Beside(name.removesuffix(WEIGHT) + str(NEW.settings), "U8", shape, full, content=settings)
            else:
                marker = self._marker(full)
                if marker not in self.scaled.markers or marker.removeprefix(part.group) in self.dropped(part):
                    marked.setdefault(marker, Beside(marker.removeprefix(part.group), tag, (2,), full, content=_MARKED))
        yield from marked.values()

    def _marker(self, full: str) -> str:
        owner = self._owner(full)
        return (owner.prefix if owner is not None else "") + str(OLD.marker)

    def metadata(self, part: CheckpointFile) -> dict[str, str]:
        """The file's metadata, in which only layers that stay scaled are listed."""
        listed = listed_layers(part.file.metadata, str(part.file.path))
        gone: set[str] = set()  # some tools list layers without the component's prefix
        for layer in self.scaled.layers.values():
            owner = self._owner(layer.weight)
            if owner is not None and not self._stays(layer):
                path = layer.weight.removesuffix(WEIGHT)
                gone |= {path, path.removeprefix(part.group), path.removeprefix(owner.prefix)}
        kept = {name: settings for name, settings in listed.items() if name not in gone}
        if len(kept) == len(listed):
            return dict(part.file.metadata)
        rest = {key: text for key, text in part.file.metadata.items() if key != LAYERS_KEY}
        content: dict[str, Any] = {**json.loads(part.file.metadata[LAYERS_KEY]), "layers": kept}
        return rest | ({LAYERS_KEY: json.dumps(content)} if kept else {})


def _takes_fp8(owner: Component, asked: str) -> bool:
    """True if a component is usually stored in the fp8 dtype that was asked for."""
    if is_text_encoder(owner.name):
        return asked not in WRITTEN or owner.naming not in _CLIPS
    return owner.name.startswith(_DENOISERS)


def config_dtype(recipe: Recipe, components: Sequence[Component], group: str) -> str | None:
    """What the config.json of `group` is to call its dtype; None if it says nothing new.

    fp8 weights are among others in the dtype that the configuration names already.
    """
    names = [component.name for component in components if component.prefix == group]
    asked = recipe.dtype_for(names[0] if names else "")
    if asked == "keep" or DTYPES[OUTPUT_DTYPES[asked]].bits == 8:
        return None
    return DTYPES[OUTPUT_DTYPES[asked]].torch
