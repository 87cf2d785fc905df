"""bake inspect"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from bake.bugreport import make_report, write_report
from bake.cli.options import output_options
from bake.cli.output import Output
from bake.documents import SCHEMA
from bake.identify.families import title
from bake.inspection import inspect
from bake.sizes import format_bytes

_MOST = 20
_LISTED = 8  # modules that do not fit
_LONGEST = 100
_BAR = 20  # characters of the longest bar
_COUNTED = {"algorithms": "", "ranks": "rank", "alphas": "alpha", "scales": "scale"}


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="BASE",
    help="Say how the adapter fits this base, what does not, and the command that fuses it.",
)
@click.option("--norms", is_flag=True, help="Read the adapter's weights and print how large its updates are, by block.")
@click.option("--hashes", is_flag=True, help="Read every byte and print the hashes that sites and UIs know files by.")
@click.option(
    "--bug-report",
    type=click.Path(path_type=Path),
    metavar="OUT.json",
    help="Also write names, shapes, dtypes and settings to a new file, to show a problem to others: no weights, "
    "no prompts, no paths.",
)
@output_options
def command(
    file: Path,
    against: Path | None,
    norms: bool,
    hashes: bool,
    bug_report: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Say what FILE is and what is inside.

    A checkpoint, an adapter, or something else; from names and headers, so it answers at once. The exit code is 0
    wherever it can tell, also for an adapter that does not fit: with --json, coverage.fits says whether it does.

    \b
    bake inspect style.safetensors --against sd15.safetensors
    bake inspect fused.safetensors
    """
    out = Output(as_json, quiet, verbose)
    if bug_report is not None:  # first: that FILE is refused may be the problem
        write_report(make_report(file, against), bug_report)
        if not (as_json or quiet):
            out.line("report", f"{bug_report}: no weights and no paths inside; look it through before you send it")
    found = inspect(file, against, hashes, norms)
    if as_json:
        written = {} if bug_report is None else {"bug_report": str(bug_report)}
        out.document({"schema": SCHEMA, **found, **written})
    elif not quiet:
        _show(out, found, verbose)


def _show(out: Output, found: dict[str, Any], verbose: bool) -> None:
    out.line("file", found["path"])
    if found["kind"] == "adapter":
        _show_adapter(out, found, verbose)
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
    if "coverage" in found:  # the verdict is what is looked for, so it comes last
        _show_coverage(out, found["coverage"], verbose)


def _show_adapter(out: Output, found: dict[str, Any], verbose: bool) -> None:
    out.line("kind", f"an adapter: {', '.join(found['algorithms'])}")
    if not found["supported"]:
        out.line("", found["refusal"])
    written = f", written by {found['trainer']}" if found.get("trainer") else ""
    out.line("names", f"{', '.join(found['dialects'])}{written}")
    families = title(found["family"]) if found["family"] else " or ".join(map(title, found["families"])) or "unknown"
    out.line("made for", f"{families}{_told(found['evidence'])}")
    out.line("holds", f"{found['modules']} modules in {_contents(found)}")
    for name, part in found["components"].items():
        facts = (f"{label} {_values(part[key])}".lstrip() for key, label in _COUNTED.items() if part[key])
        out.line(name, f"{part['modules']} modules: {'; '.join(facts)}")
    if found["embeddings"]:
        out.line("carries", f"token embeddings: {', '.join(found['embeddings'])}")
    if found["unknown"]:
        out.line("unknown", f"{len(found['unknown'])} tensors, e.g. {found['unknown'][0]}")
    for note in found["notes"]:
        out.line("note", note)
    _show_training(out, found["training"])
    if "norms" in found:
        _show_norms(out, found["norms"], verbose)


def _show_training(out: Output, training: dict[str, Any]) -> None:
    for trigger in training["triggers"]:
        out.line("trigger", f"{trigger['text']} ({trigger['source']})")
    if training["tags"]:
        tags = ", ".join(f"{entry['tag']} {entry['count']}" for entry in training["tags"])
        out.line("tags", f"{tags}: the captions' most frequent")
    for name, value in training["facts"].items():
        out.line("training", f"{name.replace('_', ' ')}: {value}")
    for reason in training["unread"]:
        out.line("unread", reason)


def _show_norms(out: Output, norms: dict[str, Any], verbose: bool) -> None:
    for name, part in norms["components"].items():
        out.line("norm", f"{name} {part['norm']:.4g}: the updates of {part['modules']} modules together, at weight 1")
        largest = max(part["blocks"].values())
        for place, (block, norm) in enumerate(part["blocks"].items()):
            if place == _MOST and not verbose:
                out.line("", f"... and {len(part['blocks']) - _MOST} more blocks (-v shows all)")
                break
            bar = "#" * round(_BAR * norm / largest) if largest else ""
            out.line("", f"{norm:<10.4g} {bar:<{_BAR}} {block}")
    reasons = Counter(entry["reason"] for entry in norms["unmeasured"])
    for reason, count in reasons.items():
        out.line("norm", f"not of {count} modules: {reason}")


def _show_coverage(out: Output, coverage: dict[str, Any], verbose: bool) -> None:
    base = coverage["base"]
    variant = f" {base['variant']}" if base["variant"] else ""
    out.line("base", f"{base['path']}: {base['title']}{variant}, {base['layout']} layout{_told(base['evidence'])}")
    parts = ", ".join(f"{name} {part['matched']}/{part['total']}" for name, part in coverage["components"].items())
    out.line("matched", parts or "nothing")
    shown = slice(None) if verbose else slice(_LISTED)
    for entry in coverage["unmatched"][shown]:
        near = entry["candidates"] or ([entry["nearest"]] if entry["nearest"] else [])
        nearest = f"; nearest: {', '.join(near)}" if near else ""
        out.line("unmatched", f"{entry['module']}: {entry['reason']}{nearest}")
    _show_rest(out, "unmatched", len(coverage["unmatched"]), verbose)
    for entry in coverage["misfits"][shown]:
        out.line("misfit", f"{entry['module']}: {entry['reason']}")
    _show_rest(out, "misfit", len(coverage["misfits"]), verbose)
    out.line("verdict", coverage["verdict"])
    if coverage["command"] is not None:
        out.line("run", coverage["command"])


def _show_rest(out: Output, label: str, count: int, verbose: bool) -> None:
    if count > _LISTED and not verbose:
        out.line(label, f"... and {count - _LISTED} more (-v shows all)")


def _told(evidence: list[str]) -> str:
    return f"; told by {evidence[0]}" if evidence else ""


def _values(counted: list[dict[str, Any]]) -> str:
    """Values with their counts; a value that all share stands alone."""
    texts = [_value(entry["value"]) for entry in counted]
    if len(counted) == 1:
        return texts[0]
    shown = ", ".join(f"{text} x {entry['count']}" for text, entry in list(zip(texts, counted, strict=True))[:_MOST])
    return f"{shown}, ... ({len(counted)} different)" if len(counted) > _MOST else shown


def _value(value: Any) -> str:
    if value is None:
        return "none stored"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _show_checkpoint(out: Output, found: dict[str, Any]) -> None:
    variant = f" {found['variant']}" if found["variant"] else ""
    out.line("kind", f"a checkpoint: {found['title']}{variant}, {found['layout']} layout")
    if found["quantised"]:
        out.line("", f"quantised ({found['quantised']}): nothing can be fused into it")
    if found["scaled_layers"]:
        out.line("", f"scaled fp8: {found['scaled_layers']} layers count times a scale of their own")
    out.line("parts", ", ".join(f"{name} ({count} tensors)" for name, count in found["components"].items()))
    out.line("holds", _contents(found))
    recipe = found["recipe"]
    while recipe is not None:  # bakes on top of bakes
        recipe = _show_recipe(out, recipe)


def _show_recipe(out: Output, recipe: Any) -> Any:
    """What was fused into a file, by its bake.recipe; returns that of the base. It may be anybody's text."""
    try:
        uses = [
            (use["name"], float(use["weight"]), "selection" in use, str(use["files"][0]["sha256"]))
            for use in recipe["adapters"]
        ]
        made_of = f"{recipe['base']['name']} by bake {recipe['version']}"
        earlier = recipe["base"].get("recipe")
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        out.line("recipe", "malformed: not one that bake wrote (--json shows it)")
        return None
    for name, weight, is_scaled, sha256 in uses:
        scaled = ", scaled by block, depth or name" if is_scaled else ""
        out.line("fused in", f"{name} at {weight:g}{scaled} (SHA-256 {sha256[:12]}...)")
    out.line("made of", made_of)
    return earlier


def _contents(found: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
    return f"{found['tensors']} tensors ({dtypes}), {format_bytes(found['bytes'])}"
