"""Which layers of a base are scaled fp8 that can be fused into, and what stands in the way of the others."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bake.errors import InputError
from bake.identify.quantised import ORIGINAL, Quantised, quantisation_of
from bake.io.checkpoint import Checkpoint, CheckpointFile
from bake.io.header import TensorInfo
from bake.io.jsontext import parse_object
from bake.io.tensorfile import read_tensor_bytes
from bake.keys.scaled import FORMATS, GENERATIONS, KNOWN_SETTINGS, LAYERS_KEY, WEIGHT, Generation, is_marker

_FP8 = frozenset(FORMATS.values())
_SCALES = ("F32", "F16", "BF16", "F64")
_SECOND_SCALE = ".weight_scale_2"
# What the settings call a format, or how it begins -> what it is called in messages.
_OTHERS = {"nvfp4": "NVFP4", "mxfp8": "MXFP8", "hybrid_mxfp8": "MXFP8", "int8": "int8"}


@dataclass(frozen=True, slots=True)
class ScaledLayer:
    """One layer whose stored weight counts times a scale."""

    weight: str  # full tensor names, all of them
    scale: str
    dtype: str  # of the weight
    generation: Generation
    by_row: bool  # one scale for each row, else one for all
    beside: tuple[str, ...]  # every tensor that lies beside the weight, the scale among them


@dataclass(frozen=True)
class ScaledBase:
    """The scaled fp8 layers of a base."""

    layers: dict[str, ScaledLayer] = field(default_factory=dict)  # by full weight name
    markers: frozenset[str] = frozenset()
    obstacle: Quantised | None = None  # the first layer that is scaled in a way that bake cannot undo

    @functools.cached_property
    def beside(self) -> frozenset[str]:
        """Every tensor that is no weight of the model itself."""
        return self.markers.union(*(layer.beside for layer in self.layers.values()))


def scaled_layers(checkpoint: Checkpoint) -> ScaledBase:
    """The scaled fp8 layers of `checkpoint`, by the tensors beside their weights.

    Raises InputError for settings that are not JSON.
    """
    layers: dict[str, ScaledLayer] = {}
    markers: set[str] = set()
    obstacle: Quantised | None = None
    for part in checkpoint.files:
        found = list(_layers_of(part))
        layers |= {layer.weight: layer for layer in found if isinstance(layer, ScaledLayer)}
        obstacle = obstacle or next((one for one in found if isinstance(one, Quantised)), None)
        obstacle = obstacle or _listed_obstacle(part)
        if any(isinstance(layer, ScaledLayer) for layer in found):
            markers |= {part.group + name for name in part.file.tensors if is_marker(name)}
    return ScaledBase(layers, frozenset(markers), obstacle)


def quantised(checkpoint: Checkpoint, scaled: ScaledBase) -> Quantised | None:
    """What `checkpoint` is quantised with, other than scales that bake can undo; None for ordinary weights."""
    names = (name for name, _, _ in checkpoint.tensors() if name not in scaled.beside)
    return scaled.obstacle or quantisation_of(names, checkpoint.configs.get(""))


def _layers_of(part: CheckpointFile) -> Iterator[ScaledLayer | Quantised]:
    tensors = part.file.tensors
    for name, scale in tensors.items():
        generation = next((row for row in GENERATIONS if name.endswith(row.scale)), None)
        if generation is None:
            continue
        path = name.removesuffix(generation.scale)
        weight = tensors.get(path + WEIGHT)
        if weight is None:
            continue
        settings_name = path + generation.settings if generation.settings else ""
        settings = _settings(part, settings_name) if settings_name in tensors else {}
        kind = "NVFP4" if path + _SECOND_SCALE in tensors else _kind(weight, scale, settings)
        if kind is not None:
            yield Quantised(kind, part.group + (settings_name if settings else name), ORIGINAL)
            continue
        ends = (generation.scale, generation.input_scale, generation.settings)
        beside = tuple(part.group + path + end for end in ends if end and path + end in tensors)
        by_row = any(size != 1 for size in scale.shape)
        yield ScaledLayer(part.group + path + WEIGHT, part.group + name, weight.dtype, generation, by_row, beside)


def _settings(part: CheckpointFile, name: str) -> dict[str, Any]:
    return parse_object(read_tensor_bytes(part.file, name), f"{part.file.path}: {name!r}")


def _kind(weight: TensorInfo, scale: TensorInfo, settings: Mapping[str, Any]) -> str | None:
    """What a layer is quantised with; None for fp8 with a scale of its own or one for each row."""
    told = str(settings.get("format", ""))
    for other, kind in _OTHERS.items():
        if told.startswith(other):
            return kind
    if (told and told not in FORMATS) or not KNOWN_SETTINGS.issuperset(settings):
        return f"ComfyUI-quantised ({json.dumps(dict(settings))})"
    if weight.dtype not in _FP8:
        return {"I8": "int8", "U8": "4-bit"}.get(weight.dtype, "scaled fp8")
    rows = weight.shape[0] if weight.shape else 0
    if all(size == 1 for size in scale.shape) or scale.shape in ((rows,), (rows, 1)):
        return None if scale.dtype in _SCALES else "MXFP8"
    return "MXFP8" if scale.dtype not in _SCALES else "block-scaled fp8"


def _listed_obstacle(part: CheckpointFile) -> Quantised | None:
    """The first layer that the file's metadata calls something else than scaled fp8."""
    for layer, settings in listed_layers(part.file.metadata, str(part.file.path)).items():
        told = str(settings.get("format", "")) if isinstance(settings, dict) else ""
        if told not in FORMATS or not KNOWN_SETTINGS.issuperset(settings):
            kind = next((kind for other, kind in _OTHERS.items() if told.startswith(other)), "ComfyUI-quantised")
            return Quantised(kind, f"{LAYERS_KEY}: {layer} {json.dumps(settings)}", ORIGINAL)
    return None


def listed_layers(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """layer -> its settings, as a file's metadata lists them; raises InputError if that is no such list."""
    if LAYERS_KEY not in metadata:
        return {}
    text = metadata[LAYERS_KEY].encode("utf-8", "replace")  # a pickle's texts may be none
    layers = parse_object(text, f"{path}: its metadata's {LAYERS_KEY}").get("layers")
    if not isinstance(layers, dict):
        raise InputError(f"{path}: its metadata's {LAYERS_KEY} lists no layers")
    return layers
