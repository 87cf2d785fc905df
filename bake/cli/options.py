"""Parameter types and the option stacks that commands share. They parse; nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from bake.dtypes import OUTPUT_DTYPES
from bake.errors import UsageError
from bake.plan.recipe import EMA, EMBEDDING_MODES, EVERY, LAYOUTS, ROUNDINGS, AdapterChoice
from bake.plan.words import parse_adapter
from bake.sizes import parse_size

F = TypeVar("F", bound=Callable[..., Any])
_DTYPES = ("keep", *OUTPUT_DTYPES)


class Weighted(click.ParamType):
    """LORA[:WEIGHT][:KEY=VALUE]..."""

    name = "lora"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> AdapterChoice:
        if isinstance(value, AdapterChoice):
            return value
        try:
            return parse_adapter(str(value))
        except UsageError as error:
            self.fail(error.message, param, ctx)


class Size(click.ParamType):
    """A number of bytes, like 512MiB or 4G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ComponentDtype(click.ParamType):
    """DTYPE, or COMPONENT=DTYPE; converts to (component or "all", dtype)."""

    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        component, _, dtype = str(value).rpartition("=")
        if dtype not in _DTYPES:
            self.fail(f"{dtype!r} is not one of {', '.join(_DTYPES)}", param, ctx)
        return component or EVERY, dtype


class KeyValue(click.ParamType):
    """KEY=VALUE."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not key:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key, text


class ComponentPath(click.ParamType):
    """COMPONENT=PATH."""

    name = "component=path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        component, _, path = str(value).partition("=")
        if not component or not path:
            self.fail(f"{value!r} is not COMPONENT=FILE, such as vae=vae.safetensors", param, ctx)
        return component, Path(path)


class ShardSize(click.ParamType):
    """A number of bytes, or "none" for one file, which is 0."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "none":
            return 0
        size: int = Size().convert(value, param, ctx)
        if size < 1:
            self.fail(f"{value!r} is not a size such as 5GB, and none is written 'none'", param, ctx)
        return size


def stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator that applies several options, listed in the order of --help."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


adapter_options = stack(
    click.option(
        *("-l", "--lora", "loras"),
        type=Weighted(),
        multiple=True,
        metavar="LORA[:WEIGHT][:KEY=VALUE]",
        help="Adapter file or folder with its weight (default 1; any sign, 0 leaves it out). te= and unet= set "
        "the weight of the text encoders and of the rest, dyn= uses only the first ranks. lbw= (block values or a "
        "preset, read as blocks= says), gradient=, names= and, last, lbwe= scale the weight by block, depth and name: "
        "docs/blocks.md. Repeatable.",
    ),
    click.option("--prompt", metavar="TEXT", help="Take the LoRAs from a prompt's <lora:name:weight> tags."),
    click.option(
        "--lora-dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder in which --prompt finds its LoRAs, sub-folders included.",
    ),
)

merge_dtypes_option = click.option(
    *("--dtype", "dtypes"),
    type=ComponentDtype(),
    multiple=True,
    metavar="[COMPONENT=]DTYPE",
    help="Stored dtype of the output's floats, or of one component's (unet=..., te=..., vae=...): "
    f"{', '.join(_DTYPES)}. Default: keep, every tensor in that of the first model. Repeatable.",
)

cast_options = stack(
    click.option(
        *("--dtype", "dtypes"),
        type=ComponentDtype(),
        multiple=True,
        metavar="[COMPONENT=]DTYPE",
        help="Stored dtype of the output's floats, or of one component's (unet=..., te=..., vae=...): "
        f"{', '.join(_DTYPES)}. Default: keep, every tensor in its own. fp8 is for the matrices inside the blocks "
        "of all but the VAE. Repeatable.",
    ),
    click.option(
        "--rounding",
        type=click.Choice(ROUNDINGS),
        default="nearest",
        show_default=True,
        help="nearest: every element is the exact result, rounded once. stochastic: up or down by chance, so that "
        "small updates survive on average. fast: nearest, as float32 gives it.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of stochastic rounding."),
)

embeddings_option = click.option(
    "--embeddings",
    type=click.Choice(EMBEDDING_MODES),
    default="beside",
    show_default=True,
    help="Token embeddings that travel in adapters: beside writes them as textual-inversion files into "
    "OUTPUT.embeddings, add makes them words of a diffusers folder's tokenizer and text encoder, drop leaves them out.",
)

nonfinite_option = click.option(
    "--allow-nonfinite-base",
    is_flag=True,
    help="Elements of the base that are NaN or infinite stay as they are, and no others may become so. Without "
    "it they are refused in every tensor that is computed; tensors that are only copied are not looked at.",
)

metadata_options = stack(
    click.option(
        "--metadata", multiple=True, type=KeyValue(), metavar="KEY=VALUE", help="Add to the output's metadata."
    ),
    click.option("--no-recipe", is_flag=True, help="Leave names, weights and digests of the inputs out of the output."),
)

replace_options = stack(
    click.option(
        "--vae",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Take the VAE from this file: --replace vae=FILE.",
    ),
    click.option(
        *("--replace", "replaced"),
        type=ComponentPath(),
        multiple=True,
        metavar="COMPONENT=FILE",
        help="Take a component (vae, te1, te2, unet, ...) from another checkpoint, which may be a file of its own. "
        "Repeatable.",
    ),
)

arrange_options = stack(
    click.option(
        "--layout",
        type=click.Choice(LAYOUTS),
        default="keep",
        show_default=True,
        help="original: one file with the original names. diffusers: a folder with those of diffusers, for which "
        "--like names the configuration. The bytes are only moved.",
    ),
    click.option(
        "--like",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="For --layout diffusers: a diffusers folder whose configuration, tokenizer and scheduler files are taken.",
    ),
    click.option(
        "--shard-size",
        type=ShardSize(),
        metavar="SIZE|none",
        help="Divide the weights into shards of at most this size (5GB) with an index, in a folder; none: one file. "
        "Default: as the base is.",
    ),
    click.option(
        "--drop",
        multiple=True,
        metavar="WHAT",
        help="Leave out a component (te, te1, vae, ...), ema (averaged weights), training (optimizer state, losses) or "
        "rest (all that belongs to no component). Repeatable.",
    ),
    click.option(
        "--ema",
        type=click.Choice(EMA),
        default="keep",
        show_default=True,
        help="use: the averaged weights (model_ema) take the place of the others.",
    ),
)

recipe_options = stack(
    click.option(
        "--also",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A further file of a split model (a text encoder). The output is then a folder. Repeatable.",
    ),
    replace_options,
    arrange_options,
    cast_options,
    click.option(
        "--only",
        multiple=True,
        metavar="COMPONENT",
        help="Fuse into this component alone: unet, te, te1, te2, ... Repeatable.",
    ),
    click.option(
        "--allow-unmatched",
        is_flag=True,
        help="Fuse what matches even if some modules of an adapter have no place in the base.",
    ),
    nonfinite_option,
    click.option(
        "--strict",
        is_flag=True,
        help="Refuse an adapter that is in BASE already, as the record of an earlier bake in it says. Without it "
        "there is a warning with the weight that results.",
    ),
    embeddings_option,
    metadata_options,
)

run_options = stack(
    click.option(
        "--device", default="auto", show_default=True, help="Where to compute: auto, cpu, cuda, cuda:N or mps."
    ),
    click.option(
        "--memory",
        type=Size(),
        default="512MiB",
        show_default=True,
        metavar="SIZE",
        help="Memory for buffers, on top of what Python and torch take.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1, 256),
        metavar="N",
        help="Threads that compute. Default: one per core, at most 8.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an existing output."),
)

keep_undo_option = click.option(
    "--keep-undo",
    is_flag=True,
    help="Write what is replaced into an undo file beside the output (out.undo for out.safetensors), with which 'bake "
    "undo' restores the base bit for bit: docs/undo.md.",
)

output_options = stack(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="No progress bar and no summary."),
    click.option("-v", "--verbose", is_flag=True, help="Say more: with --json, include the whole plan."),
)
