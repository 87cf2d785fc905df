"""bake resize"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bake import adapter_api
from bake.cli.making import keep_dtype_option, output_option, rank_options, show_adapter, writing_options
from bake.cli.options import output_options
from bake.cli.output import Output


@click.command("resize")
@click.argument("lora", type=click.Path(path_type=Path))
@output_option
@rank_options("as it is")
@keep_dtype_option
@writing_options
@output_options
def command(
    lora: Path,
    output: Path,
    metadata: Sequence[tuple[str, str]],
    no_recipe: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **how: Any,
) -> None:
    """Write LORA with other ranks.

    Every module gets the best factors of its new rank; names, and alpha / rank, stay. What is no LoRA is copied. The
    error that is printed is measured on the factors as they are stored: |old - new| / |old|.

    \b
    bake resize style.safetensors -o small.safetensors --rank 16
    bake resize style.safetensors -o small.safetensors --keep fro=0.98
    """
    out = Output(as_json, quiet, verbose)
    with out.progress() as progress:
        result = adapter_api.resize(
            *(lora, output), metadata=dict(metadata), record=not no_recipe, progress=progress, **how
        )
    show_adapter(out, result)
