"""The verbs that make adapters: extract, resize, combine, convert. Each plans, computes into a draft, publishes."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake import __version__
from bake.errors import Unsupported, UsageError
from bake.execute.task import DEFAULT_MEMORY
from bake.identify.adapter import Adapter, identify_adapter, is_adapter
from bake.io.adapter import AdapterFile, has_adapter, open_adapter
from bake.io.digest import BackgroundDigests
from bake.io.target import check_target
from bake.io.tensorfile import read_tensor_bytes
from bake.keys.spoken import NAMES, Names
from bake.keys.written import Scaled, peft_settings
from bake.plan.adapter import ADAPTER_DTYPES, Outcome, Ranks, check_name, parse_rule
from bake.plan.combining import Combination, plan_combination
from bake.plan.extraction import ExtractionPlan, ExtractionRequest, plan_extraction
from bake.plan.inputs import inputs_of
from bake.plan.labels import carried_keys, family_keys, network_keys, record
from bake.plan.model import Input
from bake.plan.resizing import plan_resizing, resized_config, resized_metadata
from bake.plan.respelling import WRITTEN_AS, Respelled, respell
from bake.progress import Progress, Silent

if TYPE_CHECKING:
    from bake.execute.adapter_file import NewAdapter

PathLike = str | os.PathLike[str]
WeightedPath = PathLike | tuple[PathLike, float]

_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class AdapterResult:
    """A finished adapter, and how far it is from what it stands for."""

    verb: str
    output: Path
    family: str
    names: str  # the dialect
    modules: tuple[Outcome, ...]
    notes: tuple[str, ...]
    bytes_written: int
    seconds: float
    leftover: bool  # a draft that a killed run had left was replaced

    @property
    def error(self) -> float:
        """|what was to be expressed - what the adapter says| / |what was to be expressed|, of all together."""
        return _error(self.modules)

    @property
    def left_out(self) -> float:
        """The share of that norm which lies in differences that are not stored at all."""
        lost = math.sqrt(math.fsum(each.norm**2 for each in self.modules if each.kind == "left-out"))
        total = math.sqrt(math.fsum(each.norm**2 for each in self.modules))
        return lost / total if total else 0.0

    @property
    def components(self) -> dict[str, tuple[Outcome, ...]]:
        """Component -> its modules."""
        names = dict.fromkeys(each.component for each in self.modules)
        return {name: tuple(each for each in self.modules if each.component == name) for name in names}

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur."""
        return tuple(sorted({each.rank for each in self.modules if each.rank is not None}))

    @property
    def counts(self) -> dict[str, int]:
        """How many parameters became what; see `Outcome.kind`."""
        return dict(sorted(Counter(each.kind for each in self.modules).items()))


def _error(modules: Sequence[Outcome]) -> float:
    total = math.fsum(each.norm**2 for each in modules)
    return math.sqrt(math.fsum(each.residual**2 for each in modules) / total) if total else 0.0


def component_error(modules: Sequence[Outcome]) -> float:
    """The same of some modules."""
    return _error(modules)


def extract(
    tuned: PathLike,
    base: PathLike,
    output: PathLike,
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    keep: str | None = None,
    clamp_quantile: float | None = None,
    svd: str = "auto",
    seed: int = 0,
    names: str | None = None,
    dtype: str = "fp16",
    only: Iterable[str] = (),
    full_rest: bool = False,
    dora: bool = False,
    allow_unmatched: bool = False,
    metadata: Mapping[str, str] | None = None,
    record: bool = True,
    memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AdapterResult:
    """Write the adapter that makes `tuned` of `base`; return what was done, with the error of every module.

    tuned, base: checkpoints of one family, in any layouts and dtypes. rank: of each module, at most, 64 for None.
    conv_rank: of convolutions larger than 1x1; None: as `rank`. keep: "RULE=NUMBER", which keeps fewer, see
    docs/adapters.md. clamp_quantile: cut factors off at this quantile of their magnitudes. svd: auto, exact or
    randomised, with `seed`. names: kohya, diffusers or peft (a folder); None: the family's usual ones. dtype: of the
    factors, fp16, bf16 or fp32. only: components. full_rest: store norms, biases and embeddings whole. dora: with
    magnitudes. memory: bytes of a difference that is held, larger ones are read again.
    Raises the BakeErrors that `plan_extraction` and the output's place can meet, and NonFinite.
    """
    request = extraction_request(
        *(tuned, base),
        rank=rank,
        conv_rank=conv_rank,
        keep=keep,
        clamp_quantile=clamp_quantile,
        svd=svd,
        seed=seed,
        names=names,
        only=only,
        full_rest=full_rest,
        dora=dora,
        allow_unmatched=allow_unmatched,
    )
    return run_extraction_plan(
        plan_extraction(request),
        output,
        dtype=dtype,
        metadata=metadata,
        record=record,
        memory=memory,
        overwrite=overwrite,
        progress=progress,
    )


def extraction_request(
    tuned: PathLike,
    base: PathLike,
    *,
    rank: int | None,
    conv_rank: int | None,
    keep: str | None,
    clamp_quantile: float | None,
    svd: str,
    seed: int,
    names: str | None,
    only: Iterable[str],
    full_rest: bool,
    dora: bool,
    allow_unmatched: bool,
) -> ExtractionRequest:
    """What `plan_extraction` takes, of arguments as for `extract`. Raises UsageError."""
    ranks = _ranks(rank, conv_rank, keep, clamp_quantile, svd, seed)
    return ExtractionRequest(*(Path(tuned), Path(base), names, ranks, tuple(only), full_rest, dora, allow_unmatched))


def check_adapter_place(plan: ExtractionPlan, output: Path, overwrite: bool) -> None:
    """Raise the OutputRefused that writing the adapter to `output` would meet."""
    _Making("extract", output, plan.names, plan.inputs, overwrite, False, None)


def run_extraction_plan(
    plan: ExtractionPlan,
    output: PathLike,
    *,
    dtype: str = "fp16",
    metadata: Mapping[str, str] | None = None,
    record: bool = True,
    memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AdapterResult:
    """Write the adapter that `plan` describes; arguments as for `extract`."""
    from bake.execute.extract import run_extraction

    _check_dtype(dtype, ())
    making = _Making("extract", Path(output), plan.names, plan.inputs, overwrite, record, metadata)
    request = plan.request
    settings = {**_settings_of(request.ranks), "dtype": dtype, "dora": request.dora, "full_rest": request.rest}
    with making.draft() as new:
        outcomes = run_extraction(plan, new, dtype, memory, progress or Silent())
        if new.is_empty:
            raise UsageError(f"{request.tuned} and {request.base} do not differ: there is nothing to extract")
        loras = [each for each in outcomes if each.kind == "lora"]
        paths = {(each.module, each.parameter): each for each in plan.differences}
        scaled = {
            paths[each.module, each.parameter].path: (each.component, Scaled(each.rank or 0, float(each.rank or 0)))
            for each in loras
        }
        config = _configured(plan.names, scaled, plan.prefixes, request.dora, plan.stored_in_out)
        if plan.names == "peft":
            config |= _saved_whole(plan, outcomes, request.base)
        keys = family_keys(plan.family, plan.variant, request.tuned.stem)
        return making.finish(new, plan.family, outcomes, scaled, keys, config, settings, plan.notes)


def _saved_whole(plan: ExtractionPlan, outcomes: Sequence[Outcome], base: Path) -> dict[str, Any]:
    """What a PEFT configuration says of modules that are stored whole, and of the base."""
    layers = {each.module for each in plan.differences if each.low_rank}
    paths = {each.module: each.path for each in plan.differences}
    whole = sorted({paths[each.module] for each in outcomes if each.kind == "full" and each.module not in layers})
    biases = any(each.kind == "full" and each.module in layers for each in outcomes)
    return {
        "base_model_name_or_path": str(base),
        "modules_to_save": whole or None,
        "bias": "lora_only" if biases else "none",
    }


def resize(
    adapter: PathLike,
    output: PathLike,
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    keep: str | None = None,
    clamp_quantile: float | None = None,
    dtype: str = "keep",
    metadata: Mapping[str, str] | None = None,
    record: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AdapterResult:
    """Write `adapter` with other ranks, its names and alpha / rank unchanged; return the error of every module.

    What is no LoRA is copied. Arguments as for `extract`; dtype "keep": each factor's own.
    """
    from bake.execute.resize import run_resizing

    if rank is None and conv_rank is None and keep is None:
        raise UsageError("nothing to do: say the new rank with --rank, or a rule with --keep")
    _check_dtype(dtype, ("keep",))
    ranks = _ranks(rank, conv_rank, keep, clamp_quantile, "auto", 0)
    with _opened([adapter]) as (found,):
        plan = plan_resizing(found, ranks)
        names: Names = "kohya" if WRITTEN_AS.get(found.dialects[0]) == "kohya" else "diffusers"
        if found.source.config is not None:
            names = "peft"
        making = _Making("resize", Path(output), names, _inputs_of([found.source]), overwrite, record, metadata)
        with making.draft() as new:
            outcomes, scaled = run_resizing(plan, found.source.file, new, dtype, progress or Silent())
            keys = carried_keys(found.source.file.metadata) | resized_metadata(found, scaled)
            notes = (f"{plan.others} modules that are no LoRA are copied as they are",) if plan.others else ()
            return making.finish(
                *(new, found.family or "unknown", outcomes),
                *({name: ("", each) for name, each in scaled.items()}, keys, resized_config(found, scaled)),
                *({**_settings_of(ranks), "dtype": dtype}, notes),
            )


def combine(
    adapters: Iterable[WeightedPath],
    output: PathLike,
    *,
    method: str = "concat",
    density: float | None = None,
    seed: int = 0,
    rank: int | None = None,
    conv_rank: int | None = None,
    keep: str | None = None,
    clamp_quantile: float | None = None,
    svd: str = "auto",
    names: str | None = None,
    dtype: str = "keep",
    only: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
    record: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AdapterResult:
    """Write one adapter for several; return how far each of its modules is from the weighted sum, or what else it is.

    adapters: paths or (path, weight) pairs, LoRAs of one family in any dialects. method: concat is exact, its ranks add
    up; svd (linear) is the same sum brought to a rank; ties, dare_linear, dare_ties and magnitude_prune are PEFT's, on
    whole updates, with `density`. seed: of the random ones. names: None for the first adapter's. dtype "keep": the
    widest of a module's. Other arguments as for `extract`; rank None: the largest of a module's.
    """
    from bake.execute.combine import run_combination

    _check_dtype(dtype, ("keep",))
    weighted = [each if isinstance(each, tuple) else (each, 1.0) for each in adapters]
    combination = Combination(method, density, seed)
    ranks = _ranks(rank, conv_rank, keep, clamp_quantile, svd, seed if method != "concat" else 0)
    with _opened([path for path, _ in weighted]) as found:
        plan = plan_combination(
            *(found, [float(weight) for _, weight in weighted], combination, ranks),
            *(_chosen(names), tuple(only)),
        )
        sources = [each.source for each in found]
        making = _Making("combine", Path(output), plan.names, _inputs_of(sources), overwrite, record, metadata)
        with making.draft() as new:
            outcomes, scaled = run_combination(
                *(plan, [source.file for source in sources], [source.name for source in sources]),
                *(new, dtype, progress or Silent()),
            )
            title = " + ".join(
                f"{Path(source.name).stem} ({weight:g})" for source, (_, weight) in zip(sources, weighted, strict=True)
            )
            settings = {
                **_settings_of(ranks),
                **{"method": method, "density": density, "seed": seed, "dtype": dtype},
                "weights": [weight for _, weight in weighted],
            }
            prefixes = {name: prefix for each in plan.adapters for name, prefix in each.prefixes.items()}
            config = _configured(plan.names, scaled, prefixes, False, _is_flipped(found))
            keys = family_keys(plan.family, None, title)
            return making.finish(new, plan.family, outcomes, scaled, keys, config, settings, ())


def convert(
    source: PathLike,
    output: PathLike,
    *,
    names: str,
    base: PathLike | None = None,
    fold_alpha: bool = False,
    dtype: str = "keep",
    only: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
    record: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AdapterResult:
    """Write an adapter in the names of another dialect; factors keep their bytes unless a projection is cut or joined.

    source: an adapter. names: kohya, diffusers or peft (a folder). base: a checkpoint of its family, in which names are
    looked up that the tables of the family do not list. fold_alpha: multiply alpha / rank into the factors,
    for programs that read no alpha. dtype: "keep", fp16, bf16 or fp32. only: components.
    Raises Unsupported for what the dialect has no names for.
    """
    from bake.execute.convert import run_conversion

    _check_dtype(dtype, ("keep",))
    with _opened([source]) as (found,):
        chosen = _chosen(names)
        assert chosen is not None
        plan = respell(found, chosen, tuple(only), None if base is None else Path(base))
        making = _Making("convert", Path(output), chosen, _inputs_of([found.source]), overwrite, record, metadata)
        with making.draft() as new:
            outcomes, scaled = run_conversion(
                *(plan, found.source.file, found.source.name, new, dtype, fold_alpha, progress or Silent())
            )
            for name in found.embeddings if chosen == "kohya" else ():  # their names are not the dialect's
                info = found.source.file.tensors[name]
                new.add_bytes(name, info.dtype, info.shape, read_tensor_bytes(found.source.file, name))
            dora = any(update.magnitude for module in found.modules for update in module.updates)
            config = _configured(chosen, scaled, plan.prefixes, dora, _is_flipped([found]), _has_up_bias(found))
            keys = family_keys(plan.family, None, Path(found.source.name).stem)
            keys |= carried_keys(found.source.file.metadata)
            settings = {"names": chosen, "fold_alpha": fold_alpha, "dtype": dtype}
            notes = _conversion_notes(plan, found, scaled)
            return making.finish(new, plan.family, outcomes, scaled, keys, config, settings, notes)


def _has_up_bias(adapter: Adapter) -> bool:
    return adapter.config is not None and adapter.config.lora_bias


def _is_flipped(adapters: Sequence[Adapter]) -> bool:
    return any(adapter.config is not None and adapter.config.fan_in_fan_out for adapter in adapters)


def _conversion_notes(plan: Respelled, adapter: Adapter, scaled: Mapping[str, tuple[str, Scaled]]) -> tuple[str, ...]:
    """What the user has to know about the result."""
    notes = []
    count = sum(each.alpha != each.rank for _, each in scaled.values())
    if plan.names == "diffusers" and count:
        notes.append(
            f"{count} modules count alpha / rank times, which is not 1: it is written into {_METADATA}, which "
            f"diffusers reads since 0.34 and ComfyUI does not. --fold-alpha multiplies it into the factors."
        )
    if adapter.embeddings and plan.names != "kohya":
        notes.append(f"token embeddings are left out ({', '.join(adapter.embeddings)}): they have no names there")
    kept = sum(len(module.shares) for module in plan.modules)
    if kept < len(adapter.modules):
        notes.append(f"{len(adapter.modules) - kept} modules of other components are left out")
    return tuple(notes)


class _Making:
    """What the verbs have in common: where the output goes, what it says about itself, how it gets there."""

    def __init__(
        self,
        verb: str,
        output: Path,
        names: Names,
        inputs: Sequence[Input],
        overwrite: bool,
        record: bool,
        metadata: Mapping[str, str] | None,
    ) -> None:
        """Raises the OutputRefused that writing `output` would meet."""
        self.verb, self.output, self.names, self.inputs = verb, output, names, tuple(inputs)
        self.record, self.metadata = record, dict(metadata or {})
        self.started = time.monotonic()
        check_name(output, names)
        self.overwrite = overwrite
        self.place = check_target(output, [source.path for source in inputs], names == "peft", overwrite, 0)

    @contextmanager
    def draft(self) -> Iterator[NewAdapter]:
        """The output under construction, while the inputs are hashed beside it."""
        from bake.execute.adapter_file import NewAdapter

        with (
            NewAdapter(self.place, self.names, self.overwrite) as new,
            BackgroundDigests([source.path for source in self.inputs] if self.record else []) as digests,
        ):
            self._digests = digests
            yield new

    def finish(
        self,
        new: NewAdapter,
        family: str,
        outcomes: Sequence[Outcome],
        scaled: Mapping[str, tuple[str, Scaled]],
        keys: Mapping[str, str],
        config: Mapping[str, Any] | None,
        settings: Mapping[str, Any],
        notes: Sequence[str],
    ) -> AdapterResult:
        """Publish what is in `new` with its metadata. config: of a PEFT adapter, or for diffusers' metadata."""
        metadata = dict(keys)
        if self.names == "kohya" and scaled:
            metadata |= network_keys((each.rank, each.alpha) for _, each in scaled.values())
        if config is not None and self.names != "peft":
            metadata |= config
        if self.record:
            error = {"error": _error(outcomes)}
            metadata |= record(self.verb, __version__, self.inputs, self._digests.result(), {**settings, **error})
        size = new.publish(metadata | self.metadata, config if self.names == "peft" else None)
        return AdapterResult(
            *(self.verb, self.output, family, self.names, tuple(outcomes), tuple(notes), size),
            *(time.monotonic() - self.started, new.leftover),
        )


def _configured(
    names: Names,
    scaled: Mapping[str, tuple[str, Scaled]],
    prefixes: Mapping[str, str],
    dora: bool,
    fan_in_fan_out: bool,
    lora_bias: bool = False,
) -> dict[str, Any]:
    """What says ranks and alphas beside the tensors: PEFT's configuration, or diffusers' metadata with one per part."""
    if names == "kohya" or not scaled:
        return {}
    parts: dict[str, dict[str, Scaled]] = {}
    for path, (component, each) in scaled.items():
        parts.setdefault(component, {})[path] = each
    if names == "peft":
        (only,) = parts.values()
        return peft_settings(only, dora, lora_bias, fan_in_fan_out)
    settings = {
        f"{prefixes[component]}{key}": value
        for component, modules in parts.items()
        for key, value in peft_settings(modules, dora, lora_bias, fan_in_fan_out).items()
    }
    return {_METADATA: json.dumps(settings)}


@contextmanager
def _opened(paths: Sequence[PathLike]) -> Iterator[list[Adapter]]:
    """The adapters at `paths`, identified; raises Unsupported for what is none."""
    with ExitStack() as closing:
        found = []
        for path in map(Path, paths):
            if path.is_dir() and not has_adapter(path):
                raise _no_adapter(path)
            source = open_adapter(path)
            closing.callback(source.file.close)
            if not is_adapter(source) and source.config is None:
                raise _no_adapter(path)
            found.append(identify_adapter(source))
        yield found


def holds_adapter(path: Path) -> bool:
    """True if there is an adapter at `path`."""
    if path.is_dir() and not has_adapter(path):
        return False
    source = open_adapter(path)
    source.file.close()
    return is_adapter(source) or source.config is not None


def _no_adapter(path: Path) -> Unsupported:
    return Unsupported(
        f"{path} is no adapter, and only adapters are resized and combined here. "
        f"'bake inspect {path}' says what it is.",
        path=str(path),
    )


def _inputs_of(sources: Iterable[AdapterFile]) -> list[Input]:
    return [each for source in sources for each in inputs_of(source)]


def _ranks(
    rank: int | None, conv_rank: int | None, keep: str | None, clamp: float | None, svd: str, seed: int
) -> Ranks:
    rule, parameter = ("fixed", 0.0) if keep is None else parse_rule(keep)
    return Ranks(rank, conv_rank, rule, parameter, clamp, svd, seed)


def _settings_of(ranks: Ranks) -> dict[str, Any]:
    rule = None if ranks.rule == "fixed" else f"{ranks.rule}={ranks.parameter:g}"
    return {"rank": ranks.rank, "conv_rank": ranks.conv_rank, "keep": rule, "clamp_quantile": ranks.clamp}


def _check_dtype(dtype: str, more: Sequence[str]) -> None:
    known = (*more, *ADAPTER_DTYPES)
    if dtype not in known:
        raise UsageError(f"--dtype {dtype}: unknown; it is {', '.join(known)}")


def _chosen(names: str | None) -> Names | None:
    """The dialect called `names`; raises UsageError if there is none."""
    found = next((each for each in NAMES if each == names), None)
    if names is not None and found is None:
        raise UsageError(f"--names {names}: unknown; it is {', '.join(NAMES)}")
    return found
