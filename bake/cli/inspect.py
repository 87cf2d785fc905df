"""bake inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bake.cli.options import output_options
from bake.cli.output import Output
from bake.documents import SCHEMA
from bake.identify.families import title
from bake.inspection import inspect
from bake.sizes import format_bytes

_MOST = 20
_LONGEST = 100


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), metavar="BASE", help="Say how the adapter fits this base.")
@click.option("--hashes", is_flag=True, help="Read every byte and print the hashes that sites and UIs know files by.")
@output_options
def command(file: Path, against: Path | None, hashes: bool, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Say what FILE is and what is inside.

    A checkpoint, an adapter, or something else; from names and headers, so it answers at once.

    \b
    bake inspect style.safetensors --against sd15.safetensors
    bake inspect fused.safetensors
    """
    out = Output(as_json, quiet, verbose)
    found = inspect(file, against, hashes)
    if as_json:
        out.document({"schema": SCHEMA, **found})
    elif not quiet:
        _show(out, found, verbose)


def _show(out: Output, found: dict[str, Any], verbose: bool) -> None:
    out.line("file", found["path"])
    if found["kind"] == "adapter":
        _show_adapter(out, found)
    elif found["kind"] == "checkpoint":
        _show_checkpoint(out, found)
    else:
        out.line("kind", f"{found['kind']}. {found['advice']}")
    for name, hashes in found.get("hashes", {}).items():
        text = ", ".join(f"{kind} {value}" for kind, value in hashes.items()) if isinstance(hashes, dict) else hashes
        out.line("hashes", f"{name}: {text}")
    metadata = found.get("metadata", {})
    for key in metadata if verbose else list(metadata)[:_MOST]:
        text = str(metadata[key])
        out.line("metadata", f"{key}: {text if verbose or len(text) <= _LONGEST else text[:_LONGEST] + '...'}")
    if len(metadata) > _MOST and not verbose:
        out.line("metadata", f"... and {len(metadata) - _MOST} more (-v shows all)")


def _show_adapter(out: Output, found: dict[str, Any]) -> None:
    out.line("kind", f"an adapter: {', '.join(found['algorithms'])}")
    if not found["supported"]:
        out.line("", found["refusal"])
    out.line("names", ", ".join(found["dialects"]))
    families = title(found["family"]) if found["family"] else " or ".join(map(title, found["families"])) or "unknown"
    told = f", as {found['evidence'][0]} tells" if found["evidence"] else ""
    out.line("made for", f"{families}{told}")
    ranks = ", ".join(map(str, found["ranks"])) or "-"
    out.line("modules", f"{found['modules']}, rank {ranks}, {_contents(found)}")
    if found["embeddings"]:
        out.line("carries", f"token embeddings: {', '.join(found['embeddings'])}")
    if found["unknown"]:
        out.line("unknown", f"{len(found['unknown'])} tensors, e.g. {found['unknown'][0]}")
    for note in found["notes"]:
        out.line("note", note)
    coverage = found.get("coverage")
    if coverage is not None:
        parts = ", ".join(f"{name} {part['matched']}/{part['total']}" for name, part in coverage["components"].items())
        out.line("fits", f"yes: {parts}" if coverage["fits"] else f"no. {coverage['refusal']['message']}")


def _show_checkpoint(out: Output, found: dict[str, Any]) -> None:
    variant = f" {found['variant']}" if found["variant"] else ""
    out.line("kind", f"a checkpoint: {found['title']}{variant}, {found['layout']} layout")
    if found["quantised"]:
        out.line("", f"quantised ({found['quantised']}): nothing can be fused into it")
    out.line("parts", ", ".join(f"{name} ({count} tensors)" for name, count in found["components"].items()))
    out.line("holds", _contents(found))
    recipe = found["recipe"]
    while isinstance(recipe, dict):  # bakes on top of bakes
        for use in recipe.get("adapters", []):
            sha256 = use["files"][0]["sha256"]
            out.line("fused in", f"{use['name']} at {use['weight']:g} (SHA-256 {sha256[:12]}...)")
        base = recipe.get("base", {})
        out.line("made of", f"{base.get('name')} by bake {recipe.get('version')}")
        recipe = base.get("recipe")


def _contents(found: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
    return f"{found['tensors']} tensors ({dtypes}), {format_bytes(found['bytes'])}"
