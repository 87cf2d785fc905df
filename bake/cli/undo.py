"""bake undo"""

from __future__ import annotations

from pathlib import Path

import click

from bake import undoing
from bake.cli.options import output_options
from bake.cli.output import Output


@click.command("undo")
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    *("-o", "--output", "restored"),
    type=click.Path(path_type=Path),
    required=True,
    metavar="RESTORED",
    help="Where to write the base: a .safetensors file, or a folder if it was more than one file.",
)
@click.option(
    "--threads", type=click.IntRange(1, 256), metavar="N", help="Threads that unpack. Default: one per core, at most 8."
)
@click.option("--overwrite", is_flag=True, help="Replace what is at RESTORED.")
@output_options
def command(
    output: Path, restored: Path, threads: int | None, overwrite: bool, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Restore the base that OUT was made of, bit for bit.

    OUT was written with --keep-undo, and its undo file (out.undo for out.safetensors) lies beside it. Both have to be
    as they were written (exit code 5 if OUT is not). What is restored has to have the SHA-256 that the base had, or
    nothing is written (exit code 9).

    \b
    bake fuse sd15.safetensors -l style.safetensors:0.8 -o fused.safetensors --keep-undo
    bake undo fused.safetensors -o sd15-again.safetensors
    """
    out = Output(as_json, quiet, verbose)
    with out.progress() as progress:
        result = undoing.undo(output, restored, threads=threads, overwrite=overwrite, progress=progress)
    out.show_restored(result)
