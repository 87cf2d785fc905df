"""Scaled fp8 layers, in the two ways that ComfyUI names what lies beside their weights.

The weight is `W = stored * scale`, with one scale for the layer or one for each of its rows.
Source: ComfyUI comfy/ops.py (scaled_fp8_ops, 2025) and comfy/utils.py (convert_old_quants, since then).
"""

from __future__ import annotations

from typing import NamedTuple

WEIGHT = ".weight"


class Generation(NamedTuple):
    """How one generation of files names what lies beside a layer's weight."""

    scale: str
    input_scale: str  # of the activations; not needed to know the weights
    settings: str | None  # JSON in U8, for each layer
    marker: str | None  # tensor that says once for a component that its layers are scaled


OLD = Generation(".scale_weight", ".scale_input", None, "scaled_fp8")
NEW = Generation(".weight_scale", ".input_scale", ".comfy_quant", None)
GENERATIONS = (NEW, OLD)
LAYERS_KEY = "_quantization_metadata"  # of a file's metadata: the settings of all layers of the new generation

# What --dtype calls them -> how the layers are written.
WRITTEN = {"fp8_e4m3fn_scaled": NEW, "fp8_e5m2_scaled": NEW, "fp8_e4m3fn_scaled_old": OLD}

# "format" in the settings -> the dtype that the weights are stored in. Source: ComfyUI comfy/quant_ops.py QUANT_ALGOS;
# the rowwise name is that of silveroxides' convert_to_quant.
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e4m3fn_rowwise": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
# Other keys of the settings say something about the weights that bake does not know.
KNOWN_SETTINGS = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape"}


def side_tensors(weight: str, generation: Generation) -> tuple[str, ...]:
    """The names that may lie beside the layer with this weight: scale, input scale, settings."""
    layer = weight.removesuffix(WEIGHT)
    return tuple(layer + end for end in (generation.scale, generation.input_scale, generation.settings) if end)


def is_marker(name: str) -> bool:
    """True for the tensor that marks a component as scaled."""
    return OLD.marker is not None and name.rpartition(".")[2] == OLD.marker
