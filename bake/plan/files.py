"""The files of the output: which tensors they hold and where, and what lies beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from bake.dtypes import DTYPES, OUTPUT_DTYPES
from bake.identify.checkpoint import BaseIdentity
from bake.io.checkpoint import Checkpoint, CheckpointFile, ShardIndex
from bake.io.header import TensorInfo, lay_out
from bake.keys.modules import Component
from bake.plan.match import Matching
from bake.plan.model import FilePlan, SideFile, Stored, TensorPlan
from bake.plan.recipe import Recipe
from bake.plan.record import carried_metadata, history_of
from bake.plan.tokens import Growth


def plan_files(
    recipe: Recipe, checkpoint: Checkpoint, identity: BaseIdentity, matching: Matching, growth: Growth
) -> tuple[FilePlan, ...]:
    """One output file for each file of the base, with the same tensors in the same order where it aligns."""
    # By falling prefix length, so that the first match owns a name.
    owners = sorted(identity.components, key=lambda component: -len(component.prefix))
    planned = [
        _plan_tensors(recipe, place, part, owners, matching, growth) for place, part in enumerate(checkpoint.files)
    ]
    # A folder carries the record of its inputs once: in the first file that was changed.
    recorded = next((place for place, tensors in enumerate(planned) if any(t.terms or t.appended for t in tensors)), 0)
    return tuple(
        FilePlan(
            relative="" if checkpoint.packaging == "file" else part.relative,
            metadata=carried_metadata(part.file.metadata, identity, recipe.metadata),
            is_recorded=place == recorded,
            history=history_of(part.file.metadata) if recipe.record and place == recorded else {},
            tensors=tensors,
        )
        for place, (part, tensors) in enumerate(zip(checkpoint.files, planned, strict=True))
    )


def _plan_tensors(
    recipe: Recipe,
    place: int,
    part: CheckpointFile,
    owners: Sequence[Component],
    matching: Matching,
    growth: Growth,
) -> tuple[TensorPlan, ...]:
    stored = part.file.tensors
    # What is added lies in the file of the tensor whose like it is.
    likes = {name: name for name in stored}
    likes |= {
        name: like.removeprefix(part.group)
        for name, like in matching.added.items()
        if like.startswith(part.group) and like.removeprefix(part.group) in stored
    }
    sources = {name: _source(place, part.group + name, like, stored[like], matching) for name, like in likes.items()}
    placed = lay_out(
        (
            name,
            _output_dtype(recipe, stored[like]),
            _shape(part.group + name, stored[like], sources[name], growth, matching),
        )
        for name, like in likes.items()
    )
    tensors = []
    for name, info in placed.items():
        full = part.group + name
        owner = next((component.name for component in owners if full.startswith(component.prefix)), "")
        tensors.append(
            TensorPlan(
                name=name,
                shape=info.shape,
                dtype=info.dtype,
                span=(info.begin, info.end),
                source=sources[name],
                component=owner,
                terms=tuple(matching.terms.get(full, ())),
                appended=growth.rows.get(full, ()),
                replaced=full in matching.replaced,
                stacked=full in matching.stacks,
            )
        )
    return tuple(tensors)


def _source(place: int, full: str, like: str, info: TensorInfo, matching: Matching) -> Stored:
    """Where the values come from that the terms are applied to: the base, or what an adapter stores instead."""
    return matching.replaced.get(full) or Stored(place, like, info.dtype, info.shape, (info.begin, info.end))


def _shape(full: str, info: TensorInfo, source: Stored, growth: Growth, matching: Matching) -> tuple[int, ...]:
    if full in matching.padded:
        return matching.padded[full]
    if math.prod(source.shape) != math.prod(info.shape):  # a vocabulary that grew
        return source.shape
    return growth.appended(full, info)[0]


def _output_dtype(recipe: Recipe, info: TensorInfo) -> str:
    """The stored dtype of an output tensor: integers, and markers of one element or none, stay as they are."""
    if recipe.dtype == "keep" or not DTYPES[info.dtype].computable or math.prod(info.shape) <= 1:
        return info.dtype
    return OUTPUT_DTYPES[recipe.dtype]


def plan_side_files(
    recipe: Recipe, checkpoint: Checkpoint, growth: Growth, matching: Matching, planned: Sequence[FilePlan]
) -> tuple[SideFile, ...]:
    """Everything else of the output folder; the shard indexes come last, when their shards exist."""
    files = []
    for relative in sorted({*checkpoint.side_files, *growth.contents, *matching.side_sources}):
        content = growth.contents.get(relative)
        group = relative.removesuffix("config.json")
        if relative.endswith("config.json") and group in checkpoint.configs:
            config = checkpoint.configs[group]
            widened = _widened_inputs(config, matching.padded.get(f"{group}x_embedder.weight"))
            changed = {**widened, **matching.configs.get(group, {}), **growth.configs.get(group, {})}
            content = _updated_config(config, changed, recipe.dtype)
        source = matching.side_sources.get(relative, checkpoint.root / relative)
        files.append(SideFile(relative, source if content is None else None, content))
    return (*files, *(_updated_index(index, planned) for index in checkpoint.indexes))


def _updated_index(index: ShardIndex, planned: Sequence[FilePlan]) -> SideFile:
    """The base's index with what is added and the size of what is written."""
    folder = index.relative.rpartition("/")[0]
    mine = [file for file in planned if file.relative.rpartition("/")[0] == folder]
    total = sum(tensor.span[1] - tensor.span[0] for file in mine for tensor in file.tensors)
    earlier = index.content.get("metadata")
    metadata = {**(earlier if isinstance(earlier, dict) else {}), "total_size": total}
    weight_map = dict(index.content["weight_map"])
    for file in mine:
        weight_map.update((tensor.name, file.relative.rpartition("/")[2]) for tensor in file.tensors)
    return SideFile(index.relative, None, _json({**index.content, "metadata": metadata, "weight_map": weight_map}))


def _widened_inputs(config: dict[str, Any], shape: tuple[int, ...] | None) -> dict[str, Any]:
    """What a control LoRA of Flux changes in the configuration: it reads more channels, and writes as many as before.

    shape: of the widened input layer, None if there is none. Source: diffusers models/transformers/transformer_flux.py.
    """
    if shape is None or "in_channels" not in config:
        return {}
    return {"in_channels": shape[1], "out_channels": config.get("out_channels") or config["in_channels"]}


def _updated_config(config: dict[str, Any], grown: dict[str, Any], dtype: str) -> str | None:
    """config.json with what the adapters change and the dtype that is written; None if it stays as it is."""
    updated = {**config, **grown}
    if dtype != "keep":
        name = DTYPES[OUTPUT_DTYPES[dtype]].torch
        updated |= {key: name for key in ("torch_dtype", "dtype") if key in config}
    return _json(updated) if updated != config else None


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
