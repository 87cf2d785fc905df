"""bake merge"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bake import api, merging
from bake.cli.options import (
    arrange_options,
    keep_undo_option,
    merge_dtypes_option,
    metadata_options,
    output_options,
    replace_options,
    run_options,
    stack,
)
from bake.cli.output import Output
from bake.cli.parameters import ParameterSetting, joined
from bake.cli.request import chosen_components, chosen_dtypes
from bake.errors import UsageError
from bake.merges import METHODS
from bake.plan.words import Typed

_merge_options = stack(
    click.option(
        *("-p", "--parameter", "settings"),
        type=ParameterSetting(),
        multiple=True,
        metavar="NAME=VALUE",
        help="A parameter of METHOD: a number, a word, or numbers for each model (weight=0.5,0.3). "
        "alpha=0.3:te=0.5:vae=0 sets components apart; lbw= (block values or a preset, read as blocks= says), "
        "gradient=, names= and, last, lbwe= set blocks, depths and names apart: docs/merging.md. weight@2=... is for "
        "the second model alone. Repeatable.",
    ),
    click.option(
        "--base",
        type=click.Path(path_type=Path),
        help="The model that the others were trained from, for methods that have a base.",
    ),
    click.option(
        "--layers",
        multiple=True,
        metavar="MODEL=FIRST:END",
        help="Of passthrough and language models: put these layers, END not among them, of a model above those named "
        "before; models and layers are counted from 1 and 0. Repeatable.",
    ),
    click.option(
        "--only",
        multiple=True,
        metavar="COMPONENT",
        help="Merge this component alone: unet, te, te1, vae, ... The rest is copied from the first model. Repeatable.",
    ),
    click.option(
        "--allow-missing",
        is_flag=True,
        help="Tensors that another model lacks stay the first one's, and what only others have is left out.",
    ),
    replace_options,
    arrange_options,
    merge_dtypes_option,
    click.option(
        "--rounding",
        type=click.Choice(["nearest", "stochastic"]),
        default="nearest",
        show_default=True,
        help="nearest: every element is the float64 result, rounded once. stochastic: up or down by chance.",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Of methods by chance and of stochastic rounding."
    ),
    metadata_options,
)


@click.command("merge")
@click.argument("method", required=False)
@click.argument("models", nargs=-1, metavar="MODEL...", type=click.Path(path_type=Path))
@_merge_options
@click.option(
    *("-o", "--output"),
    type=click.Path(path_type=Path),
    help="Where to write: a .safetensors file, or a folder if the first model is one.",
)
@run_options
@click.option(
    "--verify",
    type=click.Choice(["none", "sample", "full"]),
    default="sample",
    show_default=True,
    help="How much is read back and made again before the output appears.",
)
@click.option("--list", "lists", is_flag=True, help="Show the methods, or the parameters of METHOD, and do nothing.")
@keep_undo_option
@click.option("--dry-run", is_flag=True, help="Only say what would be done, from headers.")
@output_options
def command(
    method: str | None,
    models: Sequence[Path],
    settings: Sequence[tuple[str, int | None, Typed]],
    base: Path | None,
    layers: Sequence[str],
    only: Sequence[str],
    allow_missing: bool,
    vae: Path | None,
    replaced: Sequence[tuple[str, Path]],
    layout: str,
    like: Path | None,
    shard_size: int | None,
    drop: Sequence[str],
    ema: str,
    dtypes: Sequence[tuple[str, str]],
    rounding: str,
    seed: int,
    metadata: Sequence[tuple[str, str]],
    no_recipe: bool,
    output: Path | None,
    device: str,
    memory: int,
    threads: int | None,
    overwrite: bool,
    verify: api.Verification,
    keep_undo: bool,
    lists: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Merge MODELs by METHOD and write a new checkpoint.

    Models are .safetensors files, folders with a sharded model, or diffusers folders, all of one family. The output
    has the layout, the side files and the metadata of the first one; of the base, where there is one.

    \b
    bake merge weighted_sum a.safetensors b.safetensors -p alpha=0.3 -o c.safetensors
    bake merge add_difference a.safetensors b.safetensors sd15.safetensors -o c.safetensors
    bake merge weighted_sum a.safetensors b.safetensors -p alpha:lbw=GRAD_V -o c.safetensors
    bake merge ties --base ./Llama ./one ./two -p density=0.3 -p weight=0.6,0.4 -o ./merged
    bake merge --list
    """
    out = Output(as_json, quiet, verbose)
    if lists:
        out.show_methods(method)
        return
    if method is None or not models:
        raise UsageError(f"name a method and its models; the methods are {', '.join(METHODS)}")
    if output is None and not dry_run:
        raise UsageError("name the output with -o")
    what: dict[str, Any] = {
        "base": base,
        "parameters": joined(method, settings, len(models)),
        "replaced": chosen_components(vae, replaced),
        "layout": layout,
        "like": like,
        "shard_size": shard_size,
        "drop": drop,
        "ema": ema,
        "dtype": chosen_dtypes(dtypes),
        "layers": layers,
        "only": only,
        "allow_missing": allow_missing,
        "metadata": dict(metadata),
        "record": not no_recipe,
        "rounding": rounding,
        "seed": seed,
    }
    plan = merging.build_merge_plan(method, models, **what)
    if output is not None:
        api.check_output_path(plan, output, overwrite=overwrite, keep_undo=keep_undo)
    if dry_run or output is None:
        out.show_plan(plan, output)
        return
    with out.progress() as progress:
        result = api.run_plan(
            plan,
            output,
            device=device,
            memory=memory,
            threads=threads,
            verify=verify,
            overwrite=overwrite,
            keep_undo=keep_undo,
            progress=progress,
        )
    out.show_result(result)
