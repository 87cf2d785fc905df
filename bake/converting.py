"""What is stored, in another way: `bake convert`, for checkpoints and for adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bake import adapter_api
from bake.adapter_api import AdapterResult
from bake.api import PathLike, Result, Verification, build_plan, run_plan
from bake.errors import UsageError
from bake.execute.task import DEFAULT_MEMORY
from bake.io.files import inputs_only
from bake.io.tensorfile import SafetensorsFile, open_tensors
from bake.plan.model import Plan
from bake.progress import Progress

# What only one of the two kinds has.
OF_ADAPTERS = ("names", "base", "fold_alpha", "only")
OF_CHECKPOINTS = (
    *("also", "replaced", "layout", "like", "shard_size", "drop", "ema", "allow_nonfinite_base", "rounding", "seed"),
    *("device", "memory", "threads", "verify", "resume"),
)


def build_conversion_plan(base: PathLike, **what: Any) -> Plan:
    """Return what `convert` would do with a checkpoint; arguments as for `build_plan`. Says so if that is nothing."""
    plan = build_plan(base, **what)
    with inputs_only():
        is_copy = _copies_all(plan) and all(
            isinstance(open_tensors(source.path), SafetensorsFile) for source in plan.inputs if source.role == "base"
        )
    note = f"nothing is changed: the output holds what {plan.base.name} does"
    return dataclasses.replace(plan, notes=(*plan.notes, note)) if is_copy else plan


def _copies_all(plan: Plan) -> bool:
    """True if the output has the base's own tensors in the files that these are in."""
    arranged = (plan.settings["layout"], plan.settings["ema"], plan.settings["drop"], plan.settings["shard_size"])
    is_plain = arranged == ("keep", "keep", [], None) and not plan.replaced
    return is_plain and plan.packaging == plan.base_packaging and all(each.is_copy for _, each in plan.tensors())


def convert(
    source: PathLike,
    output: PathLike,
    *,
    names: str | None = None,
    dtype: str | Mapping[str, str] = "keep",
    metadata: Mapping[str, str] | None = None,
    record: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    device: str = "auto",
    memory: int = DEFAULT_MEMORY,
    threads: int | None = None,
    verify: Verification = "sample",
    resume: bool = False,
    **what: Any,
) -> Result | AdapterResult:
    """Write a checkpoint in another layout, dtype or number of files, or an adapter in the names of another dialect.

    source: either; what it is decides. names, and in `what` base, fold_alpha and only: of an adapter, as for
    `bake.adapter_api.convert`. dtype: a mapping from component to dtype too, for checkpoints. The other arguments are
    those of `build_plan` (layout, like, shard_size, drop, ema, replaced, also, rounding, seed) and `run_plan`, for
    checkpoints alone.
    Raises UsageError for arguments of the other kind, and what those functions raise.
    """
    common: dict[str, Any] = {"metadata": metadata, "record": record}
    if is_adapter_path(source):
        refuse_others(source, OF_CHECKPOINTS, what)
        if names is None or not isinstance(dtype, str):
            raise UsageError(f"{source} is an adapter: say whose names it gets (names), and one dtype for all of it")
        how = {**common, **what, "overwrite": overwrite, "progress": progress}
        return adapter_api.convert(source, output, names=names, dtype=dtype, **how)
    refuse_others(source, OF_ADAPTERS, {**what, **({} if names is None else {"names": names})})
    return run_plan(
        build_conversion_plan(source, dtype=dtype, **common, **what),
        output,
        device=device,
        memory=memory,
        threads=threads,
        verify=verify,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )


def is_adapter_path(source: PathLike) -> bool:
    """True for an adapter, False for anything else, such as a checkpoint. Raises InputError for what cannot be read."""
    with inputs_only():
        return adapter_api.holds_adapter(Path(source))


def refuse_others(source: PathLike, others: Iterable[str], given: Iterable[str]) -> None:
    """Raise UsageError if what was given is for the other kind of file."""
    wrong = [f"--{name.replace('_', '-')}" for name in given if name in others]
    if wrong:
        kind, other = ("an adapter", "checkpoints") if "layout" in others else ("a checkpoint", "adapters")
        raise UsageError(f"{source} is {kind}, and {', '.join(wrong)} is for {other}")
