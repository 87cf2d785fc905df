"""bake plan"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bake import api
from bake.cli.options import adapter_options, output_options, recipe_options
from bake.cli.output import Output
from bake.cli.request import make_plan


@click.command("plan")
@click.argument("base", type=click.Path(path_type=Path))
@adapter_options
@click.option(
    *("-o", "--output"),
    type=click.Path(path_type=Path),
    help="Where fuse would write; checks the place too.",
)
@recipe_options
@click.option("--overwrite", is_flag=True, help="With -o: an existing output would be replaced.")
@output_options
def command(
    base: Path,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **request: Any,
) -> None:
    """Say what fuse would do with BASE, from headers alone.

    Raises every refusal that the real run would raise, with the same exit code; writes nothing.

    \b
    bake plan sd15.safetensors -l style.safetensors:0.8
    """
    out = Output(as_json, quiet, verbose)
    plan = make_plan(base, out, **request)
    if output is not None:
        api.check_output_path(plan, output, overwrite=overwrite)
    out.show_plan(plan, output)
