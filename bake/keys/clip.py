"""CLIP text encoders: Hugging Face names, and OpenCLIP names with fused q, k and v.

Adapters use Hugging Face names whatever the base uses. transformers 5 dropped the level
`text_model.`, so every name exists with and without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from bake.keys.places import Parameters, Place

Shape = tuple[int, ...]
_LEVEL = "text_model."

# diffusers before 0.26 named the projections of a text encoder like those of a UNet.
_OLD_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

# OpenCLIP, inside a resblock -> Hugging Face, inside a layer
_RESBLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
_OUTSIDE = {
    "ln_final": "final_layer_norm",
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding",
}
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # in the order of OpenCLIP's rows
_FUSED = {"in_proj_weight": "weight", "in_proj_bias": "bias"}


def hf_aliases(modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> dict[str, Parameters]:
    """The other spellings of a Hugging Face text encoder's modules."""
    found = dict(_with_and_without_level(modules))
    found.update(_old_projections({**modules, **found}))
    return {alias: parameters for alias, parameters in found.items() if alias not in modules}


def openclip_aliases(modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> dict[str, Parameters]:
    """The Hugging Face spellings of an OpenCLIP text encoder's modules; q, k and v are row thirds."""
    found = _in_hf_names(modules, shapes)
    found.update(_with_and_without_level(found))
    found.update(_old_projections(found))
    return found


def hf_modules(modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> dict[str, Parameters]:
    """The modules of an OpenCLIP text encoder by the one name that Hugging Face's CLIP has for each.

    What it has none for, such as `logit_scale`, keeps its own.
    """
    found = _in_hf_names(modules, shapes)
    covered = {place.tensor for parameters in found.values() for places in parameters.values() for place in places}
    named = {path if path == "text_projection" else _LEVEL + path: parameters for path, parameters in found.items()}
    return named | {
        module: parameters
        for module, parameters in modules.items()
        if not any(place.tensor in covered for places in parameters.values() for place in places)
    }


def openclip_tensors(modules: Mapping[str, Parameters]) -> dict[str, tuple[Place, ...]]:
    """The tensors of a Hugging Face text encoder by the names that OpenCLIP has for them: q, k and v in one.

    What it has none for, such as `position_ids`, is left out.
    """
    found: dict[str, tuple[Place, ...]] = {}
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    resblock = {theirs: ours for ours, theirs in _RESBLOCK.items()}
    fused: dict[str, dict[str, Place]] = {}
    for path, parameters in modules.items():
        module = path.removeprefix(_LEVEL)
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", module)
        for parameter, (place, *_) in parameters.items():
            if module == "text_projection":
                found[module] = (place._replace(transposed=True),)
            elif module == "embeddings.position_embedding":
                found[outside[module]] = (place,)  # a bare parameter
            elif module in outside:
                found[f"{outside[module]}.{parameter}"] = (place,)
            elif module == "logit_scale":
                found[module] = (place,)
            elif layer is not None and layer[2] in resblock:
                found[f"transformer.resblocks.{layer[1]}.{resblock[layer[2]]}.{parameter}"] = (place,)
            elif layer is not None and layer[2] in _PROJECTIONS:
                joined = f"transformer.resblocks.{layer[1]}.attn.in_proj_{parameter}"
                fused.setdefault(joined, {})[layer[2]] = place
    whole = {name: parts for name, parts in fused.items() if len(parts) == len(_PROJECTIONS)}
    return found | {name: tuple(parts[each] for each in _PROJECTIONS) for name, parts in whole.items()}


def with_level(path: str) -> str:
    """The module of a Hugging Face text encoder as all but transformers 5 call it: below `text_model.`."""
    return path if path.startswith((_LEVEL, "text_projection", "logit_scale")) else _LEVEL + path


def _in_hf_names(modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> dict[str, Parameters]:
    """The modules in Hugging Face's names, without the level `text_model.`."""
    found: dict[str, Parameters] = {}
    for module, parameters in modules.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", module)
        if module in _OUTSIDE:
            found[_OUTSIDE[module]] = parameters
        elif module == "text_projection":  # a bare parameter, stored (in, out)
            found[module] = {"weight": (parameters["weight"][0]._replace(transposed=True),)}
        elif block is not None:
            layer = f"encoder.layers.{block[1]}"
            head, _, fused = block[2].rpartition(".")
            if fused in _FUSED and head == "attn":
                (place,) = parameters["weight"]
                third = shapes[place.tensor][0] // 3
                for position, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                    rows = (position * third, (position + 1) * third)
                    target = found.setdefault(f"{layer}.self_attn.{projection}", {})
                    target[_FUSED[fused]] = (Place(place.tensor, rows),)
            elif block[2] in _RESBLOCK:
                found[f"{layer}.{_RESBLOCK[block[2]]}"] = parameters
    return found


def _with_and_without_level(modules: Mapping[str, Parameters]) -> dict[str, Parameters]:
    return {
        path.removeprefix(_LEVEL) if path.startswith(_LEVEL) else _LEVEL + path: parameters
        for path, parameters in modules.items()
    }


def _old_projections(modules: Mapping[str, Parameters]) -> dict[str, Parameters]:
    found = {}
    for path, parameters in modules.items():
        attention, _, leaf = path.rpartition(".")
        if attention.endswith(".self_attn") and leaf in _OLD_PROJECTIONS:
            found[f"{attention}.{_OLD_PROJECTIONS[leaf]}"] = parameters
    return found
