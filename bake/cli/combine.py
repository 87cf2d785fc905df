"""bake combine"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bake import adapter_api
from bake.cli.making import (
    keep_dtype_option,
    names_option,
    only_option,
    output_option,
    rank_options,
    show_adapter,
    svd_option,
    writing_options,
)
from bake.cli.options import Weighted, output_options
from bake.cli.output import Output
from bake.errors import UsageError
from bake.plan.combining import METHODS
from bake.plan.recipe import AdapterChoice


@click.command("combine")
@click.argument("loras", type=Weighted(), nargs=-1, required=True, metavar="LORA[:WEIGHT]...")
@output_option
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="concat",
    show_default=True,
    help="concat: exact, the ranks add up. svd or linear: the same sum brought to --rank. The others thin the updates "
    "out first, keeping --density of them.",
)
@click.option("--density", type=float, metavar="SHARE", help="Of the entries of each update that are kept.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the methods that draw, and of the SVD.")
@rank_options("the largest of the module's; concat has no choice")
@svd_option
@names_option
@keep_dtype_option
@only_option
@writing_options
@output_options
def command(
    loras: Sequence[AdapterChoice],
    output: Path,
    metadata: Sequence[tuple[str, str]],
    no_recipe: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **how: Any,
) -> None:
    """Write one LoRA for several.

    They may be in different dialects, of one family. Fusing the result is fusing all of them with their weights; the
    error that is printed is how far the stored factors are from that, or from what the method makes of it.

    \b
    bake combine style.safetensors:0.8 detail.safetensors:-0.5 -o both.safetensors
    bake combine a.safetensors b.safetensors --method ties --density 0.5 --rank 32 -o both.safetensors
    """
    out = Output(as_json, quiet, verbose)
    for choice in loras:
        if choice != AdapterChoice(choice.path, choice.weight):
            raise UsageError(f"{choice.path}: combine takes one weight for each LoRA and no other settings")
    with out.progress() as progress:
        result = adapter_api.combine(
            *([(choice.path, choice.weight) for choice in loras], output),
            metadata=dict(metadata),
            record=not no_recipe,
            progress=progress,
            **how,
        )
    show_adapter(out, result)
