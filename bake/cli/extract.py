"""bake extract"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from bake.adapter_api import check_adapter_place, extraction_request, run_extraction_plan
from bake.cli.making import (
    names_option,
    only_option,
    output_option,
    rank_options,
    show_adapter,
    show_extraction,
    svd_option,
    writing_options,
)
from bake.cli.options import Size, output_options
from bake.cli.output import Output
from bake.plan.adapter import ADAPTER_DTYPES, DEFAULT_RANK
from bake.plan.extraction import plan_extraction


@click.command("extract")
@click.argument("tuned", type=click.Path(path_type=Path))
@click.argument("base", type=click.Path(path_type=Path))
@output_option
@rank_options(str(DEFAULT_RANK))
@svd_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of the randomised SVD.")
@names_option
@click.option(
    "--dtype", type=click.Choice(list(ADAPTER_DTYPES)), default="fp16", show_default=True, help="Of the factors."
)
@only_option
@click.option(
    "--full-rest",
    is_flag=True,
    help="Store norms, biases and embeddings too, as whole differences (PEFT: as whole values).",
)
@click.option("--dora", is_flag=True, help="Store the lengths of the tuned rows as DoRA magnitudes as well.")
@click.option("--allow-unmatched", is_flag=True, help="Leave out what only one of the two models has.")
@click.option(
    "--memory",
    type=Size(),
    default="512MiB",
    show_default=True,
    metavar="SIZE",
    help="Differences up to this size are held, larger ones are read again for every pass.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be compared, from headers alone.")
@writing_options
@output_options
def command(
    tuned: Path,
    base: Path,
    output: Path,
    rank: int | None,
    conv_rank: int | None,
    keep: str | None,
    clamp_quantile: float | None,
    svd: str,
    seed: int,
    names: str | None,
    dtype: str,
    only: Sequence[str],
    full_rest: bool,
    dora: bool,
    allow_unmatched: bool,
    memory: int,
    dry_run: bool,
    metadata: Sequence[tuple[str, str]],
    no_recipe: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write the LoRA that makes TUNED of BASE.

    Both are checkpoints of one family, in any layouts and dtypes. Every layer whose weights differ becomes a module
    with the best factors of its rank; what cannot be one is listed. The error that is printed is measured on the
    factors as they are stored: |TUNED - BASE - LoRA| / |TUNED - BASE|.

    \b
    bake extract tuned.safetensors sd15.safetensors -o style.safetensors --rank 32
    bake extract tuned.safetensors sdxl.safetensors -o style.safetensors --keep fro=0.95 --rank 128
    bake extract ./my-llama ./llama -o ./my-adapter
    """
    out = Output(as_json, quiet, verbose)
    request = extraction_request(
        *(tuned, base),
        rank=rank,
        conv_rank=conv_rank,
        keep=keep,
        clamp_quantile=clamp_quantile,
        svd=svd,
        seed=seed,
        names=names,
        only=only,
        full_rest=full_rest,
        dora=dora,
        allow_unmatched=allow_unmatched,
    )
    plan = plan_extraction(request)
    if dry_run:
        check_adapter_place(plan, output, overwrite)
        show_extraction(out, plan, output)
        return
    with out.progress() as progress:
        result = run_extraction_plan(
            plan,
            output,
            dtype=dtype,
            metadata=dict(metadata),
            record=not no_recipe,
            memory=memory,
            overwrite=overwrite,
            progress=progress,
        )
    show_adapter(out, result)
