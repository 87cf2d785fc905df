"""bake convert"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from bake import adapter_api, api, converting
from bake.cli.making import only_option, output_option, show_adapter
from bake.cli.options import (
    arrange_options,
    cast_options,
    metadata_options,
    nonfinite_option,
    output_options,
    replace_options,
    run_options,
)
from bake.cli.output import Output
from bake.cli.request import chosen_components, chosen_dtypes
from bake.errors import UsageError
from bake.keys.spoken import NAMES
from bake.plan.adapter import ADAPTER_DTYPES
from bake.plan.recipe import EVERY

_PLANNED = ("also", "layout", "like", "shard_size", "drop", "ema", "rounding", "seed", "allow_nonfinite_base")
_RUN = ("device", "memory", "threads", "verify", "resume")


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path), metavar="IN")
@output_option
@click.option("--names", type=click.Choice(NAMES), help="Of an adapter, and needed there: whose names the modules get.")
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Of an adapter: a checkpoint of its family. Needed where names alone do not tell the family or a module.",
)
@click.option(
    "--fold-alpha",
    is_flag=True,
    help="Of an adapter: multiply alpha / rank into the factors, for programs that read no alpha. Powers of two are "
    "exact.",
)
@only_option
@click.option(
    "--also",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Of a checkpoint: a further file of a split model. Repeatable.",
)
@arrange_options
@replace_options
@cast_options
@nonfinite_option
@metadata_options
@run_options
@click.option(
    "--verify",
    type=click.Choice(["none", "sample", "full"]),
    default="sample",
    show_default=True,
    help="Of a checkpoint: how much is read back and compared before the output appears.",
)
@click.option("--resume", is_flag=True, help="Of a checkpoint: as for fuse.")
@click.option("--dry-run", is_flag=True, help="Of a checkpoint: only say what would be done, from headers.")
@output_options
@click.pass_context
def command(
    context: click.Context,
    /,
    source: Path,
    output: Path,
    metadata: Sequence[tuple[str, str]],
    no_recipe: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **how: Any,
) -> None:
    """Write IN, a checkpoint or an adapter, in another way.

    A checkpoint gets another layout, dtype or number of files, loses what it does not need or takes components from
    other files; PyTorch's files become safetensors. An adapter gets the names of another dialect; its factors keep
    their bytes unless a projection is cut or joined.

    \b
    bake convert sdxl.ckpt -o sdxl.safetensors --drop ema --drop training --dtype fp16
    bake convert sdxl.safetensors -o ./sdxl --layout diffusers --like ./sdxl-base
    bake convert ./sdxl -o sdxl.safetensors --layout original --vae vae.safetensors
    bake convert style.safetensors -o ./adapter --names peft --only unet
    """
    out = Output(as_json, quiet, verbose)
    typed = [name for name in (*how, "dry_run") if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    common = {"metadata": dict(metadata), "record": not no_recipe}
    if converting.is_adapter_path(source):
        converting.refuse_others(source, (*converting.OF_CHECKPOINTS, "vae", "dry_run"), typed)
        _convert_adapter(source, output, out, how, overwrite=overwrite, **common)
    else:
        converting.refuse_others(source, converting.OF_ADAPTERS, typed)
        _convert_checkpoint(source, output, out, how, common, overwrite, dry_run)


def _convert_adapter(source: Path, output: Path, out: Output, how: dict[str, Any], **common: Any) -> None:
    dtype = chosen_dtypes(how["dtypes"])
    if dtype.keys() - {EVERY} or dtype.get(EVERY, "keep") not in ("keep", *ADAPTER_DTYPES):
        raise UsageError(f"{source} is an adapter: its factors have one dtype, keep, {', '.join(ADAPTER_DTYPES)}")
    if how["names"] is None:
        raise UsageError(f"{source} is an adapter: say whose names it gets, with --names {'|'.join(NAMES)}")
    chosen = {name: how[name] for name in converting.OF_ADAPTERS}
    with out.progress() as progress:
        result = adapter_api.convert(
            source, output, dtype=dtype.get(EVERY, "keep"), progress=progress, **common, **chosen
        )
    show_adapter(out, result)


def _convert_checkpoint(
    source: Path, output: Path, out: Output, how: dict[str, Any], common: dict[str, Any], overwrite: bool, dry_run: bool
) -> None:
    plan = converting.build_conversion_plan(
        source,
        replaced=chosen_components(how["vae"], how["replaced"]),
        dtype=chosen_dtypes(how["dtypes"]),
        **{name: how[name] for name in _PLANNED},
        **common,
    )
    if dry_run:
        api.check_output_path(plan, output, overwrite=overwrite)
        out.show_plan(plan, output)
        return
    with out.progress() as progress:
        chosen = {name: how[name] for name in _RUN}
        result = api.run_plan(plan, output, overwrite=overwrite, progress=progress, **chosen)
    out.show_result(result)
