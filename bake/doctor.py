"""Does this adapter fit this base, what of it does not, and what to do: the diagnosis behind `inspect --against`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bake.errors import BakeError, DuplicateTarget, Mismatch, UnmatchedModules
from bake.identify.adapter import Adapter, Module
from bake.identify.checkpoint import BaseIdentity, identify_checkpoint
from bake.identify.families import title
from bake.identify.scaled import quantised, scaled_layers
from bake.io.checkpoint import open_checkpoint
from bake.keys.dialects import flatten
from bake.keys.modules import ModuleIndex
from bake.keys.nearest import nearest_names
from bake.plan.base import Base
from bake.plan.build import build_plan
from bake.plan.heads import base_of
from bake.plan.match import AdapterMatcher, Matching
from bake.plan.recipe import AdapterChoice, Recipe, is_text_encoder

_CANDIDATES = 3  # names suggested for an unmatched module
_CANDIDATES_FOR = 20  # unmatched modules that get suggestions; as many as are shown


def diagnose(adapter: Adapter, base: Path) -> dict[str, Any]:
    """How `adapter` fits `base`, as plain JSON data, from names and headers.

    Keys: fits (fusing as it stands would be planned), refusal {code, exit, message} or None, base
    {path, family, title, variant, layout, evidence, quantised}, components {name: {matched, total}},
    unmatched [{module, adapter, reason, nearest, candidates}], misfits [{module, reason}], verdict in
    plain words, command: the words of a `bake fuse` that can be planned, or None.
    Raises InputError for a base that cannot be read.
    """
    path = adapter.source.path
    checkpoint = open_checkpoint(base)
    try:
        identity = identify_checkpoint(checkpoint)
        scaled = scaled_layers(checkpoint)
        obstacle = quantised(checkpoint, scaled)
        index, _ = base_of(checkpoint, identity, scaled.beside)
        matching, misfits = _match(adapter, index, base)
    finally:
        checkpoint.close()
    refusal = _refusal(Recipe(base, (AdapterChoice(path),)))
    options = () if refusal is None else _remedy(refusal, path, base, matching)
    command = None if options is None else _command(path, base, options)
    coverage = matching.coverage(identity) if matching is not None else {}
    return {
        "fits": refusal is None,
        "refusal": None if refusal is None else _described(refusal),
        "base": {
            "path": str(base),
            "family": identity.family,
            "title": title(identity.family),
            "variant": identity.variant,
            "layout": identity.layout,
            "evidence": list(identity.evidence),
            "quantised": obstacle.kind if obstacle is not None else None,
        },
        "components": {name: dataclasses.asdict(part) for name, part in coverage.items()},
        "unmatched": list(_unmatched(adapter, matching, index.index)) if matching is not None else [],
        "misfits": [{"module": module, "reason": reason} for module, reason in misfits],
        "verdict": _verdict(refusal, matching, options, identity),
        "command": command,
    }


def _match(adapter: Adapter, index: Base, base: Path) -> tuple[Matching | None, Sequence[tuple[str, str]]]:
    """(where the modules go, modules whose shape does not fit); None where the adapter contradicts itself."""
    matching = Matching()
    matcher = AdapterMatcher(index, adapter, AdapterChoice(adapter.source.path), 0, 0, matching)
    try:
        matcher.run(Recipe(base, ()))
    except DuplicateTarget:
        return None, ()
    except Mismatch as refusal:  # raised at the end, with all modules that do not fit
        return matching, refusal.details["modules"]
    return matching, ()


def _refusal(recipe: Recipe) -> BakeError | None:
    """Why `recipe` cannot be planned; None if it can."""
    try:
        build_plan(recipe)
    except BakeError as refusal:
        return refusal
    return None


def _remedy(refusal: BakeError, adapter: Path, base: Path, matching: Matching | None) -> Sequence[str] | None:
    """Options with which the adapter can be fused all the same; None if there are none."""
    if not isinstance(refusal, UnmatchedModules) or matching is None or not matching.matched.total():
        return None
    choice = (AdapterChoice(adapter),)
    present = tuple(name for name, count in matching.matched.items() if count)
    if matching.missing and _refusal(Recipe(base, choice, only=present)) is None:
        return [word for name in present for word in ("--only", name)]
    if _refusal(Recipe(base, choice, allow_unmatched=True)) is None:
        return ["--allow-unmatched"]
    return None


def _command(adapter: Path, base: Path, options: Sequence[str]) -> str:
    """The command line that fuses `adapter` into `base`."""
    output = f"{_bare_name(base)}-{_bare_name(adapter)}" + ("" if base.is_dir() else ".safetensors")
    return shlex.join(["bake", "fuse", str(base), "-l", str(adapter), *options, "-o", output])


def _bare_name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def _described(refusal: BakeError) -> dict[str, Any]:
    return {"code": refusal.code, "exit": refusal.exit_code, "message": refusal.message}


def _verdict(
    refusal: BakeError | None, matching: Matching | None, options: Sequence[str] | None, identity: BaseIdentity
) -> str:
    """The diagnosis in one sentence or two."""
    if refusal is None and matching is not None:
        return f"it fits: all {matching.total.total()} modules have a place in the base"
    if options and matching is not None:
        left = matching.total.total() - matching.matched.total()
        lost = f"; {left} of {matching.total.total()} modules have no place and would be left out"
        missing = sorted(filter(is_text_encoder, matching.missing))
        where = f" (the base has no {', '.join(missing)}; --also FILE adds one)" if missing else ""
        return f"it fits in part{lost}{where}"
    # The first line says what is wrong, the last one what to do; the list between them is shown apart.
    lines = refusal.message.splitlines() if refusal is not None else []
    if len(lines) > 1:
        lines = [lines[0].removesuffix(":") + ".", lines[-1]]
    return " ".join(["it does not fit:", *lines])


def _unmatched(adapter: Adapter, matching: Matching, index: ModuleIndex) -> Iterable[dict[str, Any]]:
    modules = {module.name: module for module in adapter.modules}
    for place, entry in enumerate(matching.unmatched):
        module = modules.get(entry.module)
        looked_up = module is not None and place < _CANDIDATES_FOR
        candidates = _candidates(module, index) if module is not None and looked_up else []
        yield {**dataclasses.asdict(entry), "candidates": candidates}


def _candidates(module: Module, index: ModuleIndex) -> list[str]:
    """Modules of the base, spelled as the adapter spells, whose names come nearest."""
    reading = module.readings[0]
    if reading.style == "number":
        return []
    known = {path for name in index.names(reading) for path in index.spellings[name]}
    return nearest_names(reading.path, map(flatten, known) if reading.style == "flat" else known, _CANDIDATES)
