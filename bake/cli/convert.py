"""bake convert"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bake import adapter_api
from bake.cli.making import keep_dtype_option, only_option, output_option, show_adapter, writing_options
from bake.cli.options import output_options
from bake.cli.output import Output
from bake.keys.spoken import NAMES


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path), metavar="LORA")
@output_option
@click.option("--names", type=click.Choice(NAMES), required=True, help="Whose names the modules get.")
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A checkpoint of the LoRA's family. Needed where names alone do not tell the family or a module.",
)
@click.option(
    "--fold-alpha",
    is_flag=True,
    help="Multiply alpha / rank into the factors, for programs that read no alpha. Powers of two are exact.",
)
@keep_dtype_option
@only_option
@writing_options
@output_options
def command(
    source: Path,
    output: Path,
    metadata: Sequence[tuple[str, str]],
    no_recipe: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **how: Any,
) -> None:
    """Write LORA in the names of another dialect.

    The factors keep their bytes; where one dialect has a projection in one piece and the other in several, they are
    cut or joined.

    \b
    bake convert style.safetensors -o diffusers.safetensors --names diffusers
    bake convert style.safetensors -o ./adapter --names peft --only unet
    """
    out = Output(as_json, quiet, verbose)
    with out.progress() as progress:
        result = adapter_api.convert(
            *(source, output), metadata=dict(metadata), record=not no_recipe, progress=progress, **how
        )
    show_adapter(out, result)
