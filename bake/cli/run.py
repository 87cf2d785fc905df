"""bake run"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bake import api
from bake.cli.options import Size, output_options
from bake.cli.output import Output
from bake.cli.text import printable
from bake.documents import run_document
from bake.recipes.read import Bake
from bake.running import Outcome, plan_bakes, read_bakes, run_bakes


class Shard(click.ParamType):
    """i/n; converts to (i, n)."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        number, slash, count = str(value).partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            self.fail(f"{value!r} is not I/N, such as 2/4 for the second of four machines", param, ctx)
        return int(number), int(count)


@click.command("run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(*("-o", "--output"), type=click.Path(path_type=Path), help="Where to write, for a recipe with one bake.")
@click.option("--select", multiple=True, metavar="NAME", help="Do this bake alone, by name or output. Repeatable.")
@click.option(
    "--shard",
    type=Shard(),
    metavar="I/N",
    help="Do every N-th bake from the I-th on, so that N machines share a recipe. Counted among those selected.",
)
@click.option("--keep-going", is_flag=True, help="Do what can be done, even if some of the bakes fail.")
@click.option("--device", help="Where to compute: auto, cpu, cuda, cuda:N or mps. Default: the recipe's, else auto.")
@click.option("--memory", type=Size(), metavar="SIZE", help="Memory for buffers. Default: the recipe's, else 512MiB.")
@click.option(
    "--threads",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Threads that compute. Default: the recipe's, else one per core, at most 8.",
)
@click.option("--overwrite", is_flag=True, default=None, help="Replace existing outputs.")
@click.option(
    "--verify",
    type=click.Choice(["none", "sample", "full"]),
    help="How much is read back and recomputed before an output appears. Default: the recipe's, else sample.",
)
@click.option(
    "--resume", is_flag=True, help="As for fuse: keep what a run finished that ended early, and go on from there."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done, from headers.")
@output_options
def command(
    recipe: Path,
    output: Path | None,
    select: Sequence[str],
    shard: tuple[int, int] | None,
    keep_going: bool,
    device: str | None,
    memory: int | None,
    threads: int | None,
    overwrite: bool | None,
    verify: api.Verification | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Do the bakes of the file RECIPE, one or many.

    RECIPE is YAML: merges, LoRAs, replaced components, dtypes in one pass, for one output or many (docs/recipes.md);
    or a configuration of mergekit, with -o. All bakes are planned before the first is written, so that what headers
    tell against one of them is told at once. Relative paths in RECIPE start from its folder.

    \b
    bake run styles.yaml
    bake run styles.yaml --dry-run
    bake run styles.yaml --shard 2/4
    bake run mergekit.yaml -o ./merged
    """
    out = Output(as_json, quiet, verbose)
    bakes = read_bakes(recipe, output=output, select=select, shard=shard)
    for bake in bakes:
        for note in bake.notes:
            out.warn(note)
    options = {
        "device": device,
        "memory": memory,
        "threads": threads,
        "overwrite": overwrite,
        "verify": verify,
        "resume": resume or None,
    }
    report = _Report(out, bakes)
    if dry_run:
        for outcome in plan_bakes(bakes, options, keep_going):
            report.add(outcome)
    else:
        with out.progress() as progress:
            for outcome in run_bakes(bakes, keep_going=keep_going, progress=progress, **options):
                report.add(outcome)
    return report.finish(recipe)


class _Report:
    """Tells what becomes of the bakes, one after the other."""

    def __init__(self, out: Output, bakes: Sequence[Bake]) -> None:
        self._out, self._bakes = out, bakes
        self._outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        """Say what became of the next one."""
        self._outcomes.append(outcome)
        out, bake = self._out, outcome.bake
        if not (out.as_json or out.quiet) and len(self._bakes) > 1:
            out.line("bake", f"{len(self._outcomes)} of {len(self._bakes)}: {bake.name}")
        if outcome.error is not None and not out.as_json:
            click.echo(f"bake: {printable(outcome.error.message, lines=True)}", err=True)
        elif outcome.result is not None:
            out.tell_result(outcome.result)
        elif outcome.plan is not None and not out.as_json:
            out.show_plan(outcome.plan, bake.output)

    def finish(self, recipe: Path) -> int:
        """Say what became of all; the exit code of the first that failed, 0 if none did."""
        rest = [Outcome(bake) for bake in self._bakes[len(self._outcomes) :]]
        failed = [outcome.error for outcome in self._outcomes if outcome.error is not None]
        if self._out.as_json:
            self._out.document(run_document(recipe, [*self._outcomes, *rest], self._out.verbose))
        elif not self._bakes and not self._out.quiet:
            self._out.line("bake", "nothing: the shard has no bake")
        elif failed and len(self._bakes) > 1:
            click.echo(f"bake: {len(failed)} of {len(self._bakes)} bakes failed, {len(rest)} were not begun", err=True)
        return failed[0].exit_code if failed else 0
