"""bake fuse"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bake import api
from bake.cli.options import adapter_options, keep_undo_option, output_options, recipe_options, run_options
from bake.cli.output import Output
from bake.cli.request import make_plan


@click.command("fuse")
@click.argument("base", type=click.Path(path_type=Path))
@adapter_options
@click.option(
    *("-o", "--output"),
    type=click.Path(path_type=Path),
    required=True,
    help="Where to write: a .safetensors file, or a folder if the base is one.",
)
@recipe_options
@run_options
@click.option(
    "--verify",
    type=click.Choice(["none", "sample", "full"]),
    default="sample",
    show_default=True,
    help="How much is read back and recomputed in float64 before the output appears.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="If the run ends early, however it does, keep what is finished; if an earlier run with --resume left "
    "something that fits, go on from there. Costs one SHA-256 pass over the output.",
)
@keep_undo_option
@click.option("--dry-run", is_flag=True, help="Only say what would be done, as 'bake plan' does.")
@output_options
def command(
    base: Path,
    output: Path,
    device: str,
    memory: int,
    threads: int | None,
    overwrite: bool,
    verify: api.Verification,
    resume: bool,
    keep_undo: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **request: Any,
) -> None:
    """Fuse adapters into BASE and write a new checkpoint.

    BASE is a .safetensors file, a folder with a sharded model, or a diffusers folder; the output has the
    same layout. Nothing is written unless every module of every adapter finds its place.

    \b
    bake fuse sd15.safetensors -l style.safetensors:0.8 -l detail.safetensors:-0.5 -o out.safetensors
    bake fuse sdxl.safetensors --prompt "a cat, <lora:style:0.8>" --lora-dir loras -o out.safetensors
    """
    out = Output(as_json, quiet, verbose)
    plan = make_plan(base, out, **request)
    if dry_run:
        api.check_output_path(plan, output, overwrite=overwrite, keep_undo=keep_undo)
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
            resume=resume,
            keep_undo=keep_undo,
            progress=progress,
        )
    out.show_result(result)
