"""Stable Cascade, stages B and C: Stability's names (also ComfyUI's) <-> diffusers names."""

from __future__ import annotations

from collections.abc import Mapping

from bake.keys.places import Parameters
from bake.keys.tables import Row, Table, aliases, fused, same, within


def _attention(stack: str) -> tuple[Row, ...]:
    return within(
        *(f"{stack}.#.#.attention", f"{stack}.#.#.attention"),
        # ComfyUI splits the original's projection as diffusers does, and keeps its level "attn".
        fused("attn.in_proj", "to_q attn.to_q", "to_k attn.to_k", "to_v attn.to_v"),
        same("attn.out_proj", "to_out.0"),
    )


CASCADE = Table(
    *_attention("down_blocks"),
    *_attention("up_blocks"),
    same("clip_mapper", "clip_txt_pooled_mapper"),  # stage B; stage C has the second name in both layouts
)


def cascade_aliases(modules: Mapping[str, Parameters], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameters]:
    """The other spellings of the modules of a stage of Stable Cascade.

    PyTorch's MultiheadAttention has its projection as bare parameters, in_proj_weight and
    in_proj_bias; here they are one module like any other, and have their own names besides.
    """
    joined = _projections(modules)
    found = joined | aliases(CASCADE, {**modules, **joined}, shapes)
    bare = {
        f"{module}_{parameter}": {"weight": places}
        for module, parameters in found.items()
        if module.endswith(".in_proj") and module not in joined
        for parameter, places in parameters.items()
    }
    return found | bare


def with_projections(modules: Mapping[str, Parameters]) -> dict[str, Parameters]:
    """The modules, with the two bare parameters of each projection as the one module that they are."""
    bare = {f"{module}_{parameter}" for module, found in _projections(modules).items() for parameter in found}
    return {path: found for path, found in modules.items() if path not in bare} | _projections(modules)


def _projections(modules: Mapping[str, Parameters]) -> dict[str, Parameters]:
    joined: dict[str, Parameters] = {}
    for module, parameters in modules.items():
        projection, _, parameter = module.rpartition("_")
        if projection.endswith(".in_proj"):
            joined.setdefault(projection, {})[parameter] = parameters["weight"]
    return joined
