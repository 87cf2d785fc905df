"""What the commands that make adapters share: their options, and what they print."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import click

from bake.adapter_api import AdapterResult, component_error
from bake.adapter_documents import adapter_document, extraction_counts, extraction_document
from bake.cli.options import F, KeyValue, stack
from bake.cli.output import Output
from bake.identify.families import title
from bake.keys.spoken import NAMES
from bake.plan.adapter import ADAPTER_DTYPES, RULES
from bake.plan.extraction import ExtractionPlan
from bake.sizes import format_bytes

_WORST = 3
_LISTED = 20
_KINDS = {
    "lora": "LoRA modules",
    "full": "stored differences",
    "kept": "copied",
    "left-out": "left out",
    "unchanged": "without a difference",
}

output_option = click.option(
    *("-o", "--output"),
    type=click.Path(path_type=Path),
    required=True,
    help="Where to write: a .safetensors file, or a folder for an adapter with PEFT's names.",
)
writing_options = stack(
    click.option(
        "--metadata", multiple=True, type=KeyValue(), metavar="KEY=VALUE", help="Add to the output's metadata."
    ),
    click.option("--no-recipe", is_flag=True, help="Leave names and digests of the inputs out of the output."),
    click.option("--overwrite", is_flag=True, help="Replace an existing output."),
)
only_option = click.option(
    "--only", multiple=True, metavar="COMPONENT", help="This component alone: unet, te, te1, te2, ... Repeatable."
)
keep_dtype_option = click.option(
    "--dtype",
    type=click.Choice(["keep", *ADAPTER_DTYPES]),
    default="keep",
    show_default=True,
    help="Stored dtype of the factors; keep: as in the input, the widest of a module's.",
)
names_option = click.option(
    "--names",
    type=click.Choice(NAMES),
    help="Whose names the modules get. Default: kohya's for image models, PEFT's for language models.",
)
svd_option = click.option(
    "--svd",
    type=click.Choice(["auto", "exact", "randomised"]),
    default="auto",
    show_default=True,
    help="auto: randomised where a matrix is large and the rank small, unless --keep needs every singular value.",
)


def rank_options(default: str) -> Callable[[F], F]:
    """How many ranks are kept; default: what happens without --rank."""
    return stack(
        click.option("--rank", type=click.IntRange(1), metavar="N", help=f"The rank, at most. Default: {default}."),
        click.option(
            "--conv-rank",
            type=click.IntRange(1),
            metavar="N",
            help="The same for convolutions larger than 1x1. Default: as --rank.",
        ),
        click.option(
            "--keep",
            metavar="RULE=NUMBER",
            help=f"Choose each module's rank by a rule, {', '.join(RULES)}: docs/adapters.md. --rank is its limit.",
        ),
        click.option(
            "--clamp-quantile",
            type=float,
            metavar="SHARE",
            help="Cut the factors off at the magnitude that this share of their entries stays within. Default: off.",
        ),
    )


def show_adapter(out: Output, result: AdapterResult) -> None:
    """What was done, with the error."""
    if out.as_json:
        out.document(adapter_document(result))
    elif not out.quiet:
        counts = ", ".join(f"{result.counts[kind]} {words}" for kind, words in _KINDS.items() if kind in result.counts)
        out.line("modules", f"{title(result.family)}, {result.names} names: {counts}")
        if result.ranks:
            out.line("ranks", _range(result.ranks))
        for name, modules in result.components.items():
            norm = math.sqrt(math.fsum(each.norm**2 for each in modules))
            if norm:
                out.line("error", f"{name} {component_error(modules):.3g} of a difference of norm {norm:.4g}")
        _show_losses(out, result)
        for note in result.notes:
            out.line("note", note)
        size = format_bytes(result.bytes_written)
        out.line("wrote", f"{result.output}: {size} in {result.seconds:.1f} s, error {result.error:.4g} in all")
    if result.leftover:
        out.warn(f"a draft that a killed run had left beside {result.output} was replaced")


def _show_losses(out: Output, result: AdapterResult) -> None:
    """What is missing from the adapter, and which modules are worst."""
    lost = [each for each in result.modules if each.kind == "left-out"]
    if lost:
        out.line("left out", f"{len(lost)} differences, {result.left_out:.3g} of the whole norm")
        for each in sorted(lost, key=lambda each: -each.norm)[: _LISTED if out.verbose else _WORST]:
            out.line("", f"{each.module} ({each.parameter}), norm {each.norm:.3g}")
    loras = sorted((each for each in result.modules if each.kind == "lora"), key=lambda each: -each.error)
    for each in loras[: _LISTED if out.verbose else _WORST]:
        out.line("worst", f"{each.module}: rank {each.rank}, error {each.error:.3g}")


def _range(ranks: tuple[int, ...]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def show_extraction(out: Output, plan: ExtractionPlan, output: Path) -> None:
    """What would be done."""
    if out.as_json:
        out.document(extraction_document(plan, output))
    elif not out.quiet:
        for name, counts in extraction_counts(plan).items():
            rest = "stored as differences" if plan.request.rest else "left out, see --full-rest"
            out.line(
                "compares", f"{name}: {counts['lora']} layers as LoRAs, {counts['rest']} other parameters ({rest})"
            )
        for note in plan.notes:
            out.line("note", note)
        out.line("reads", f"{format_bytes(plan.data_bytes)}; {plan.names} names, to {output}")
