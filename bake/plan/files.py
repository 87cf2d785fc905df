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


def plan_files(
    recipe: Recipe, checkpoint: Checkpoint, identity: BaseIdentity, matching: Matching
) -> tuple[FilePlan, ...]:
    """One output file for each file of the base, with the same tensors in the same order where it aligns."""
    # By falling prefix length, so that the first match owns a name.
    owners = sorted(identity.components, key=lambda component: -len(component.prefix))
    planned = [_plan_tensors(recipe, place, part, owners, matching) for place, part in enumerate(checkpoint.files)]
    # A folder carries the record of its inputs once: in the first file that was changed.
    recorded = next((place for place, tensors in enumerate(planned) if any(t.terms for t in tensors)), 0)
    return tuple(
        FilePlan(
            relative="" if checkpoint.packaging == "file" else part.relative,
            metadata=carried_metadata(part.file.metadata, identity.family, identity.layout, recipe.metadata),
            is_recorded=place == recorded,
            history=history_of(part.file.metadata) if recipe.record and place == recorded else {},
            tensors=tensors,
        )
        for place, (part, tensors) in enumerate(zip(checkpoint.files, planned, strict=True))
    )


def _plan_tensors(
    recipe: Recipe, place: int, part: CheckpointFile, owners: Sequence[Component], matching: Matching
) -> tuple[TensorPlan, ...]:
    stored = part.file.tensors
    placed = lay_out((name, _output_dtype(recipe, info), info.shape) for name, info in stored.items())
    tensors = []
    for name, info in placed.items():
        full = part.group + name
        source = Stored(place, name, stored[name].dtype, info.shape, (stored[name].begin, stored[name].end))
        owner = next((component.name for component in owners if full.startswith(component.prefix)), "")
        terms = tuple(matching.terms.get(full, ()))
        tensors.append(TensorPlan(name, info.shape, info.dtype, (info.begin, info.end), source, owner, terms))
    return tuple(tensors)


def _output_dtype(recipe: Recipe, info: TensorInfo) -> str:
    """The stored dtype of an output tensor: integers, and markers of one element or none, stay as they are."""
    if recipe.dtype == "keep" or not DTYPES[info.dtype].computable or math.prod(info.shape) <= 1:
        return info.dtype
    return OUTPUT_DTYPES[recipe.dtype]


def plan_side_files(recipe: Recipe, checkpoint: Checkpoint) -> tuple[SideFile, ...]:
    """Everything else of the output folder; the shard indexes come last, when their shards exist."""
    files = []
    for relative in checkpoint.side_files:
        content: str | None = None
        group = relative.removesuffix("config.json")
        if recipe.dtype != "keep" and relative.endswith("config.json") and group in checkpoint.configs:
            content = _with_dtype(checkpoint.configs[group], recipe.dtype)
        files.append(SideFile(relative, checkpoint.root / relative if content is None else None, content))
    return (*files, *(_updated_index(recipe, checkpoint, index) for index in checkpoint.indexes))


def _updated_index(recipe: Recipe, checkpoint: Checkpoint, index: ShardIndex) -> SideFile:
    """The base's index with the size of what is written."""
    folder = index.relative.rpartition("/")[0]
    total = sum(
        info.nbytes * DTYPES[_output_dtype(recipe, info)].bits // DTYPES[info.dtype].bits
        for part in checkpoint.files
        if part.relative.rpartition("/")[0] == folder
        for info in part.file.tensors.values()
    )
    earlier = index.content.get("metadata")
    metadata = {**(earlier if isinstance(earlier, dict) else {}), "total_size": total}
    return SideFile(index.relative, None, _json({**index.content, "metadata": metadata}))


def _with_dtype(config: dict[str, Any], dtype: str) -> str | None:
    """config.json with its dtype field set to what is written; None if it has no such field."""
    fields = [field for field in ("torch_dtype", "dtype") if field in config]
    name = DTYPES[OUTPUT_DTYPES[dtype]].torch
    return _json({**config, **dict.fromkeys(fields, name)}) if fields else None


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
