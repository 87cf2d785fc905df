"""The files of the output: which tensors they hold and where, and what lies beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bake.io.checkpoint import Checkpoint, CheckpointFile, ShardIndex
from bake.io.header import TensorInfo, lay_out
from bake.plan.arranged import Arranged, Origin, passthrough
from bake.plan.casts import Casting, config_dtype
from bake.plan.composed import is_in_place, share_of
from bake.plan.match import Matching
from bake.plan.model import FilePlan, MergeStep, Share, SideFile, Stored, TensorPlan
from bake.plan.recipe import Recipe
from bake.plan.record import carried_metadata, history_of
from bake.plan.tokens import Growth


def plan_files(
    recipe: Recipe, base: Arranged, matching: Matching, growth: Growth, casting: Casting
) -> tuple[FilePlan, ...]:
    """One output file for each file of the base, with the same tensors in the same order where it aligns."""
    checkpoint = base.checkpoint
    planned = [
        _plan_tensors(recipe, base, place, part, matching, growth, casting)
        for place, part in enumerate(checkpoint.files)
    ]
    # A folder carries the record of its inputs once: in the first file that was changed.
    changed = [any(each.terms or each.appended or each.merge for each in tensors) for tensors in planned]
    recorded = changed.index(True) if any(changed) else 0
    return tuple(
        FilePlan(
            relative="" if checkpoint.packaging == "file" else part.relative,
            metadata=carried_metadata(casting.metadata(part), base.identity, recipe.metadata),
            is_recorded=place == recorded,
            history=history_of(part.file.metadata) if recipe.record and place == recorded else {},
            tensors=tensors,
        )
        for place, (part, tensors) in enumerate(zip(checkpoint.files, planned, strict=True))
    )


def _plan_tensors(
    recipe: Recipe,
    base: Arranged,
    place: int,
    part: CheckpointFile,
    matching: Matching,
    growth: Growth,
    casting: Casting,
) -> tuple[TensorPlan, ...]:
    stored = part.file.tensors
    # What is added lies in the file of the tensor whose like it is.
    likes = {name: name for name in stored}
    likes |= {
        name: like.removeprefix(part.group)
        for name, like in matching.added.items()
        if like.startswith(part.group) and like.removeprefix(part.group) in stored
    }
    # The scales of quantised weights, and what says so, are the output's own.
    beside = {each.name: each for each in casting.beside(part, likes)}
    for name in casting.dropped(part) - beside.keys():
        del likes[name]
    likes |= {name: each.like.removeprefix(part.group) for name, each in beside.items()}
    origins = {
        name: Share((matching.replaced[part.group + name],))
        if part.group + name in matching.replaced
        else base.origin(part, place, like)
        for name, like in likes.items()
    }
    sources = {name: _source(origins[name], part, place, like) for name, like in likes.items()}
    placed = lay_out(
        (name, beside[name].dtype, beside[name].shape)
        if name in beside
        else (
            name,
            casting.dtype(part.group + name, stored[like]),
            _shape(part.group + name, stored[like], sources[name], growth, matching),
        )
        for name, like in likes.items()
    )
    tensors = []
    for name, info in placed.items():
        full = part.group + name
        where: dict[str, Any] = {
            "name": name,
            "shape": info.shape,
            "dtype": info.dtype,
            "span": (info.begin, info.end),
            "source": sources[name],
            "component": casting.component_of(full),
        }
        if name in beside:
            tensors.append(TensorPlan(**where, scale_of=beside[name].scale_of, content=beside[name].content))
            continue
        origin, scale = origins[name], casting.source_scale(full)
        planned = TensorPlan(
            **where,
            merge=origin if isinstance(origin, MergeStep) else None,
            terms=tuple(matching.terms.get(full, ())),
            appended=growth.rows.get(full, ()),
            replaced=full in matching.replaced,
            stacked=full in matching.stacks,
            scale=None if scale is None else share_of(part, place, scale.removeprefix(part.group)).stored[0],
            rescaled=casting.rescaling(full, stored[likes[name]]),
            keeps_nonfinite=recipe.allow_nonfinite_base and full not in matching.replaced,
        )
        tensors.append(planned if isinstance(origin, MergeStep) else _put_together(planned, full, origin))
    return tuple(tensors)


def _source(origin: Origin, part: CheckpointFile, place: int, name: str) -> Stored:
    """What stands for a tensor's values in its plan: where they lie, if they do so in one piece."""
    share = share_of(part, place, name) if isinstance(origin, MergeStep) else origin
    (first, *more) = share.stored
    if isinstance(origin, Share) and not more and not share.transposed:
        return first
    info = part.file.tensors[name]
    return replace(first, dtype=info.dtype, shape=info.shape)


def _put_together(planned: TensorPlan, full: str, share: Share) -> TensorPlan:
    """The plan of a tensor that lies in several pieces or with its rows as columns: copied or, else, computed."""
    if len(share.stored) == 1 and not share.transposed:
        return planned
    if planned.is_copy and not planned.appended and is_in_place(share, planned.dtype):
        return replace(planned, pieces=share.stored)
    return replace(planned, merge=passthrough(full, share))


def _shape(full: str, info: TensorInfo, source: Stored, growth: Growth, matching: Matching) -> tuple[int, ...]:
    if full in matching.padded:
        return matching.padded[full]
    if math.prod(source.shape) != math.prod(info.shape):  # a vocabulary that grew
        return source.shape
    return growth.appended(full, info)[0]


def plan_side_files(recipe: Recipe, base: Arranged, growth: Growth, matching: Matching) -> tuple[SideFile, ...]:
    """Everything of the output folder that is neither weights nor the index of shards."""
    checkpoint = base.checkpoint
    files = []
    for relative in sorted({*checkpoint.side_files, *growth.contents, *base.contents, *matching.side_sources}):
        content = growth.contents.get(relative, base.contents.get(relative))
        group = relative.removesuffix("config.json")
        if relative.endswith("config.json") and group in checkpoint.configs:
            config = checkpoint.configs[group]
            widened = _widened_inputs(config, matching.padded.get(f"{group}x_embedder.weight"))
            changed = {**widened, **matching.configs.get(group, {}), **growth.configs.get(group, {})}
            updated = _updated_config(config, changed, config_dtype(recipe, base.identity.components, group))
            content = content if updated is None else updated
        source = matching.side_sources.get(relative, checkpoint.root / relative)
        files.append(SideFile(relative, source if content is None else None, content))
    return tuple(files)


def updated_indexes(checkpoint: Checkpoint, planned: Sequence[FilePlan]) -> tuple[SideFile, ...]:
    """The indexes of the base's shards, as they are then; they are written last, when the shards exist."""
    return tuple(_updated_index(index, planned) for index in checkpoint.indexes)


def _updated_index(index: ShardIndex, planned: Sequence[FilePlan]) -> SideFile:
    """The base's index with what is added, without what is dropped, and the size of what is written."""
    folder = index.relative.rpartition("/")[0]
    mine = [file for file in planned if file.relative.rpartition("/")[0] == folder]
    total = sum(tensor.span[1] - tensor.span[0] for file in mine for tensor in file.tensors)
    earlier = index.content.get("metadata")
    metadata = {**(earlier if isinstance(earlier, dict) else {}), "total_size": total}
    written = {tensor.name: file.relative.rpartition("/")[2] for file in mine for tensor in file.tensors}
    weight_map = {name: written[name] for name in index.content["weight_map"] if name in written} | written
    return SideFile(index.relative, None, _json({**index.content, "metadata": metadata, "weight_map": weight_map}))


def _widened_inputs(config: dict[str, Any], shape: tuple[int, ...] | None) -> dict[str, Any]:
    """What a control LoRA of Flux changes in the configuration: it reads more channels, and writes as many as before.

    shape: of the widened input layer, None if there is none. Source: diffusers models/transformers/transformer_flux.py.
    """
    if shape is None or "in_channels" not in config:
        return {}
    return {"in_channels": shape[1], "out_channels": config.get("out_channels") or config["in_channels"]}


def _updated_config(config: dict[str, Any], grown: dict[str, Any], dtype: str | None) -> str | None:
    """config.json with what the adapters change and the dtype that is written; None if it stays as it is."""
    updated = {**config, **grown}
    if dtype is not None:
        updated |= {key: dtype for key in ("torch_dtype", "dtype") if key in config}
    return _json(updated) if updated != config else None


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
