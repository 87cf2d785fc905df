"""The bakes of a recipe file, as functions: what `bake run` does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from bake.api import PathLike, Result, check_output_path, output_bytes, plan_recipe, run_plan
from bake.errors import BakeError, NoSpace, UsageError
from bake.interrupts import due
from bake.io.files import inputs_only
from bake.keys.nearest import nearest_names
from bake.plan.model import Plan
from bake.plan.recipe import MergeChoice, Recipe
from bake.progress import Progress
from bake.recipes.read import Bake, read_recipe
from bake.sizes import format_bytes


@dataclass(frozen=True)
class Outcome:
    """What became of one bake: planned, done, or refused; None of these if an earlier one ended the run."""

    bake: Bake
    plan: Plan | None = None
    result: Result | None = None
    error: BakeError | None = None


def read_bakes(
    recipe: PathLike,
    *,
    output: PathLike | None = None,
    select: Iterable[str] = (),
    shard: tuple[int, int] | None = None,
) -> tuple[Bake, ...]:
    """The bakes of a recipe file that are asked for, in its order.

    output: where the only bake of a recipe is written, whatever it says itself. select: names or outputs of bakes.
    shard: (i, n) for every n-th of these from the i-th on, counted from 1, so that n machines share the work.
    Raises what `bake.recipes.read.read_recipe` raises, and UsageError for selections that mean none, and for bakes
    that write the same place or read what another one writes.
    """
    bakes = read_recipe(Path(recipe)).bakes
    if output is not None:
        if len(bakes) > 1:
            raise UsageError(f"{recipe} has {len(bakes)} bakes; their outputs are named in it, and -o is for one alone")
        bakes = (replace(bakes[0], output=Path(output)),)
    _check_places(bakes)
    chosen = _selected(bakes, tuple(select))
    if shard is None:
        return chosen
    number, count = shard
    if not 1 <= number <= count:
        raise UsageError(f"shard {number}/{count}: the first number is from 1 to the second")
    return chosen[number - 1 :: count]


def _selected(bakes: tuple[Bake, ...], wanted: Sequence[str]) -> tuple[Bake, ...]:
    """Those called so, or written there; all if nothing is wanted."""
    if not wanted:
        return bakes
    words = [{each.name, *(() if each.output is None else (each.output.name, str(each.output)))} for each in bakes]
    for word in wanted:
        if not any(word in mine for mine in words):
            near = nearest_names(word, sorted(set().union(*words)), 1)
            hint = f"is it {near[0]}?" if near else f"there are {', '.join(each.name for each in bakes)}"
            raise UsageError(f"no bake is called {word!r}; {hint}")
    return tuple(each for each, mine in zip(bakes, words, strict=True) if mine.intersection(wanted))


def _check_places(bakes: Sequence[Bake]) -> None:
    """Raise UsageError if two bakes write the same place, or one reads what another writes."""
    writers: dict[Path, Bake] = {}
    for bake in bakes:
        if bake.output is None:
            continue
        place = _real(bake.output)
        if place in writers:
            other = writers[place]
            bake.mark.refuse(f"{bake.output} is the output of the bake in line {other.mark.line} too")
        writers[place] = bake
    inside: dict[Path, list[Bake]] = {}  # folder -> who writes into it, at any depth
    for place, bake in writers.items():
        around = next((writers[parent] for parent in place.parents if parent in writers), None)
        if around is not None:
            line = around.mark.line
            bake.mark.refuse(f"{bake.output} lies in {around.output}, the output of the bake in line {line}")
        for parent in place.parents:
            inside.setdefault(parent, []).append(bake)
    for bake in bakes:
        for path in inputs_of(bake.recipe):
            place = _real(path)
            near = [writers[each] for each in (place, *place.parents) if each in writers] + inside.get(place, [])
            writer = next((each for each in near if each is not bake), None)
            if writer is not None:
                _refuse_chain(bake, path, writer)


def _refuse_chain(reader: Bake, path: Path, writer: Bake) -> NoReturn:
    raise reader.placed(
        UsageError(
            f"{path} is what the bake in line {writer.mark.line} writes, or contains it. All bakes of a recipe are "
            f"planned from what is there before the first one: do both in one bake, or write two recipes",
            path=str(path),
        )
    )


def _real(path: Path) -> Path:
    return Path(os.path.normcase(os.path.realpath(path)))


def inputs_of(recipe: Recipe) -> Iterator[Path]:
    """Every file or folder that a recipe names."""
    if isinstance(recipe.base, MergeChoice):
        yield from recipe.base.models
        if recipe.base.base is not None:
            yield recipe.base.base
    else:
        yield recipe.base
    yield from recipe.also
    yield from recipe.replaced.values()
    if recipe.like is not None:
        yield recipe.like
    yield from (choice.path for choice in recipe.adapters)


def plan_bake(bake: Bake) -> Plan:
    """The plan of one bake. Raises every BakeError that the run could raise before it computes, with its place."""
    try:
        return plan_recipe(bake.recipe)
    except BakeError as error:
        raise bake.placed(error) from None


def plan_bakes(bakes: Sequence[Bake], options: Mapping[str, Any], keep_going: bool = False) -> Iterator[Outcome]:
    """Plan one bake after the other, with every refusal that headers tell, of outputs and disks too.

    options: what `run_bakes` is given. keep_going: an Outcome holds a refusal, instead of its being raised.
    """
    free: dict[int, int] = {}  # device -> bytes left by the bakes before
    for bake in bakes:
        try:
            plan = plan_bake(bake)
            if bake.output is not None:
                _check_output(bake, plan, bake.output, options, free)
        except BakeError as error:
            if not keep_going:
                raise
            yield Outcome(bake, error=error)
        else:
            yield Outcome(bake, plan)


def _check_output(bake: Bake, plan: Plan, output: Path, options: Mapping[str, Any], free: dict[int, int]) -> None:
    """Raise the OutputRefused that writing this output would meet, after those before it."""
    chosen = _options(bake, options)
    flags = {name: bool(chosen.get(name)) for name in ("overwrite", "keep_undo")}
    try:
        place = check_output_path(plan, output, **flags)
        with inputs_only():
            device = place.parent.stat().st_dev
            left = free.setdefault(device, shutil.disk_usage(place.parent).free)
            needed, replaced = output_bytes(plan), _size(place)
        if needed > left:
            raise NoSpace(
                f"{output}: the output takes {format_bytes(needed)}, the bakes before it leave {format_bytes(left)}",
                path=str(output),
                needed=needed,
                free=left,
            )
    except BakeError as error:
        raise bake.placed(error) from None
    free[device] = left - needed + replaced


def _size(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def run_bakes(
    bakes: Sequence[Bake],
    *,
    keep_going: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[Outcome]:
    """Plan all bakes, then do one after the other; yield what became of each, as soon as that is known.

    A refusal that headers tell is raised before anything is written; what only the run finds out ends it, as the last
    Outcome. keep_going: neither ends it; the bakes that can be done are done. `options` are as for `run_plan`; what is
    not given, or None, is as the recipe says.
    """
    for bake in bakes:
        if bake.output is None:
            bake.mark.refuse("there is no output; name it here, or with -o")
    planned = list(_without_plans(plan_bakes(bakes, options, keep_going), len(bakes)))
    due[:] = [bake.output for bake in bakes if bake.output is not None]
    for number, outcome in enumerate(planned, 1):
        if outcome.error is not None:
            yield outcome
            continue
        done = _run(outcome, options, _Numbered(progress, number, len(bakes)) if progress is not None else None)
        yield done
        if done.error is not None and not keep_going:
            return


class _Numbered:
    """Progress that says which of several bakes a task belongs to."""

    def __init__(self, inner: Progress, number: int, count: int) -> None:
        self._inner = inner
        self._label = f"{number}/{count} " if count > 1 else ""

    def start(self, task: str, total: int) -> None:
        self._inner.start(self._label + task, total)

    def advance(self, count: int) -> None:
        self._inner.advance(count)

    def finish(self) -> None:
        self._inner.finish()


def _without_plans(outcomes: Iterable[Outcome], count: int) -> Iterator[Outcome]:
    """Plans of many bakes are made again when it is their turn: all of them at once may be more than fits."""
    return (outcome if count == 1 else replace(outcome, plan=None) for outcome in outcomes)


def _run(outcome: Outcome, options: Mapping[str, Any], progress: Progress | None) -> Outcome:
    bake = outcome.bake
    assert bake.output is not None
    try:
        plan = outcome.plan or plan_bake(bake)
        result = run_plan(plan, bake.output, progress=progress, **_options(bake, options))
    except BakeError as error:
        return Outcome(bake, error=bake.placed(error))
    finally:
        if progress is not None:
            progress.finish()
    return Outcome(bake, plan, result)


def _options(bake: Bake, options: Mapping[str, Any]) -> dict[str, Any]:
    """How a bake is run: as was asked for, else as the recipe says."""
    return {**bake.run, **{key: value for key, value in options.items() if value is not None}}


def run_recipe(
    recipe: PathLike,
    *,
    output: PathLike | None = None,
    select: Iterable[str] = (),
    shard: tuple[int, int] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[Result]:
    """Do the bakes of a recipe file; return what was done, in the order of the recipe.

    recipe: a file as docs/recipes.md describes it, or a configuration of mergekit. output, select, shard: as for
    `read_bakes`. `options` are as for `run_plan`, and count for every bake, whatever the recipe says.
    Raises every BakeError, with line and column in the recipe; those that headers tell before anything is written.
    """
    results = []
    for outcome in run_bakes(
        read_bakes(recipe, output=output, select=select, shard=shard), progress=progress, **options
    ):
        if outcome.error is not None:
            raise outcome.error
        assert outcome.result is not None
        results.append(outcome.result)
    return results
