"""Recipe -> Plan. Every refusal that can be known from headers happens here, before output exists."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bake.dtypes import DTYPES, OUTPUT_DTYPES
from bake.errors import UnmatchedModules, Unsupported, UsageError
from bake.identify.adapter import Adapter, identify_adapter
from bake.identify.checkpoint import BaseIdentity, identify_checkpoint
from bake.identify.families import FAMILIES, title
from bake.identify.quantised import quantisation_of
from bake.io.adapter import content_key, open_adapter
from bake.io.checkpoint import Checkpoint, CheckpointFile, open_checkpoint
from bake.io.header import TensorInfo, lay_out
from bake.keys.modules import Component
from bake.plan.match import AdapterMatcher, Base, Matching, check_family
from bake.plan.model import AdapterUse, FilePlan, Input, Plan, SideFile, Stored, TensorPlan, Term
from bake.plan.recipe import AdapterChoice, Recipe, is_text_encoder
from bake.plan.record import carried_metadata, history_of

_LISTED = 8  # unmatched modules spelled out in the message; all are in its details
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|shared)\.weight$")


@dataclass(frozen=True)
class _Use:
    """An adapter that takes part."""

    choice: AdapterChoice
    adapter: Adapter
    content: str


def build_plan(recipe: Recipe) -> Plan:
    """The plan for `recipe`, from headers, small stored numbers and configuration files alone.

    Raises what the run itself could only find out later or never: InputError for unreadable files,
    UnmatchedModules for modules without a place, Mismatch for other families and shapes, Unsupported
    for what bake recognises but does not fuse, UsageError for requests that contradict themselves.
    """
    checkpoint = open_checkpoint(recipe.base, recipe.also)
    uses: list[_Use] = []
    try:
        identity = identify_checkpoint(checkpoint)
        _check_recipe(recipe, identity)
        uses = _open_adapters(recipe, identity)
        tensors = {name: info for name, _, info in checkpoint.tensors()}
        if uses:
            _refuse_quantised(recipe, tensors)
        inputs = _inputs(checkpoint, uses)
        base = Base.of(identity, tensors)
        matching = Matching()
        places = _input_places(checkpoint, uses)
        for place, use in enumerate(uses):
            AdapterMatcher(base, use.adapter, use.choice, place, places[place][0], matching).run(recipe)
        _refuse_unmatched(recipe, identity, matching, uses)
        _refuse_packed(tensors, matching)
        _refuse_tied(checkpoint, identity, matching)
        return Plan(
            family=identity.family,
            layout=identity.layout,
            variant=identity.variant,
            packaging=checkpoint.packaging,
            base=recipe.base,
            inputs=inputs,
            files=_plan_files(recipe, checkpoint, identity, matching),
            side_files=_side_files(recipe, checkpoint),
            adapters=tuple(_adapter_use(use, *places[place]) for place, use in enumerate(uses)),
            components=matching.coverage(identity),
            unmatched=tuple(matching.unmatched),
            skipped=tuple(matching.skipped),
            notes=tuple(_notes(recipe, checkpoint, uses, matching)),
            settings={"dtype": recipe.dtype, "only": list(recipe.only), "allow_unmatched": recipe.allow_unmatched},
            record=recipe.record,
        )
    finally:
        checkpoint.close()
        for use in uses:
            use.adapter.source.file.close()


def _check_recipe(recipe: Recipe, identity: BaseIdentity) -> None:
    present = [component.name for component in identity.components]
    for name in recipe.only:
        if name not in present and not (name == "te" and any(map(is_text_encoder, present))):
            raise UsageError(f"--only {name}: the base has no such component; it has {', '.join(present)}")
    for choice in recipe.adapters:
        numbers = (choice.weight, choice.te, choice.unet)
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise UsageError(f"{choice.path}: a weight must be a finite number")
        if choice.rank_limit is not None and choice.rank_limit < 1:
            raise UsageError(f"{choice.path}: dyn is the number of ranks to use, at least 1")


def _open_adapters(recipe: Recipe, identity: BaseIdentity) -> list[_Use]:
    """The adapters that take part, ordered by content: the order on the command line changes no bit."""
    uses: list[_Use] = []
    try:
        for choice in recipe.adapters:
            if choice.is_off:
                continue
            source = open_adapter(choice.path)
            adapter = identify_adapter(source)
            uses.append(_Use(choice, adapter, content_key(source.file)))
            check_family(identity, adapter)
            if adapter.refusals:
                raise adapter.refusals[0]
    except BaseException:
        for use in uses:
            use.adapter.source.file.close()
        raise
    return sorted(uses, key=lambda use: (use.content, *_weights(use.choice)))


def _weights(choice: AdapterChoice) -> tuple[float, float, int]:
    return choice.weight_for("te1"), choice.weight_for("unet"), choice.rank_limit or 0


def _inputs(checkpoint: Checkpoint, uses: Sequence[_Use]) -> tuple[Input, ...]:
    inputs = [Input(part.file.path, part.file.size, part.file.modified, "base") for part in checkpoint.files]
    for use in uses:
        source = use.adapter.source
        inputs.append(Input(source.file.path, source.file.size, source.file.modified, "adapter"))
        if source.config_path is not None:
            status = source.config_path.stat()
            inputs.append(Input(source.config_path, status.st_size, status.st_mtime_ns, "config"))
    return tuple(inputs)


def _input_places(checkpoint: Checkpoint, uses: Sequence[_Use]) -> list[tuple[int, int | None]]:
    """For each adapter the places of its weights and its configuration in `_inputs`."""
    places: list[tuple[int, int | None]] = []
    following = len(checkpoint.files)
    for use in uses:
        has_config = use.adapter.source.config_path is not None
        places.append((following, following + 1 if has_config else None))
        following += 2 if has_config else 1
    return places


def _adapter_use(use: _Use, weights: int, config: int | None) -> AdapterUse:
    adapter, choice = use.adapter, use.choice
    return AdapterUse(
        name=adapter.source.name,
        input=weights,
        config=config,
        weight=choice.weight,
        te=choice.te,
        unet=choice.unet,
        rank_limit=choice.rank_limit,
        dialects=adapter.dialects,
        algorithms=adapter.algorithms,
        ranks=adapter.ranks,
        modules=len(adapter.modules),
        embeddings=adapter.embeddings,
    )


def _refuse_quantised(recipe: Recipe, names: Iterable[str]) -> None:
    found = quantisation_of(names)
    if found is not None:
        raise Unsupported(
            f"{recipe.base}: a {found[0]} checkpoint (it holds {found[1]!r}). Updates cannot be added to packed "
            f"weights: fuse into the 16-bit original and quantise the result.",
            kind=found[0],
            tensor=found[1],
        )


def _refuse_packed(tensors: dict[str, TensorInfo], matching: Matching) -> None:
    for name in matching.terms:
        if not DTYPES[tensors[name].dtype].computable:
            raise Unsupported(
                f"{name} is stored as {tensors[name].dtype}, to which an update cannot be added: "
                f"fuse into the 16-bit original.",
                tensor=name,
            )


def _refuse_tied(checkpoint: Checkpoint, identity: BaseIdentity, matching: Matching) -> None:
    """An embedding that is also the output head cannot be changed alone in one tensor."""
    architectures = checkpoint.configs.get("", {}).get("architectures") or [""]
    has_head = any(name.endswith(("lm_head.weight", "embed_out.weight")) for name, _, _ in checkpoint.tensors())
    if has_head or not str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return
    for name in matching.terms:
        if _EMBEDDING.search(name):
            raise Unsupported(
                f"the adapter updates {name}, which this model also uses as its output head (tied embeddings). "
                f"Fusing it would change both. Save the base untied first, or train without the embedding.",
                tensor=name,
            )


def _refuse_unmatched(recipe: Recipe, identity: BaseIdentity, matching: Matching, uses: Sequence[_Use]) -> None:
    total, matched = sum(matching.total.values()), sum(matching.matched.values())
    if not uses or (matched and (recipe.allow_unmatched or not matching.unmatched)):
        return
    listed = matching.unmatched[:_LISTED]
    lines = [f"{len(matching.unmatched)} of {total} adapter modules have no place in the base:"]
    lines += [
        f"  {part.modules} of {part.component} ({part.adapter}) left out: {part.reason}" for part in matching.skipped
    ]
    for entry in listed:
        nearest = f"; nearest: {entry.nearest}" if entry.nearest else ""
        lines.append(f"  {entry.module} ({entry.adapter}): {entry.reason}{nearest}")
    if len(matching.unmatched) > len(listed):
        lines.append(f"  ... and {len(matching.unmatched) - len(listed)} more (--json lists all)")
    missing_text = sorted(filter(is_text_encoder, matching.missing))
    if missing_text:
        lines.append(
            f"The base has no {', '.join(missing_text)}. Name the file that has it with --also FILE, "
            f"or leave the text encoder out with --only {_default_only(identity)}."
        )
    elif matched:
        lines.append("Use --allow-unmatched to fuse the rest.")
    else:
        lines.append("Nothing at all matched, so there is nothing to fuse.")
    known = FAMILIES.get(identity.family)
    if known is not None and not known.spelled:
        lines.append(
            f"The base is {title(identity.family)}: this version of bake fuses into it only what has its very names."
        )
    raise UnmatchedModules(
        "\n".join(lines),
        matched=matched,
        total=total,
        unmatched=[dataclasses.asdict(entry) for entry in matching.unmatched],
        components={name: dataclasses.asdict(part) for name, part in matching.coverage(identity).items()},
    )


def _default_only(identity: BaseIdentity) -> str:
    return next((part.name for part in identity.components if not is_text_encoder(part.name)), "unet")


def _plan_files(
    recipe: Recipe, checkpoint: Checkpoint, identity: BaseIdentity, matching: Matching
) -> tuple[FilePlan, ...]:
    owners = _owners(identity.components)
    planned = [_plan_tensors(recipe, place, part, owners, matching) for place, part in enumerate(checkpoint.files)]
    # A folder carries the record once: in the first file that was changed.
    recorded = next((place for place, tensors in enumerate(planned) if any(t.terms for t in tensors)), 0)
    files = []
    for place, (part, tensors) in enumerate(zip(checkpoint.files, planned, strict=True)):
        files.append(
            FilePlan(
                relative="" if checkpoint.packaging == "file" else part.relative,
                metadata=carried_metadata(part.file.metadata, identity.family, identity.layout, recipe.metadata),
                is_recorded=place == recorded,
                history=history_of(part.file.metadata) if recipe.record and place == recorded else {},
                tensors=tensors,
            )
        )
    return tuple(files)


def _owners(components: Sequence[Component]) -> list[Component]:
    """Components by falling prefix length, so that the first match owns a name."""
    return sorted(components, key=lambda component: -len(component.prefix))


def _plan_tensors(
    recipe: Recipe, place: int, part: CheckpointFile, owners: Sequence[Component], matching: Matching
) -> tuple[TensorPlan, ...]:
    stored = part.file.tensors
    dtypes = {name: _output_dtype(recipe, info) for name, info in stored.items()}
    placed = lay_out((name, dtypes[name], info.shape) for name, info in stored.items())
    tensors = []
    for name, info in placed.items():
        full = part.group + name
        source = Stored(place, name, stored[name].dtype, info.shape, (stored[name].begin, stored[name].end))
        owner = next((component.name for component in owners if full.startswith(component.prefix)), "")
        terms: Sequence[Term] = matching.terms.get(full, ())
        tensors.append(TensorPlan(name, info.shape, info.dtype, (info.begin, info.end), source, owner, tuple(terms)))
    return tuple(tensors)


def _output_dtype(recipe: Recipe, info: TensorInfo) -> str:
    """The stored dtype of an output tensor: integers, and markers of one element or none, stay as they are."""
    if recipe.dtype == "keep" or not DTYPES[info.dtype].computable or math.prod(info.shape) <= 1:
        return info.dtype
    return OUTPUT_DTYPES[recipe.dtype]


def _side_files(recipe: Recipe, checkpoint: Checkpoint) -> tuple[SideFile, ...]:
    """Everything else of the output folder; the shard indexes come last, when their shards exist."""
    files = []
    for relative in checkpoint.side_files:
        source = checkpoint.root / relative
        content: str | None = None
        group = relative.removesuffix("config.json")
        if recipe.dtype != "keep" and relative.endswith("config.json") and group in checkpoint.configs:
            content = _with_dtype(checkpoint.configs[group], recipe.dtype)
        files.append(SideFile(relative, source if content is None else None, content))
    for index in checkpoint.indexes:
        folder = index.relative.rpartition("/")[0]
        shards = [part for part in checkpoint.files if part.relative.rpartition("/")[0] == folder]
        total = sum(
            (info.nbytes * DTYPES[_output_dtype(recipe, info)].bits) // DTYPES[info.dtype].bits
            for part in shards
            for info in part.file.tensors.values()
        )
        metadata = {**(index.content.get("metadata") or {}), "total_size": total}
        text = json.dumps({**index.content, "metadata": metadata}, indent=2, ensure_ascii=False) + "\n"
        files.append(SideFile(index.relative, None, text))
    return tuple(files)


def _with_dtype(config: dict[str, Any], dtype: str) -> str | None:
    """config.json with its dtype field set to what is written; None if it has no such field."""
    name = DTYPES[OUTPUT_DTYPES[dtype]].torch
    fields = [field for field in ("torch_dtype", "dtype") if field in config]
    if not fields:
        return None
    return json.dumps({**config, **dict.fromkeys(fields, name)}, indent=2, ensure_ascii=False) + "\n"


def _notes(recipe: Recipe, checkpoint: Checkpoint, uses: Sequence[_Use], matching: Matching) -> Iterable[str]:
    for choice in recipe.adapters:
        if choice.is_off:
            yield f"{choice.path.name}: left out, its weight is 0"
    for use in uses:
        name = use.adapter.source.name
        yield from (f"{name}: {note}" for note in use.adapter.notes)
        if use.adapter.embeddings:
            tokens = ", ".join(use.adapter.embeddings)
            yield f"{name}: carries token embeddings ({tokens}), which are no weight updates and are not in the output"
        companion = use.choice.path.with_suffix(".text_encoder.pt")
        if use.choice.path.suffix == ".pt" and companion.is_file() and companion != use.choice.path:
            yield f"{name}: {companion.name} lies beside it; give it with -l too to fuse the text encoder"
    yield from matching.notes
    if checkpoint.left_out:
        yield f"not copied from the base folder: {', '.join(checkpoint.left_out)}"
