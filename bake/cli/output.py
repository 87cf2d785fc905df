"""What people and programs see: text or one JSON document on stdout, the bar and warnings on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bake.api import Result, output_bytes
from bake.cli.text import printable
from bake.documents import (
    SCHEMA,
    embedding_file,
    method_document,
    plan_document,
    report_document,
    restored_document,
    result_document,
    tensor_counts,
)
from bake.dtypes import DTYPES, OUTPUT_DTYPES
from bake.errors import UsageError
from bake.identify.families import title
from bake.merges import METHODS
from bake.plan.model import EmbeddingPlan, Merging, Plan
from bake.plan.recipe import is_text_encoder
from bake.plan.selection import Selection
from bake.progress import Progress, Silent
from bake.sizes import format_bytes
from bake.undoing import Restored
from bake.verify.report import Report

_WEAK = 0.9  # a survival below this is worth a warning
_MOST_LINES = 20
_LABEL = 10


class Output:
    """Where a command's results go."""

    def __init__(self, as_json: bool, quiet: bool, verbose: bool) -> None:
        self.as_json, self.quiet, self.verbose = as_json, quiet, verbose

    def document(self, document: dict[str, Any]) -> None:
        print(json.dumps(document, indent=2, default=str))

    def line(self, label: str, text: str) -> None:
        click.echo(f"{label:<{_LABEL - 1}} {printable(text)}")

    def warn(self, text: str) -> None:
        click.echo(f"warning: {printable(text)}", err=True)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A bar on a terminal, gone at the end of the block; nothing elsewhere."""
        bar = Silent() if self.quiet or self.as_json or not sys.stderr.isatty() else Bar()
        try:
            yield bar
        finally:
            bar.finish()

    def show_plan(self, plan: Plan, output: Path | None) -> None:
        """What would be done."""
        if self.as_json:
            self.document(plan_document(plan, output, self.verbose))
        elif not self.quiet:
            self._describe(plan, output)
            where = f" to {output}" if output is not None else ""
            self.line("writes", f"{format_bytes(output_bytes(plan))}{where}; {_tensor_counts(plan)}")
            if self.verbose:
                self._list_tensors(plan)
        self._warn_of_plan(plan)

    def show_result(self, result: Result) -> None:
        """What was done."""
        if self.as_json:
            self.document(result_document(result))
        self.tell_result(result)

    def tell_result(self, result: Result) -> None:
        """The same for people, and what they should be warned of."""
        if not (self.as_json or self.quiet):
            self._describe(result.plan, result.output)
            size = format_bytes(result.bytes_written)
            self.line("wrote", f"{result.output}: {_tensor_counts(result.plan)}, {size} in {result.seconds:.1f} s")
            if result.survival:
                shares = ", ".join(
                    f"{_component_label(name, result.plan)} {_percent(result.survival[name])}"
                    for name in result.plan.components
                    if name in result.survival
                )
                self.line("survived", f"{shares} of the update after rounding")
            for name, tensors in result.clamped.items():
                count, worst = sum(tensors.values()), max(tensors, key=lambda tensor: tensors[tensor])
                self.line("clamped", f"{_component_label(name, result.plan)}: {count} elements, most in {worst}")
            if result.report is not None:
                self.line("verified", _verdict(result.report))
            if result.undo is not None:
                self.line("undo", f"{result.undo}: {format_bytes(result.undo_bytes)} bring the base back, bit for bit")
        self._warn_of_plan(result.plan)
        self._show_leftovers(result)
        for name, tensors in result.clamped.items():
            self.warn(
                f"{sum(tensors.values())} elements of {name} are beyond the largest number of their dtype, which was "
                f"written in their place: write scaled fp8 (--dtype fp8_e4m3fn_scaled) or a wider dtype."
            )
        for name, share in result.survival.items():
            if share < _WEAK:
                self.warn(
                    f"only {_percent(share)} of the update of {name} survived the rounding: it is too small for the "
                    f"dtype. {_advice(result.plan)}"
                )

    def _warn_of_plan(self, plan: Plan) -> None:
        for warning in plan.warnings:
            self.warn(warning)

    def _show_leftovers(self, result: Result) -> None:
        """What became of what an earlier run had left."""
        resumed = result.resumed
        if resumed is not None and resumed.started_over is not None:
            self.warn(f"what was left of {result.output} could not be gone on with: {resumed.started_over}")
        elif result.leftover:
            self.warn(f"a draft that a killed run had left beside {result.output} was replaced")
        if resumed is not None and resumed.spans + resumed.redone and not self.quiet:
            total = format_bytes(result.plan.data_bytes)
            again = f"; {resumed.redone} spans were not, and were written again" if resumed.redone else ""
            click.echo(f"resumed: {format_bytes(resumed.bytes)} of {total} were there and correct{again}", err=True)

    def show_restored(self, result: Restored) -> None:
        """What was restored."""
        if self.as_json:
            self.document(restored_document(result))
        elif not self.quiet:
            self.line("undone", f"{result.undone}, by {result.undo}")
            files = f"{len(result.files)} files, " if len(result.files) > 1 else ""
            size = format_bytes(result.bytes_written)
            self.line("wrote", f"{result.output}: {files}{size} in {result.seconds:.1f} s")
            for file in result.files[:_MOST_LINES]:
                self.line("proved", f"{f'{file.name} ' if file.name else ''}SHA-256 {file.sha256}, as it was")
            if len(result.files) > _MOST_LINES:
                self.line("proved", f"and {len(result.files) - _MOST_LINES} more (--json lists all)")
        if result.leftover:
            self.warn(f"a draft that a killed run had left beside {result.output} was replaced")

    def show_report(self, output: Path, report: Report) -> None:
        """What a verification found."""
        if self.as_json:
            self.document(report_document(output, report))
        elif not self.quiet:
            self.line("checked", f"{output} ({report.mode})")
            self.line("result", _verdict(report))
            for finding in report.findings[:_MOST_LINES]:
                self.line("wrong", finding)

    def _describe(self, plan: Plan, output: Path | None) -> None:
        variant = f" {plan.variant}" if plan.variant else ""
        if plan.merge is not None:
            self._describe_merge(plan.merge, f"{title(plan.family)}{variant}")
        else:
            count = sum(len(file.tensors) for file in plan.files)
            layout = f"{plan.layout} layout" if plan.settings["layout"] == "keep" else f"to the {plan.layout} layout"
            self.line("base", f"{plan.base.name}: {title(plan.family)}{variant}, {layout}, {count} tensors")
        for replaced in plan.replaced:
            self.line(replaced.component, f"taken from {replaced.path.name}")
        for use in plan.adapters:
            chosen = [f"{name} {value:g}" for name, value in (("te", use.te), ("unet", use.unet)) if value is not None]
            weights = ", ".join(chosen if use.selection is None else [*chosen, str(use.selection)])
            ranks = f", rank {_ranks(use.ranks)}" if use.ranks else ""
            self.line(
                "lora",
                f"{use.name} at {use.weight:g}{f' ({weights})' if weights else ''}: "
                f"{', '.join(use.dialects)} names, {', '.join(use.algorithms)}{ranks}, {use.modules} modules",
            )
        covered = ", ".join(
            f"{_component_label(name, plan)} {part.matched}/{part.total}" for name, part in plan.components.items()
        )
        if plan.merge is not None and not plan.adapters:
            self.line("merged", covered)
        elif plan.adapters:
            self.line("matched", covered)
        for entry in plan.skipped:
            self.line("skipped", f"{entry.modules} modules of {entry.component} ({entry.adapter}): {entry.reason}")
        for missing in plan.unmatched[:_MOST_LINES]:
            nearest = f"; nearest: {missing.nearest}" if missing.nearest else ""
            self.line("unmatched", f"{missing.module} ({missing.adapter}): {missing.reason}{nearest}")
        if len(plan.unmatched) > _MOST_LINES:
            self.line("unmatched", f"... and {len(plan.unmatched) - _MOST_LINES} more (--json lists all)")
        for embedding in plan.embeddings:
            self.line("embedding", _embedding(embedding, plan, output))
        for note in plan.notes:
            self.line("note", note)

    def _describe_merge(self, merge: Merging, family: str) -> None:
        method = METHODS[merge.method]
        self.line("method", f"{method.name}: {method.meaning}")
        self.line("family", family)
        for model in merge.models:
            self.line(model.role, f"{model.path.name}, {model.layout} layout")
        if merge.layers:
            self.line("layers", ", ".join(merge.layers))
        for name, setting in merge.parameters.items():
            self.line(name, _setting(setting))

    def show_methods(self, name: str | None) -> None:
        """The merge methods, or what one of them takes."""
        chosen = (
            list(METHODS.values()) if name is None else [method for method in METHODS.values() if method.name == name]
        )
        if not chosen:
            raise UsageError(f"there is no merge method {name!r}; there are {', '.join(METHODS)}")
        if self.as_json:
            self.document({"schema": SCHEMA, "methods": [method_document(method) for method in chosen]})
            return
        width = max(len(method.name) for method in chosen)
        for method in chosen:
            click.echo(f"{method.name:<{width}}  {method.meaning} ({method.models})")
            if name is None:
                continue
            click.echo(f"  {method.formula}")
            for parameter in method.parameters:
                each = ", for each model" if parameter.per_model else ""
                default = "has to be given" if parameter.default is None else f"default {_setting(parameter.default)}"
                click.echo(f"  -p {parameter.name}  {parameter.meaning}{each}: {parameter.span}; {default}")

    def _list_tensors(self, plan: Plan) -> None:
        for file, tensor in plan.tensors():
            if not tensor.is_copy:
                shape = "x".join(map(str, tensor.shape))
                terms = ", ".join(f"{term.module} * {term.scale * term.weight:g}" for term in tensor.terms)
                if tensor.merge is not None:
                    given = ", ".join(f"{key}={_setting(value)}" for key, value in tensor.merge.parameters.items())
                    terms = f"{tensor.merge.method} {given}".strip()
                where = f"{file.relative}:" if file.relative else ""
                click.echo(f"  {where}{tensor.name} {tensor.dtype} {shape}: {terms}")


def _embedding(embedding: EmbeddingPlan, plan: Plan, output: Path | None) -> str:
    """What the embedding is and where it goes."""
    sizes = ", ".join(
        f"{count} vector{'s' if count > 1 else ''}{f' for {vectors.encoder}' if vectors.encoder else ''}"
        for vectors in embedding.vectors
        for count in [vectors.stored.as_rows[0]]
    )
    file = embedding_file(embedding, output)
    tokens = dict.fromkeys(token for vectors in embedding.vectors for token in vectors.tokens)
    where = f"in {file}" if file is not None else f"added to the tokenizer as {', '.join(tokens)}"
    return f"{embedding.token} of {plan.adapters[embedding.adapter].name}: {sizes}, {where}"


def _advice(plan: Plan) -> str:
    """What keeps more of an update than the plan does."""
    coarsest = min(DTYPES[tensor.dtype].mantissa for _, tensor in plan.tensors() if tensor.terms)
    finer = [name for name in ("bf16", "fp16", "fp32") if DTYPES[OUTPUT_DTYPES[name]].mantissa > coarsest]
    dtype = f"A finer dtype keeps more (--dtype {' or '.join(finer)}), so does a larger weight"
    return f"{dtype}." if plan.rounding == "stochastic" else f"{dtype}; --rounding stochastic keeps it on average."


def _component_label(name: str, plan: Plan) -> str:
    """te1 is called te where the base has no second text encoder."""
    owners = {tensor.component for _, tensor in plan.tensors()}
    return "te" if name == "te1" and sum(map(is_text_encoder, owners)) == 1 else name


def _setting(setting: Any) -> str:
    """The value of a parameter, for people."""
    if isinstance(setting, (list, tuple)):
        return ", ".join(map(_setting, setting))
    if isinstance(setting, dict):
        chosen = Selection.from_json(setting)
        parts = ["" if chosen.number is None else f"{chosen.number:g}", str(chosen)]
        parts[1:1] = [f"{name}={ratio:g}" for name, ratio in chosen.components]
        return " ".join(filter(None, parts))
    return str(setting).lower() if isinstance(setting, (bool, str)) else f"{setting:g}"


def _tensor_counts(plan: Plan) -> str:
    counts = tensor_counts(plan)
    main = "merged" if plan.merge is not None and not plan.adapters else "fused"
    others = [f"{count} {how}" for how, count in counts.items() if count and how not in (main, "copied")]
    return ", ".join([f"{counts[main]} tensors {main}", *others, f"{counts['copied']} copied unchanged"])


def _ranks(ranks: tuple[int, ...]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _verdict(report: Report) -> str:
    if not report.ok:
        return f"WRONG: {len(report.findings)} findings"
    parts = [f"{report.untouched_tensors} untouched tensors identical"]
    if report.embeddings:
        parts.append(f"{report.embeddings} embeddings identical")
    if report.embeddings_not_found:
        parts.append(f"not found and not checked: {', '.join(report.embeddings_not_found)}")
    if report.elements:
        share = _percent(report.equal_share, 4)
        parts.append(f"{report.equal} of {report.elements} elements equal float64 rounded once ({share})")
        parts.append(f"largest error {report.max_ulp:.3f} ulp")
    extent = "everything compared" if report.mode == "full" else "a sample compared"
    return f"{', '.join(parts)} ({extent})"


def _percent(share: float, digits: int = 2) -> str:
    """A share in percent, rounded down: it says 100 only if it is."""
    return "100 %" if share == 1 else f"{math.floor(share * 100 * 10**digits) / 10**digits:.{digits}f} %"


class Bar:
    """Progress as a tqdm bar in bytes, with rate and remaining time."""

    def __init__(self) -> None:
        self._bar: Any = None

    def start(self, task: str, total: int) -> None:
        from tqdm import tqdm

        self.finish()
        if total:
            self._bar = tqdm(
                total=total, desc=task, unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr
            )

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
