"""From the words of a command line to a plan: the part that fuse, plan and verify share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bake import api
from bake.cli.output import Output
from bake.errors import UsageError
from bake.plan.model import Plan
from bake.plan.prompt import LoraFolder, adapters_from_prompt, parse_prompt
from bake.plan.recipe import AdapterChoice


def chosen_adapters(
    loras: Sequence[AdapterChoice], prompt: str | None, lora_dir: Path | None, out: Output
) -> list[AdapterChoice]:
    """The adapters named with -l and in the prompt, in that order."""
    choices = list(loras)
    if prompt is not None:
        if lora_dir is None:
            raise UsageError("--prompt needs --lora-dir DIR, the folder with the LoRAs it names")
        named, notes = adapters_from_prompt(prompt, LoraFolder(lora_dir))
        choices += named
        for note in notes:
            out.warn(note)
        if not (out.as_json or out.quiet):
            out.line("prompt", parse_prompt(prompt).rest or "(nothing but LoRA tags)")
    elif lora_dir is not None:
        raise UsageError("--lora-dir is for --prompt; name single files with -l")
    return choices


def chosen_dtypes(values: Sequence[tuple[str, str]]) -> dict[str, str]:
    """component or EVERY -> dtype, as asked for with --dtype; raises UsageError if one is named twice."""
    chosen: dict[str, str] = {}
    for component, dtype in values:
        if component in chosen:
            raise UsageError(f"--dtype is given twice for {component} ({chosen[component]} and {dtype})")
        chosen[component] = dtype
    return chosen


def chosen_components(vae: Path | None, replaced: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """component -> where it is taken from; raises UsageError if one is named twice."""
    chosen: dict[str, Path] = {}
    for component, path in [*([("vae", vae)] if vae is not None else []), *replaced]:
        if component in chosen:
            raise UsageError(f"two files are named for {component}: {chosen[component]} and {path}")
        chosen[component] = path
    return chosen


def make_plan(
    base: Path,
    out: Output,
    *,
    loras: Sequence[AdapterChoice],
    prompt: str | None,
    lora_dir: Path | None,
    also: Sequence[Path],
    vae: Path | None,
    replaced: Sequence[tuple[str, Path]],
    dtypes: Sequence[tuple[str, str]],
    layout: str,
    like: Path | None,
    shard_size: int | None,
    drop: Sequence[str],
    ema: str,
    rounding: str,
    seed: int,
    only: Sequence[str],
    allow_unmatched: bool,
    allow_nonfinite_base: bool,
    strict: bool,
    embeddings: str,
    metadata: Sequence[tuple[str, str]],
    no_recipe: bool,
) -> Plan:
    """The plan that the options of fuse and plan ask for."""
    adapters = chosen_adapters(loras, prompt, lora_dir, out)
    dtype, components = chosen_dtypes(dtypes), chosen_components(vae, replaced)
    arranged = components or drop or shard_size is not None or (layout, ema) != ("keep", "keep")
    if not adapters and not arranged and all(each == "keep" for each in dtype.values()):
        raise UsageError("nothing to fuse: name adapters with -l, or with --prompt and --lora-dir")
    return api.build_plan(
        base,
        adapters,
        also=also,
        replaced=components,
        layout=layout,
        like=like,
        shard_size=shard_size,
        drop=drop,
        ema=ema,
        dtype=dtype,
        rounding=rounding,
        seed=seed,
        only=only,
        allow_unmatched=allow_unmatched,
        allow_nonfinite_base=allow_nonfinite_base,
        strict=strict,
        embeddings=embeddings,
        metadata=dict(metadata),
        record=not no_recipe,
    )
