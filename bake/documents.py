"""The JSON documents of `--json`: stable keys, one schema version, plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bake.api import Result, input_bytes, output_bytes
from bake.errors import BakeError
from bake.merges import Method
from bake.plan.embeddings import embeddings_folder
from bake.plan.model import EmbeddingPlan, Merging, Plan, TensorPlan
from bake.running import Outcome
from bake.undoing import Restored
from bake.verify.report import Report

SCHEMA = 1


def plan_document(plan: Plan, output: Path | None, full: bool = False) -> dict[str, Any]:
    """What `bake plan` and `fuse --dry-run` say; with `full`, the plan itself under "plan"."""
    document = {
        "schema": SCHEMA,
        "output": None if output is None else str(output),
        **_facts(plan, output),
        "bytes": {"read": input_bytes(plan), "written": output_bytes(plan)},
    }
    return document | ({"plan": plan.to_json()} if full else {})


def result_document(result: Result) -> dict[str, Any]:
    """What `bake fuse` says."""
    return {
        "schema": SCHEMA,
        "output": str(result.output),
        **_facts(result.plan, result.output),
        "survival": result.survival,
        "clamped": result.clamped,
        "bytes": {"read": input_bytes(result.plan), "written": output_bytes(result.plan)},
        "seconds": round(result.seconds, 3),
        "resumed": None if result.resumed is None else dataclasses.asdict(result.resumed),
        "undo": None if result.undo is None else {"file": str(result.undo), "bytes": result.undo_bytes},
        "verification": None if result.report is None else result.report.to_json(),
    }


def run_document(recipe: Path, outcomes: Sequence[Outcome], full: bool = False) -> dict[str, Any]:
    """What `bake run` says: every bake with what `plan` or `fuse` say of it, and the first error at the top again."""
    failed = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
    return {
        "schema": SCHEMA,
        "recipe": str(recipe),
        "bakes": [_outcome(outcome, full) for outcome in outcomes],
        **({} if failed is None else {"error": error_document(failed)["error"]}),
    }


def _outcome(outcome: Outcome, full: bool) -> dict[str, Any]:
    bake = outcome.bake
    facts: dict[str, Any] = {"status": "not run"}
    if outcome.error is not None:
        facts = {"status": "failed", "error": error_document(outcome.error)["error"]}
    elif outcome.result is not None:
        facts = {"status": "done", **result_document(outcome.result)}
    elif outcome.plan is not None:
        facts = {"status": "planned", **plan_document(outcome.plan, bake.output, full)}
    output = None if bake.output is None else str(bake.output)
    facts = {key: value for key, value in facts.items() if key != "schema"}
    return {"name": bake.name, "line": bake.mark.line, "output": output, "notes": list(bake.notes), **facts}


def report_document(output: Path, report: Report) -> dict[str, Any]:
    """What `bake verify` says."""
    return {"schema": SCHEMA, "output": str(output), **report.to_json()}


def restored_document(result: Restored) -> dict[str, Any]:
    """What `bake undo` says."""
    return {
        "schema": SCHEMA,
        "output": str(result.output),
        "undone": str(result.undone),
        "undo": str(result.undo),
        "files": [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in result.files],
        "bytes": {"written": result.bytes_written},
        "seconds": round(result.seconds, 3),
    }


def method_document(method: Method) -> dict[str, Any]:
    """What `bake merge --list` says of a method."""
    return {
        "name": method.name,
        "meaning": method.meaning,
        "formula": method.formula,
        "models": method.models,
        "reach": method.reach,
        "symmetric": method.symmetric,
        "parameters": [
            {
                "name": parameter.name,
                "meaning": parameter.meaning,
                "range": parameter.span,
                "default": parameter.default,
                "per_model": parameter.per_model,
            }
            for parameter in method.parameters
        ],
    }


def error_document(error: BakeError, exit_code: int | None = None) -> dict[str, Any]:
    """What any command says when it refuses."""
    return {
        "schema": SCHEMA,
        "error": {
            "code": error.code,
            "exit": error.exit_code if exit_code is None else exit_code,
            "message": error.message,
            "details": error.details,
        },
    }


def _facts(plan: Plan, output: Path | None) -> dict[str, Any]:
    return {
        "family": plan.family,
        "layout": plan.layout,
        "variant": plan.variant,
        **({} if plan.merge is None else {"merge": _merge(plan.merge)}),
        "replaced": {each.component: each.path.name for each in plan.replaced},
        "adapters": [
            {
                "name": use.name,
                "weight": use.weight,
                "te": use.te,
                "unet": use.unet,
                "selection": None if use.selection is None else use.selection.to_json(),
                "dialects": list(use.dialects),
                "algorithms": list(use.algorithms),
                "ranks": list(use.ranks),
                "modules": use.modules,
                "embeddings": list(use.embeddings),
            }
            for use in plan.adapters
        ],
        "components": {name: dataclasses.asdict(part) for name, part in plan.components.items()},
        "unmatched": [dataclasses.asdict(entry) for entry in plan.unmatched],
        "skipped": [dataclasses.asdict(entry) for entry in plan.skipped],
        "tensors": tensor_counts(plan),
        "embeddings": [
            {
                "token": embedding.token,
                "adapter": plan.adapters[embedding.adapter].name,
                "file": embedding_file(embedding, output),
                "vectors": vectors.stored.as_rows[0],
                "encoder": vectors.encoder,
                "tokens": list(vectors.tokens),
            }
            for embedding in plan.embeddings
            for vectors in embedding.vectors
        ],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
    }


def tensor_counts(plan: Plan) -> dict[str, int]:
    """How many output tensors are made in which way; each counts once."""
    counts = dict.fromkeys(("fused", "merged", "grown", "converted", "copied"), 0)
    for _, tensor in plan.tensors():
        counts[_how(plan, tensor)] += 1
    return counts


def _how(plan: Plan, tensor: TensorPlan) -> str:
    """How a tensor is made. What is one model's and only rounded anew, or put together anew, counts as converted."""
    if tensor.terms:
        return "fused"
    if tensor.appended:
        return "grown"
    if plan.merge is not None and tensor.merge is not None and tensor.merge.method == plan.merge.method:
        return "merged"
    return "copied" if tensor.is_copy else "converted"


def _merge(merge: Merging) -> dict[str, Any]:
    return {
        "method": merge.method,
        "models": [{"name": model.path.name, "role": model.role, "layout": model.layout} for model in merge.models],
        "parameters": merge.parameters,
        "layers": list(merge.layers),
    }


def embedding_file(embedding: EmbeddingPlan, output: Path | None) -> str | None:
    """The textual-inversion file of an embedding; its bare name where the output has none yet."""
    if embedding.file is None or output is None:
        return embedding.file
    return str(embeddings_folder(output) / embedding.file)
