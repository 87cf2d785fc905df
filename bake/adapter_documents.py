"""The JSON documents of the commands that make adapters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from bake.adapter_api import AdapterResult, component_error
from bake.documents import SCHEMA
from bake.plan.adapter import Outcome
from bake.plan.extraction import ExtractionPlan


def adapter_document(result: AdapterResult) -> dict[str, Any]:
    """What extract, resize, combine and convert say."""
    return {
        "schema": SCHEMA,
        "verb": result.verb,
        "output": str(result.output),
        "family": result.family,
        "names": result.names,
        "error": result.error,
        "left_out": result.left_out,
        "ranks": list(result.ranks),
        "parameters": result.counts,
        "components": {
            name: {
                "modules": sum(each.kind in ("lora", "kept") for each in modules),
                "norm": sum(each.norm**2 for each in modules) ** 0.5,
                "error": component_error(modules),
            }
            for name, modules in result.components.items()
        },
        "modules": [_module(each) for each in result.modules if each.kind != "unchanged"],
        "notes": list(result.notes),
        "bytes": {"written": result.bytes_written},
        "seconds": round(result.seconds, 3),
    }


def _module(each: Outcome) -> dict[str, Any]:
    return {
        "module": each.module,
        "component": each.component,
        "parameter": each.parameter,
        "kind": each.kind,
        "shape": list(each.shape),
        "rank": each.rank,
        "norm": each.norm,
        "error": each.error,
    }


def extraction_document(plan: ExtractionPlan, output: Path) -> dict[str, Any]:
    """What `bake extract --dry-run` says."""
    return {
        "schema": SCHEMA,
        "verb": "extract",
        "output": str(output),
        "family": plan.family,
        "names": plan.names,
        "components": {name: dict(counts) for name, counts in extraction_counts(plan).items()},
        "notes": list(plan.notes),
        "bytes": {"read": plan.data_bytes},
    }


def extraction_counts(plan: ExtractionPlan) -> dict[str, Counter[str]]:
    """Component -> how many parameters can become LoRAs ("lora") and how many cannot ("rest")."""
    found: dict[str, Counter[str]] = {}
    for each in plan.differences:
        found.setdefault(each.component, Counter())["lora" if each.low_rank else "rest"] += 1
    return found
