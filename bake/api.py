"""The verbs as functions. Each joins the steps: plan, execute into a draft, verify, rename."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bake import __version__
from bake.errors import InputError, UsageError, VerificationFailed
from bake.execute.beside import EmbeddingFiles, check_places, embedding_sizes
from bake.execute.engine import Execution, outgrows_memory
from bake.execute.identity import run_identity
from bake.execute.task import DEFAULT_MEMORY, Options, Target
from bake.execute.undo import UndoFile, check_undo_place
from bake.interrupts import check, finished, uninterrupted
from bake.io.digest import BackgroundDigests
from bake.io.draft import Draft
from bake.io.files import check_exists, copy_file, inputs_only, open_for_writing, write_at, write_file
from bake.io.fileset import Expected, FileSet
from bake.io.header import TensorInfo, build_header
from bake.io.journal import NoJournal, Resumed
from bake.io.jsontext import parse_object
from bake.io.known import Digest
from bake.io.target import check_target, lies_in, refusal_of
from bake.io.tensorfile import open_tensors
from bake.io.writeback import Writeback
from bake.plan.build import build_plan as decide
from bake.plan.embeddings import embeddings_folder
from bake.plan.model import FilePlan, Plan, Stored, TensorPlan
from bake.plan.recipe import AdapterChoice, Recipe
from bake.plan.record import RECIPE_KEY, file_metadata
from bake.plan.replay import recipe_from_record
from bake.progress import Progress, Silent
from bake.verify.check import check_files
from bake.verify.report import Report

PathLike = str | os.PathLike[str]
AdapterLike = PathLike | tuple[PathLike, float] | AdapterChoice
Verification = Literal["none", "sample", "full"]


@dataclass(frozen=True)
class Result:
    """What a finished bake did."""

    plan: Plan
    output: Path
    survival: dict[str, float]  # component -> share of the update left after rounding
    clamped: dict[str, dict[str, int]]  # component -> tensor -> elements beyond the largest fp8 number, which stands in
    report: Report | None  # None with verify="none"
    bytes_written: int
    seconds: float
    leftover: bool  # a draft that a killed run had left was replaced
    resumed: Resumed | None  # what an earlier run had finished; None without `resume`
    undo: Path | None  # the undo file; None without `keep_undo`
    undo_bytes: int


def build_plan(
    base: PathLike,
    adapters: Iterable[AdapterLike] = (),
    *,
    also: Iterable[PathLike] = (),
    replaced: Mapping[str, PathLike] | None = None,
    layout: str = "keep",
    like: PathLike | None = None,
    shard_size: int | None = None,
    drop: Iterable[str] = (),
    ema: str = "keep",
    dtype: str | Mapping[str, str] = "keep",
    only: Iterable[str] = (),
    allow_unmatched: bool = False,
    metadata: Mapping[str, str] | None = None,
    record: bool = True,
    embeddings: str = "beside",
    rounding: str = "nearest",
    seed: int = 0,
    allow_nonfinite_base: bool = False,
    strict: bool = False,
) -> Plan:
    """Return what `fuse` would do, decided to the last byte, from headers alone. Nothing is written.

    base: a .safetensors file, a sharded or a diffusers folder. adapters: paths, (path, weight) pairs or AdapterChoice.
    also: further files of a split stack. replaced: component ("vae", "te1", ...) -> the checkpoint that it is taken
    from, or that it is added from. layout: "keep", "original" (one file) or "diffusers" (a folder; like: one whose
    configuration, tokenizer and scheduler files are taken). shard_size: bytes of a shard, at most; 0 for one file, None
    as the base is. drop: components, "ema", "training" or "rest", see docs/convert.md. ema: "use" puts averaged weights
    in the place of the others. dtype: "keep" or a key of bake.dtypes.OUTPUT_DTYPES, or a mapping from component ("te"
    for all text encoders, "all" for the rest) to these. only: components to fuse into. metadata: added to the output's.
    record: write names, weights and SHA-256 of the inputs into the output. embeddings: what becomes of token embeddings
    that travel in adapters: "beside" (files in OUTPUT.embeddings), "add" (to a diffusers folder's tokenizer and text
    encoder) or "drop". rounding: "nearest", "stochastic" or "fast", see docs/numerics.md. seed: of stochastic rounding.
    allow_nonfinite_base: elements of the base that are NaN or infinite stay as they are in tensors that are computed,
    instead of being refused. strict: refuse adapters that the base's record says are in it already, of which there is a
    warning otherwise.
    Raises every BakeError that the run could raise before it computes; see `bake.errors`.
    """
    recipe = Recipe(
        base=Path(base),
        adapters=tuple(_choice(adapter) for adapter in adapters),
        also=tuple(Path(path) for path in also),
        replaced={component: Path(path) for component, path in (replaced or {}).items()},
        layout=layout,
        like=None if like is None else Path(like),
        shard_size=shard_size,
        drop=tuple(drop),
        ema=ema,
        dtype=dtype if isinstance(dtype, str) else dict(dtype),
        only=tuple(only),
        allow_unmatched=allow_unmatched,
        metadata=dict(metadata or {}),
        record=record,
        embeddings=embeddings,
        rounding=rounding,
        seed=seed,
        allow_nonfinite_base=allow_nonfinite_base,
        strict=strict,
    )
    return plan_recipe(recipe)


def plan_recipe(recipe: Recipe) -> Plan:
    """Return the plan for `recipe`, as `build_plan` does for one that is put together from its arguments."""
    with inputs_only():
        return decide(recipe)


def _choice(adapter: AdapterLike) -> AdapterChoice:
    if isinstance(adapter, AdapterChoice):
        return adapter
    if isinstance(adapter, tuple):
        return AdapterChoice(Path(adapter[0]), float(adapter[1]))
    return AdapterChoice(Path(adapter))


def fuse(
    base: PathLike,
    adapters: Iterable[AdapterLike],
    output: PathLike,
    *,
    device: str = "auto",
    memory: int = DEFAULT_MEMORY,
    threads: int | None = None,
    verify: Verification = "sample",
    overwrite: bool = False,
    resume: bool = False,
    keep_undo: bool = False,
    progress: Progress | None = None,
    **what: Any,
) -> Result:
    """Fuse adapters into a base and write a new checkpoint; return what was done.

    The output has the layout of the base, in its dtypes unless `dtype` says otherwise. `what` is as for
    `build_plan`, the rest as for `run_plan`.
    """
    return run_plan(
        build_plan(base, adapters, **what),
        output,
        device=device,
        memory=memory,
        threads=threads,
        verify=verify,
        overwrite=overwrite,
        resume=resume,
        keep_undo=keep_undo,
        progress=progress,
    )


def run_plan(
    plan: Plan,
    output: PathLike,
    *,
    device: str = "auto",
    memory: int = DEFAULT_MEMORY,
    threads: int | None = None,
    verify: Verification = "sample",
    overwrite: bool = False,
    resume: bool = False,
    keep_undo: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Write what `plan` says to `output`: into a draft beside it, verified, then moved into place.

    device: auto, cpu, cuda, cuda:N or mps. memory: bytes for buffers. threads: that compute; None for
    one per core. verify: how much is read back and recomputed before the output appears. resume: whatever ends the
    run early, leave what is finished beside `output`, and go on from what an earlier run of the same plan left so.
    keep_undo: write an undo file beside `output`, with which `bake.undo` gives the base back.
    Raises OutputRefused and its kin, NonFinite, InputChanged, VerificationFailed. Whatever is raised,
    the output path is as it was before, unless the message says that the output is complete and in place.
    """
    started = time.monotonic()
    progress = progress or Silent()
    headers = {file.relative: _header(plan, file, None) for file in plan.files}
    sizes = {file.relative: len(headers[file.relative]) + _data_bytes(file) for file in plan.files}
    place = check_output_path(plan, output, overwrite=overwrite, keep_undo=keep_undo)
    undo = UndoFile(plan, Path(output), sizes, overwrite) if keep_undo else None
    with (
        Draft(place, sizes, overwrite, run_identity(plan, device, __version__) if resume else None) as draft,
        EmbeddingFiles(plan, embeddings_folder(Path(output)), overwrite) as beside,
        undo or nullcontext(),
    ):
        journal = draft.journal or NoJournal()
        targets = {relative: Target(draft.file(relative), len(header)) for relative, header in headers.items()}
        try:
            # The execution comes first: it may copy this process, which threads forbid.
            with (
                Execution(plan, targets, Options(device, memory, threads), progress, journal) as execution,
                BackgroundDigests([source.path for source in plan.inputs] if plan.record else []) as digests,
                Writeback([target.path for target in targets.values()], forget=outgrows_memory(plan)),
            ):
                measured = execution.run()
                _write_side_files(plan, draft)
                _write_headers(plan, targets, digests.result())
                beside.write()
                report = _verified(plan, targets, verify, beside, output, progress)
                if undo is not None:
                    undo.write(draft.file, threads, __version__, progress)
                    if verify != "none":
                        undo.check(draft.file, threads, progress)
        except OSError as error:
            raise refusal_of(error, place) from None
        _check_unchanged(plan)
        publish(draft, [beside] if undo is None else [beside, undo], Path(output))
    return Result(
        plan,
        Path(output),
        measured.survival,
        measured.clamped,
        report,
        sum(sizes.values()),
        time.monotonic() - started,
        draft.leftover or beside.leftover or (undo is not None and undo.leftover),
        None if draft.journal is None else draft.journal.resumed(draft.started_over),
        None if undo is None else undo.place,
        0 if undo is None else undo.bytes,
    )


def _check_unchanged(plan: Plan) -> None:
    """Raise InputChanged if an input is not what it was when the plan was made: verified or not, nothing is written."""
    FileSet(
        [Expected(each.path, each.size, each.modified, each.changed, each.inode) for each in plan.inputs]
    ).check_unchanged()


def publish(draft: Draft, beside: Sequence[EmbeddingFiles | UndoFile], output: Path) -> None:
    """Put the output into its place, and before it what lies beside it: where the output is, they are."""
    check()
    for each in (*beside, draft):
        each.seal()
    with uninterrupted():
        try:
            for each in (*beside, draft):
                each.publish()
        finally:
            if draft.is_published:
                finished.append(output)
            else:
                for each in beside:
                    each.withdraw()


def _verified(
    plan: Plan,
    targets: Mapping[str, Target],
    verify: Verification,
    beside: EmbeddingFiles,
    output: PathLike,
    progress: Progress,
) -> Report | None:
    """The report on the finished drafts; raises VerificationFailed if anything in it is wrong."""
    if verify == "none":
        return None
    paths = {relative: target.path for relative, target in targets.items()}
    try:
        report = check_files(plan, paths, verify == "full", progress, beside.paths)
    except InputError as error:
        if error.details.get("path") not in {str(path) for path in (*paths.values(), *beside.paths.values())}:
            raise
        raise VerificationFailed(
            f"{output} was not written: its finished draft cannot be read back: {error.message}", path=str(output)
        ) from None
    if not report.ok:
        _check_unchanged(plan)  # which would be why
        raise VerificationFailed(
            f"{output} was not written: the finished draft is not what was planned.\n{report.summary()}",
            **report.to_json(),
        )
    return report


def check_output_path(plan: Plan, output: PathLike, *, overwrite: bool = False, keep_undo: bool = False) -> Path:
    """Return where `output` really lies, or raise the OutputRefused that writing it would meet."""
    target = Path(output)
    is_folder = plan.packaging != "file"
    if not is_folder and target.suffix != ".safetensors":
        raise UsageError(f"{target}: the output is a safetensors file; let its name end in .safetensors")
    if is_folder and target.suffix == ".safetensors" and not target.is_dir():
        raise UsageError(f"{target}: the output is a folder; let its name not end in .safetensors")
    inputs = [source.path for source in plan.inputs] + ([plan.base] if is_folder else [])
    others = [model.path for model in plan.merge.models] if plan.merge is not None else []
    others += [each.path for each in plan.replaced] + ([plan.like] if plan.like is not None else [])
    inputs += [path for path in others if path.is_dir()]
    with inputs_only():
        needed = output_bytes(plan)
        if plan.base.is_dir() and lies_in(target.absolute().parent, plan.base):
            raise UsageError(f"{target} lies inside the base folder {plan.base}; choose a place outside it")
    place = check_target(target, inputs, is_folder, overwrite, needed)
    check_places(plan, embeddings_folder(target), overwrite)
    if keep_undo:
        sizes = {file.relative: len(_header(plan, file, None)) + _data_bytes(file) for file in plan.files}
        check_undo_place(plan, target, sizes, overwrite)
    return place


def output_bytes(plan: Plan) -> int:
    """Bytes of the whole output: headers, tensors, side files and the embeddings beside it."""
    weights = sum(len(_header(plan, file, None)) + _data_bytes(file) for file in plan.files)
    beside = sum(
        len(side.content.encode()) if side.content is not None else side.source.stat().st_size if side.source else 0
        for side in plan.side_files
    )
    return weights + beside + sum(embedding_sizes(plan).values())


def input_bytes(plan: Plan) -> int:
    """Bytes of tensor data that the run reads, counted once: of base or models, every factor used, and embeddings."""
    stored = [each for _, tensor in plan.tensors() for term in tensor.terms for each in term.factors.values()]
    stored += [vectors.stored for embedding in plan.embeddings for vectors in embedding.vectors]
    factors = {(each.input, each.name): each.span[1] - each.span[0] for each in stored}
    read = [each for _, tensor in plan.tensors() if not tensor.is_given for each in _sources(tensor)]
    return sum(each.span[1] - each.span[0] for each in read) + sum(factors.values())


def _sources(tensor: TensorPlan) -> list[Stored]:
    """What the values of a tensor come from that terms may change."""
    if tensor.merge is None:
        return list(tensor.copied)
    return [stored for share in tensor.merge.shares for stored in share.stored]


def _data_bytes(file: FilePlan) -> int:
    return file.tensors[-1].span[1] if file.tensors else 0


def _header(plan: Plan, file: FilePlan, digests: Sequence[Digest] | None, at_least: int = 0) -> bytes:
    tensors = {tensor.name: TensorInfo(tensor.dtype, tensor.shape, *tensor.span) for tensor in file.tensors}
    return build_header(tensors, file_metadata(plan, file, digests, __version__), at_least)


def _write_headers(plan: Plan, targets: Mapping[str, Target], digests: Sequence[Digest]) -> None:
    """Write the headers, last: until then a draft cannot be mistaken for a checkpoint."""
    for file in plan.files:
        target = targets[file.relative]
        header = _header(plan, file, digests, target.data_start)  # models that are the same are recorded once
        if len(header) != target.data_start:
            raise AssertionError(f"the header of {file.relative or 'the output'} changed its length")
        descriptor = open_for_writing(target.path)
        try:
            write_at(descriptor, memoryview(header), 0)
        finally:
            os.close(descriptor)


def _write_side_files(plan: Plan, draft: Draft) -> None:
    for side in plan.side_files:
        path = draft.file(side.relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        if side.content is not None:
            write_file(path, side.content.encode())
        elif side.source is not None:
            copy_file(side.source, path)


def check_output(
    output: PathLike,
    base: PathLike | None = None,
    adapters: Iterable[AdapterLike] = (),
    *,
    search: Iterable[PathLike] = (),
    full: bool = False,
    progress: Progress | None = None,
    **what: Any,
) -> Report:
    """Return what is wrong with `output`, recomputed from its inputs in float64.

    Without `base` the recipe stored in the output is replayed; its inputs are looked for in the
    output's folder, the current folder and those in `search`, by name and SHA-256. full: every byte
    and element, else a sample. `what` is as for `build_plan`.
    Raises InputError if the output has no recipe or an input is not found.
    """
    path, folder = Path(output), embeddings_folder(Path(output))
    with inputs_only():
        if base is None:
            folders = [*map(Path, search), Path(os.path.realpath(path)).parent, Path.cwd()]
            recipe = recipe_from_record(stored_recipe(path), folders, str(path))
            try:
                plan = decide(recipe)
            except UsageError as error:  # nobody typed it
                raise InputError(f"{path}: its recipe cannot be replayed: {error.message}", path=str(path)) from None
        else:
            plan = build_plan(base, adapters, **what)
        paths = {file.relative: path / file.relative if file.relative else path for file in plan.files}
        beside = {each.file: folder / each.file for each in plan.embeddings if each.file is not None}
        return check_files(plan, paths, full, progress or Silent(), beside)


def stored_recipe(path: Path) -> dict[str, Any]:
    """The recipe that bake stored in the checkpoint at `path`; raises InputError if there is none."""
    check_exists(path)
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        text = open_tensors(file).metadata.get(RECIPE_KEY)
        if text is not None:
            return parse_object(text.encode("utf-8", "replace"), f"{path}: its {RECIPE_KEY}", path=str(path))
    raise InputError(
        f"{path} carries no {RECIPE_KEY}: it was not written by bake, or with --no-recipe. "
        f"Name its inputs with --base and -l.",
        path=str(path),
    )


def loops() -> str:
    """What goes through the elements where torch does not: "compiled", "compiled but for products" or "NumPy"."""
    from bake.execute import kernels  # needs NumPy, which planning does without

    if kernels.compiled is None:
        return "NumPy"
    return "compiled but for products" if kernels.products is None else "compiled"
