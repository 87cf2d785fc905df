"""bake verify"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from bake import api
from bake.cli.options import (
    adapter_options,
    arrange_options,
    cast_options,
    embeddings_option,
    output_options,
    replace_options,
)
from bake.cli.output import Output
from bake.cli.request import chosen_adapters, chosen_components, chosen_dtypes
from bake.errors import UsageError, VerificationFailed
from bake.plan.recipe import AdapterChoice


@click.command("verify")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="What it was made from. Default: the recipe inside.")
@adapter_options
@click.option("--also", multiple=True, type=click.Path(path_type=Path), help="As for fuse.")
@replace_options
@arrange_options
@cast_options
@click.option("--only", multiple=True, metavar="COMPONENT", help="As for fuse.")
@click.option("--allow-unmatched", is_flag=True, help="As for fuse.")
@click.option("--allow-nonfinite-base", is_flag=True, help="As for fuse.")
@embeddings_option
@click.option(
    "--search",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where to look for the recipe's inputs, besides the output's folder and the current one. Repeatable.",
)
@click.option("--full", is_flag=True, help="Compare every byte and element; without it, a sample.")
@output_options
def command(
    output: Path,
    base: Path | None,
    loras: Sequence[AdapterChoice],
    prompt: str | None,
    lora_dir: Path | None,
    also: Sequence[Path],
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
    only: Sequence[str],
    allow_unmatched: bool,
    allow_nonfinite_base: bool,
    embeddings: str,
    search: Sequence[Path],
    full: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Recompute OUTPUT from its inputs in float64 and compare.

    Without --base the recipe stored in OUTPUT is replayed. Untouched tensors must equal the base byte for
    byte; fused ones the float64 result, rounded. Exit code 9 if anything differs.

    \b
    bake verify out.safetensors --search loras
    bake verify out.safetensors --base sd15.safetensors -l style.safetensors:0.8 --full
    """
    out = Output(as_json, quiet, verbose)
    adapters = chosen_adapters(loras, prompt, lora_dir, out)
    components = chosen_components(vae, replaced)
    chosen = (adapters, also, components, like, drop, only, allow_unmatched, allow_nonfinite_base, dtypes, seed)
    modes = (layout, ema, shard_size, embeddings, rounding) != ("keep", "keep", None, "beside", "nearest")
    if base is None and (any(chosen) or modes):
        raise UsageError("adapters and their options need --base too; without it the stored recipe is replayed")
    what = {
        "also": also,
        "replaced": components,
        "layout": layout,
        "like": like,
        "shard_size": shard_size,
        "drop": drop,
        "ema": ema,
        "dtype": chosen_dtypes(dtypes),
        "rounding": rounding,
        "seed": seed,
        "only": only,
        "allow_unmatched": allow_unmatched,
        "allow_nonfinite_base": allow_nonfinite_base,
        "embeddings": embeddings,
    }
    with out.progress() as progress:
        report = api.check_output(
            output, base, adapters, search=search, full=full, progress=progress, **what if base else {}
        )
    out.show_report(output, report)
    if not report.ok:
        raise click.exceptions.Exit(VerificationFailed.exit_code)
