"""Checkpoints with each other, as functions: what `bake merge` does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bake.api import PathLike, Result, Verification, plan_recipe, run_plan
from bake.execute.task import DEFAULT_MEMORY
from bake.plan.model import Plan
from bake.plan.recipe import Layers, MergeChoice, Recipe
from bake.plan.selection import Setting
from bake.progress import Progress


def build_merge_plan(
    method: str,
    models: Iterable[PathLike],
    *,
    base: PathLike | None = None,
    parameters: Mapping[str, Setting] | None = None,
    replaced: Mapping[str, PathLike] | None = None,
    layout: str = "keep",
    like: PathLike | None = None,
    shard_size: int | None = None,
    drop: Iterable[str] = (),
    ema: str = "keep",
    dtype: str | Mapping[str, str] = "keep",
    only: Iterable[str] = (),
    allow_missing: bool = False,
    layers: Iterable[str | Layers] = (),
    metadata: Mapping[str, str] | None = None,
    record: bool = True,
    rounding: str = "nearest",
    seed: int = 0,
) -> Plan:
    """Return what `merge` would do, decided to the last byte, from headers and a few samples. Nothing is written.

    method: a row of docs/merging.md. models: in the order in which it takes them; each a .safetensors file, a sharded
    or a diffusers folder. base: the model that the others were trained from, for methods that have one. parameters:
    name -> number, switch or word, a Selection of numbers for parts of the model, or a list with one for each model.
    replaced, layout, like, shard_size, drop, ema, dtype, only, metadata, record: as for `build_plan`; without `dtype`
    every tensor keeps that of the first model. allow_missing: tensors that another model lacks stay as the first one
    has them, and what only others have is left out, instead of being refused. layers: of passthrough,
    "MODEL=FIRST:END" for each run of layers that are put one above the other. rounding: "nearest" or "stochastic".
    seed: of stochastic rounding and of methods that draw by chance.
    Raises every BakeError that the run could raise before it computes; see `bake.errors`.
    """
    merged = MergeChoice(
        method=method,
        models=tuple(Path(model) for model in models),
        base=None if base is None else Path(base),
        parameters=dict(parameters or {}),
        only=tuple(only),
        allow_missing=allow_missing,
        layers=tuple(each if isinstance(each, Layers) else Layers.parse(each) for each in layers),
    )
    return plan_recipe(
        Recipe(
            base=merged,
            replaced={component: Path(path) for component, path in (replaced or {}).items()},
            layout=layout,
            like=None if like is None else Path(like),
            shard_size=shard_size,
            drop=tuple(drop),
            ema=ema,
            dtype=dtype if isinstance(dtype, str) else dict(dtype),
            metadata=dict(metadata or {}),
            record=record,
            rounding=rounding,
            seed=seed,
        )
    )


def merge(
    method: str,
    models: Iterable[PathLike],
    output: PathLike,
    *,
    device: str = "auto",
    memory: int = DEFAULT_MEMORY,
    threads: int | None = None,
    verify: Verification = "sample",
    overwrite: bool = False,
    keep_undo: bool = False,
    progress: Progress | None = None,
    **what: Any,
) -> Result:
    """Merge models by a method and write a new checkpoint; return what was done.

    The output has the layout, side files and metadata of the first model (the base, where there is one). `what` is as
    for `build_merge_plan`, the rest as for `run_plan`.
    """
    return run_plan(
        build_merge_plan(method, models, **what),
        output,
        device=device,
        memory=memory,
        threads=threads,
        verify=verify,
        overwrite=overwrite,
        keep_undo=keep_undo,
        progress=progress,
    )
