"""Recipe -> Plan. Every refusal that can be known from headers happens here, before output exists."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from bake.errors import UsageError
from bake.garbage import without_collecting
from bake.identify.adapter import Adapter, identify_adapter
from bake.identify.checkpoint import BaseIdentity
from bake.io.adapter import content_key, open_adapter
from bake.io.checkpoint import Checkpoint, open_checkpoint
from bake.plan.arranged import Arranged, arranged
from bake.plan.base import check_family
from bake.plan.casts import Casting, check_casts
from bake.plan.doubles import note_repeated, warn_of_doubles
from bake.plan.embeddings import embedding_notes, plan_embeddings
from bake.plan.files import plan_files, plan_side_files, updated_indexes
from bake.plan.heads import base_of, settle_heads
from bake.plan.inputs import inputs_of
from bake.plan.layout import lay_out_as
from bake.plan.match import AdapterMatcher, Matching
from bake.plan.merge import merge_models
from bake.plan.model import AdapterUse, FilePlan, Input, Plan, SideFile
from bake.plan.pruning import prune
from bake.plan.recipe import AdapterChoice, MergeChoice, Recipe
from bake.plan.refuse import check_only, refuse_packed, refuse_quantised, refuse_unmatched
from bake.plan.replacing import replace_components
from bake.plan.sharding import Packed, pack

_EMA = "model_ema."  # where training code keeps averaged weights


@dataclass(frozen=True)
class _Use:
    """An adapter that takes part."""

    choice: AdapterChoice
    adapter: Adapter
    content: str  # its content key

    @property
    def order(self) -> tuple[str, float, float, int, str]:
        """By content: the order on the command line changes no bit."""
        choice = self.choice
        selected = "" if choice.selection is None else json.dumps(choice.selection.to_json(), sort_keys=True)
        return self.content, choice.weight_for("te1"), choice.weight_for("unet"), choice.rank_limit or 0, selected


def build_plan(recipe: Recipe) -> Plan:
    """The plan for `recipe`, from headers, small stored numbers and configuration files alone.

    Raises what the run itself could only find out later or never: InputError for unreadable files,
    UnmatchedModules for modules without a place, Mismatch for other families and shapes, Unsupported
    for what bake recognises but does not fuse, UsageError for requests that contradict themselves.
    """
    with ExitStack() as opened:
        opened.enter_context(without_collecting())
        base = _arrange(recipe, opened)
        checkpoint, identity = base.checkpoint, base.identity
        _check_recipe(recipe, identity)
        check_casts(recipe, identity.components)
        uses = _open_adapters(recipe, identity, opened)
        warnings = warn_of_doubles(recipe, base.records, [(use.adapter.source, use.choice) for use in uses])
        inputs, adapters = _list_inputs(base.inputs, uses)
        if uses or recipe.converts:
            refuse_quantised(base.base, checkpoint, base.scaled)
        matching = _match(recipe, checkpoint, identity, uses, adapters, base.scaled.beside)
        identified = [(described, use.adapter) for described, use in zip(adapters, uses, strict=True)]
        embeddings, growth = plan_embeddings(recipe, checkpoint, identity, identified)
        casting = Casting(recipe, identity.components, base.scaled, matching, growth)
        files = plan_files(recipe, base, matching, growth, casting)
        side_files = plan_side_files(recipe, base, growth, matching)
        packed = _packed(recipe, checkpoint, files, side_files)
        return Plan(
            family=identity.family,
            layout=identity.layout,
            variant=identity.variant,
            packaging=packed.packaging,
            base=base.base,
            base_packaging=base.packaging,
            inputs=inputs,
            files=packed.files,
            side_files=packed.side_files,
            adapters=adapters,
            components=matching.coverage(identity) if recipe.adapters else dict(base.merged),
            unmatched=tuple(matching.unmatched),
            skipped=tuple(matching.skipped),
            notes=(
                *base.notes,
                *_notes(recipe, checkpoint, uses, matching),
                *embedding_notes(recipe, adapters, embeddings),
                *packed.notes,
            ),
            settings={
                "layout": recipe.layout,
                "shard_size": recipe.shard_size,
                "drop": list(recipe.drop),
                "ema": recipe.ema,
                "dtype": recipe.plain_dtype,
                "only": list(recipe.only),
                "allow_unmatched": recipe.allow_unmatched,
                "embeddings": recipe.embeddings,
                "rounding": recipe.rounding,
                "seed": recipe.seed,
                "allow_nonfinite_base": recipe.allow_nonfinite_base,
            },
            record=recipe.record,
            warnings=warnings,
            embeddings=embeddings,
            rounding=recipe.rounding,
            seed=recipe.seed,
            merge=base.merging,
            replaced=base.replaced,
            like=base.like,
        )


def _arrange(recipe: Recipe, opened: ExitStack) -> Arranged:
    """The base that adapters are fused into."""

    def shaped(base: Arranged) -> Arranged:
        return lay_out_as(prune(base, recipe.drop, recipe.ema), recipe.layout, recipe.like, recipe.replaced.keys())

    if isinstance(recipe.base, MergeChoice):
        if recipe.rounding == "fast":
            raise UsageError("--rounding fast: merges have nearest and stochastic")
        base = merge_models(recipe.base, recipe.replaced.keys(), shaped, opened)
    else:
        checkpoint = open_checkpoint(recipe.base, recipe.also)
        opened.callback(checkpoint.close)
        base = shaped(arranged(checkpoint))
    return replace_components(base, recipe.replaced, opened)


def _packed(
    recipe: Recipe, checkpoint: Checkpoint, files: tuple[FilePlan, ...], side_files: tuple[SideFile, ...]
) -> Packed:
    """The files of the output: as the base's are, or in as many as were asked for."""
    if recipe.shard_size is None:
        return Packed(checkpoint.packaging, files, (*side_files, *updated_indexes(checkpoint, files)))
    return pack(files, side_files, checkpoint.packaging, recipe.shard_size)


def _check_recipe(recipe: Recipe, identity: BaseIdentity) -> None:
    check_only(recipe.only, identity, "the base")
    for key, text in recipe.metadata.items():
        if not _is_unicode(key + text):
            raise UsageError(f"--metadata {key!r}: {text!r} is no Unicode text, which is all that a header can hold")
    for choice in recipe.adapters:
        numbers = (choice.weight, choice.te, choice.unet)
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise UsageError(f"{choice.path}: a weight must be a finite number")
        if choice.rank_limit is not None and choice.rank_limit < 1:
            raise UsageError(f"{choice.path}: dyn is the number of ranks to use, at least 1")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _open_adapters(recipe: Recipe, identity: BaseIdentity, opened: ExitStack) -> list[_Use]:
    """The adapters that take part: in canonical order, or as the user has them where one transforms the weights."""
    uses: list[_Use] = []
    for choice in recipe.adapters:
        if choice.is_off:
            continue
        source = open_adapter(choice.path)
        opened.callback(source.file.close)
        adapter = identify_adapter(source)
        check_family(identity, adapter)
        if adapter.refusals:
            raise adapter.refusals[0]
        uses.append(_Use(choice, adapter, content_key(source.file)))
        source.file.close()  # reading opens it again: a hundred adapters are not to be open all at once
    return uses if any(use.adapter.transforms for use in uses) else sorted(uses, key=lambda use: use.order)


def _list_inputs(base: Sequence[Input], uses: Sequence[_Use]) -> tuple[tuple[Input, ...], tuple[AdapterUse, ...]]:
    """Every file that is read, the base's first, and the adapters with their places among them."""
    inputs = list(base)
    adapters = []
    for use in uses:
        adapter, choice, source = use.adapter, use.choice, use.adapter.source
        weights = len(inputs)
        inputs += inputs_of(source)
        config = weights + 1 if source.config_path is not None else None
        adapters.append(
            AdapterUse(
                name=source.name,
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
                selection=choice.selection,
            )
        )
    return tuple(inputs), tuple(adapters)


def _match(
    recipe: Recipe,
    checkpoint: Checkpoint,
    identity: BaseIdentity,
    uses: Sequence[_Use],
    adapters: Sequence[AdapterUse],
    beside: frozenset[str],
) -> Matching:
    """Where every module goes; raises for modules that go nowhere, or where nothing can be added.

    beside: tensors of the base that belong to no module.
    """
    tensors = {name: info for name, _, info in checkpoint.tensors()}
    matching = Matching()
    if uses:
        base, tie = base_of(checkpoint, identity, beside)
        for place, (use, described) in enumerate(zip(uses, adapters, strict=True)):
            AdapterMatcher(base, use.adapter, use.choice, place, described.input, matching).run(recipe)
        refuse_unmatched(identity, matching, recipe.allow_unmatched, checkpoint.packaging in ("sharded", "diffusers"))
        settle_heads(
            *(checkpoint, tie, tensors),
            [(described.input, use.adapter) for use, described in zip(uses, adapters, strict=True)],
            matching,
        )
        refuse_packed(base.tensors, matching)
    return matching


def _notes(recipe: Recipe, checkpoint: Checkpoint, uses: Sequence[_Use], matching: Matching) -> Iterable[str]:
    for choice in recipe.adapters:
        if choice.is_off:
            yield f"{choice.path.name}: left out, its weight is 0"
    for use in uses:
        name = use.adapter.source.name
        yield from (f"{name}: {note}" for note in use.adapter.notes)
        companion = use.choice.path.with_suffix(".text_encoder.pt")
        if use.choice.path.suffix == ".pt" and companion.is_file() and companion != use.choice.path:
            yield f"{name}: {companion.name} lies beside it; give it with -l too to fuse the text encoder"
    named = [(use.adapter.source, use.choice) for use in uses]
    yield from note_repeated(recipe, named, [use.content for use in uses])
    yield from matching.notes
    if any(name.startswith(_EMA) and math.prod(info.shape) > 1 for name, _, info in checkpoint.tensors()):
        yield "the base carries a second, averaged copy of its weights (model_ema); it is copied without the adapters"
    if checkpoint.left_out:
        yield f"not copied from the base folder: {', '.join(checkpoint.left_out)}"
