"""Adapter modules -> tensors of the base: every module finds its one place, or is listed with the reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bake.errors import FamilyMismatch, ShapeMismatch, Unsupported
from bake.identify.adapter import Adapter, Module
from bake.identify.checkpoint import BaseIdentity
from bake.identify.families import FAMILIES, title
from bake.identify.fingerprints import family_by_metadata, family_by_shapes
from bake.identify.updates import Update
from bake.keys import hf
from bake.keys.factors import Decomposition, as_matrix
from bake.keys.modules import Found
from bake.keys.places import Place, turned_whole
from bake.keys.shapes_transforms import magnitude_axis
from bake.plan.base import Base
from bake.plan.copies import check_same, is_zero, repeated_projections, repeats_rows
from bake.plan.model import Coverage, Skipped, Stored, Term, Unmatched
from bake.plan.ratios import Ratios
from bake.plan.recipe import AdapterChoice, Recipe
from bake.plan.regions import Misfit, Region, check_parts, fit
from bake.plan.resolve import Resolver
from bake.plan.stacks import Share, Stacks

_NEAREST_FOR = 50  # unmatched modules that get a suggestion; comparing names is slow
_EPSILON = 2.0**-23  # of float32: LyCORIS and OneTrainer add it to the lengths that DoRA divides by
_FIRST_CONVOLUTIONS = ("conv_in", "input_blocks.0.0")
# Modules whose rows are the words of the vocabulary: only they may be replaced by longer ones.
VOCABULARY_LEAVES = frozenset(
    {"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "decoder", "proj_out"}
)
_LATENT_INPUTS = ("img_in", "x_embedder")  # of Flux: control LoRAs give it more channels
_JOINED_OUTPUTS = ("linear2", "proj_out")  # of Flux's single blocks: attention and MLP side by side


@dataclass
class Matching:
    """What all adapters do to the base."""

    terms: dict[str, list[Term]] = field(default_factory=dict)  # full tensor name -> updates
    matched: Counter[str] = field(default_factory=Counter)  # by component
    total: Counter[str] = field(default_factory=Counter)
    unmatched: list[Unmatched] = field(default_factory=list)
    stacks: set[str] = field(default_factory=set)  # tensors whose rows the terms count through a stack
    replaced: dict[str, Stored] = field(default_factory=dict)  # full tensor name -> what is stored in its place
    padded: dict[str, tuple[int, ...]] = field(default_factory=dict)  # tensor -> the shape it is padded to with zeros
    added: dict[str, str] = field(default_factory=dict)  # tensor that the base lacks -> the one beside which it goes
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # group -> its config.json, as it is to be
    side_sources: dict[str, Path] = field(default_factory=dict)  # relative path -> file that takes the base's place
    missing: set[str] = field(default_factory=set)  # components the adapters want and the base lacks
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def changed(self) -> set[str]:
        """The tensors that do not stay as they are."""
        return {*self.terms, *self.replaced}

    def coverage(self, identity: BaseIdentity) -> dict[str, Coverage]:
        """Component -> how many modules found a place; in the base's order, missing components last."""
        order = [component.name for component in identity.components if component.name in self.total]
        order += sorted(self.total.keys() - set(order))
        return {name: Coverage(self.matched[name], self.total[name]) for name in order}


class AdapterMatcher:
    """Finds the places of one adapter's modules and adds its terms to a Matching."""

    def __init__(
        self, base: Base, adapter: Adapter, choice: AdapterChoice, place: int, input_place: int, into: Matching
    ) -> None:
        self.base, self.adapter, self.choice = base, adapter, choice
        self.place, self.input_place = place, input_place
        self.into = into
        self.name = adapter.source.name
        self.taken: dict[str, list[tuple[Term, Module]]] = {}  # tensor -> what this adapter does to it
        self.misfits: list[tuple[Module, str]] = []
        self.misfit_shapes: dict[str, tuple[int, ...]] = {}  # module of the base -> update that does not fit it
        self.duplicates = 0
        self.has_input_axis = False
        self.unsure_axes: list[str] = []  # modules whose DoRA magnitude may be meant the other way
        self.resolver = Resolver(base, adapter)
        self.resolved = self.resolver.resolve_all()
        shapes = {name: info.shape for name, info in base.tensors.items()}
        self.stacks = Stacks(adapter, base.index, shapes, base.identity.family)
        self.resolved |= {name: found for name, (found, _) in self.stacks.found.items()}
        selection = choice.selection
        self.ratios = None if selection is None else Ratios(selection, base.identity, base.tensors, self.name)
        self.partly_off = 0

    def run(self, recipe: Recipe) -> None:
        """Match every module. Raises ShapeMismatch or DuplicateTarget; unmatched modules are only listed."""
        skipped: Counter[tuple[str, str]] = Counter()
        repeated = repeated_projections(self.base.identity.family, self.resolved)
        for module in self.adapter.modules:
            found = self.resolved.get(module.name)
            if found is not None and module.name in repeated:
                skipped[found.component, "q, k and v are stored one by one as well"] += 1
                continue
            component = found.component if found is not None else self.resolver.intended_component(module)
            if not recipe.wants(component):
                skipped[component, f"--only {' '.join(recipe.only)}"] += 1
            elif self.choice.weight_for(component) == 0:
                skipped[component, "its weight is 0"] += 1
            elif found is not None and self._is_off(module, found):
                skipped[component, f"switched off by {self.choice.selection}"] += 1
            else:
                self._place_module(module, component, found)
        for (component, reason), count in sorted(skipped.items()):
            self.into.skipped.append(Skipped(self.name, component, count, reason))
        for tensor in self.adapter.unknown:
            component = self.resolver.default_component()
            self.into.total[component] += 1
            self.into.unmatched.append(Unmatched(tensor, self.name, "no adapter format uses this tensor name", None))
        if self.misfits:
            self._refuse_misfits()
        self.into.notes += [*self.resolver.notes, *self._notes()]

    def _ratio(self, tensor: str) -> float:
        """What the weight is multiplied by at a tensor of the base."""
        return 1.0 if self.ratios is None else self.ratios.ratio(tensor)

    def _is_off(self, module: Module, found: Found) -> bool:
        """True if the ratio is 0 everywhere the module goes."""
        if module.name in self.stacks.found:
            places = [share.place for share in self.stacks.found[module.name][1]]
        else:
            wanted = {update.parameter for update in module.updates}
            places = [place for name in wanted & found.parameters.keys() for place in found.parameters[name]]
        return bool(places) and all(self._ratio(place.tensor) == 0 for place in places)

    def _notes(self) -> Iterator[str]:
        """What the user should know about how the modules were understood."""
        if self.partly_off:
            yield f"{self.name}: {self.partly_off} modules are switched off in part by {self.choice.selection}"
        if self.unsure_axes and not self.has_input_axis:
            yield (
                f"{self.name}: the DoRA magnitudes of {len(self.unsure_axes)} modules (e.g. {self.unsure_axes[0]}) "
                f"fit inputs and outputs alike; they are taken as their spelling suggests"
            )
        told, base = family_by_metadata(self.adapter.source.file.metadata), self.base.identity.family
        if told not in (None, base) and base in FAMILIES:
            yield (
                f"{self.name}: its metadata says it was trained on {title(str(told))}, and the base is {title(base)}; "
                f"its names and shapes fit all the same"
            )
        if self.duplicates:
            yield f"{self.name}: {self.duplicates} modules are stored twice under different names; each is used once"

    def _place_module(self, module: Module, component: str, found: Found | None) -> None:
        self.into.total[component] += 1
        if found is None and repeats_rows(module, self.adapter, self.resolved):
            self.duplicates += 1
            self.into.matched[component] += 1
            return
        if found is None:
            self._list_unmatched(module, component)
            return
        if module.name in self.stacks.found:
            shares = self.stacks.found[module.name][1]
            self._add_all(module, ((self._share_term(module, component, share), share.place) for share in shares))
            self.into.matched[component] += 1
            return
        updates = [update for update in module.updates if update.parameter in found.parameters or not update.optional]
        for update in updates:
            if update.parameter not in found.parameters:
                reason = f"the base has no {update.parameter} at {found.module}"
                self.into.unmatched.append(Unmatched(module.name, self.name, reason, None))
                return
        for update in updates:
            for place in found.parameters[update.parameter]:
                if self._replaces(update, place, found) and self._ratio(place.tensor) != 0:
                    self._replace(place.tensor, self._stored(update.factors["value"]))
        for update in updates:
            self._pad(update, found)
        try:
            for update in updates:
                check_parts(update, found.parameters[update.parameter])
            landed = [
                (self._term(module, component, update, place, region), place)
                for update in updates
                for place, region in self._pieces(module, update, found)
            ]
        except Misfit as misfit:
            self.misfits.append((module, str(misfit)))
            return
        self._add_all(module, landed)
        self.into.matched[component] += 1

    def _add_all(self, module: Module, landed: Iterable[tuple[Term, Place]]) -> None:
        """Add the module's terms, but for those at places that are switched off."""
        landed = list(landed)
        kept = [(term, place) for term, place in landed if term.weight != 0]
        self.partly_off += len(kept) < len(landed)
        for term, place in kept:
            self._add(module, term, place)

    def _replaces(self, update: Update, place: Place, found: Found) -> bool:
        """True if stored values take the place of a whole tensor; of a vocabulary they may be more."""
        if update.algorithm != "set" or update.row_numbers or place != Place(place.tensor):
            return False
        stored, there = update.extent, as_matrix(self.base.tensors[place.tensor].shape)
        grows = found.module.rpartition(".")[2] in VOCABULARY_LEAVES and (stored[0] or 0) > there[0]
        return stored == there or (grows and stored[1] == there[1])

    def _replace(self, tensor: str, value: Stored) -> None:
        if tensor in self.into.replaced:
            self.into.notes.append(f"{self.name}: replaces {tensor}, as another adapter does; the last one counts")
        self.into.replaced[tensor] = value

    def _pad(self, update: Update, found: Found) -> None:
        """Note it if the update is for a larger tensor, which the base's is padded to with zeros.

        Source: ComfyUI weight_adapter/lora.py (reshape_weight), diffusers loaders/lora_pipeline.py for Flux.
        """
        places = found.parameters[update.parameter]
        tensor = places[0].tensor
        shape = self._shape_of(tensor)
        grown = update.grown
        rows, columns = update.extent
        if not grown and self.base.identity.family == "flux" and found.module in _LATENT_INPUTS and len(shape) == 2:
            grown = (shape[0], max(shape[1], columns or 0)) if rows == shape[0] else ()
        is_larger = len(grown) == len(shape) > 1 and all(new >= old for new, old in zip(grown, shape, strict=True))
        if grown == shape or not is_larger or grown[2:] != shape[2:] or places != (Place(tensor),):
            return
        if self._ratio(tensor) == 0:
            return
        self.into.padded[tensor] = grown
        self.into.notes.append(f"{self.name}: {tensor} grows from {list(shape)} to {list(grown)}, filled with zeros")

    def _shape_of(self, tensor: str) -> tuple[int, ...]:
        """The shape that updates of `tensor` have to fit."""
        if tensor in self.into.padded:
            return self.into.padded[tensor]
        stored = self.into.replaced.get(tensor)
        shape = self.base.tensors[tensor].shape
        return shape if stored is None or math.prod(stored.shape) == math.prod(shape) else stored.shape

    def _pieces(self, module: Module, update: Update, found: Found) -> list[tuple[Place, Region]]:
        """The parts of the base that the update covers; raises Misfit if it does not fit there.

        Raises Unsupported if rows of the update that hang together would lie in several tensors.
        """
        places = [place for place in found.parameters[update.parameter] if not self._replaces(update, place, found)]
        pieces = [(place, region) for place in places for region in self._regions(module, update, place, found)]
        if not any(self._is_torn(module, update, place, region) for place, region in pieces):
            return pieces
        whole = turned_whole(found.parameters[update.parameter])
        if whole is None:
            raise Unsupported(
                f"{self.adapter.source.path}: {module.name!r} is one {update.algorithm} module over a projection that "
                f"the base stores in several tensors, and its rows cannot be changed apart from each other. "
                f"Use a base in the layout that the adapter was trained on.",
                module=module.name,
            )
        return [(whole, region) for region in self._regions(module, update, whole, found)]

    def _regions(self, module: Module, update: Update, place: Place, found: Found) -> list[Region]:
        """The parts of the target that the update covers; raises Misfit if it does not fit there."""
        shape = self._shape_of(place.tensor)
        if place.stacked and len(shape) == 3:
            shape = (shape[0] * shape[1], shape[2])
        narrower = self._narrower(module, found, shape, update)
        try:
            return fit(update, place, shape, self._stored_in_out(found), narrower)
        except Misfit:
            self.misfit_shapes[found.module] = tuple(size or 0 for size in update.extent)
            raise

    def _is_torn(self, module: Module, update: Update, place: Place, region: Region) -> bool:
        """True if rows of the update that hang together do not all lie in `region`."""
        if region.part == (0, region.height) or update.row_numbers:
            return False
        block = update.block
        if update.magnitude is not None:
            decomposition = self._decomposition(module, update, region, self._shape_of(place.tensor))
            block = None if decomposition.axis == 1 else block  # a channel's length is that over all rows
        return block is None or any(edge % block for edge in region.part)

    def _narrower(self, module: Module, found: Found, shape: tuple[int, ...], update: Update) -> Iterator[int]:
        """Columns of the target that an update may leave alone, as numbers of those it covers from the left."""
        if self._is_widened_input(found, shape, update):
            yield 4 * shape[2] * shape[3]
        # XLabs trains the output of attention alone; the base has the projection of the MLP beside it.
        if module.readings[0].dialect == "xlabs" and found.module.endswith(_JOINED_OUTPUTS):
            yield shape[0]

    def _stored_in_out(self, found: Found) -> bool:
        """True where the adapter's configuration or the architecture says that the base stores (in, out)."""
        by_name = found.component in self.base.stored_in_out and found.module.endswith(hf.CONV1D_LEAVES)
        config = self.adapter.config
        return by_name or (config is not None and config.fan_in_fan_out)

    def _is_widened_input(self, found: Found, shape: tuple[int, ...], update: Update) -> bool:
        """True for a LoRA of the plain model on the first convolution of an inpainting or edit model.

        That convolution has more input channels behind the usual ones; those are left as they are.
        """
        if self.base.identity.variant is None or found.module not in _FIRST_CONVOLUTIONS or len(shape) != 4:
            return False
        return update.extent == (shape[0], 4 * shape[2] * shape[3])

    def _term(self, module: Module, component: str, update: Update, place: Place, region: Region) -> Term:
        decomposition = None
        if update.magnitude is not None:
            decomposition = self._decomposition(module, update, region, self._shape_of(place.tensor))
        plain_lora = update.algorithm == "lora" and not {"mid", "magnitude"} & update.factors.keys()
        return self._on_region(
            *(module, component, update, place, region),
            scale=update.scale,
            dora=decomposition,
            settings=self._settings(update, region, self.base.tensors[place.tensor].shape),
            rank_limit=self.choice.rank_limit if plain_lora else None,
            turn=place.turn,
        )

    def _share_term(self, module: Module, component: str, share: Share) -> Term:
        (update,) = module.updates
        settings = {"expert": share.expert, "experts": share.experts}
        where = (share.place, share.region)
        return self._on_region(module, component, update, *where, scale=share.scale, settings=settings)

    def _on_region(
        self, module: Module, component: str, update: Update, place: Place, region: Region, **rest: Any
    ) -> Term:
        """The term with everything that the region, the adapter and its weight say."""
        return Term(
            algorithm=update.algorithm,
            factors={factor: self._stored(name) for factor, name in sorted(update.factors.items())},
            weight=self.choice.weight_for(component) * self._ratio(place.tensor),
            rows=region.rows,
            columns=region.columns,
            part=region.part,
            height=region.height,
            transposed=region.transposed,
            adapter=self.place,
            module=module.name,
            **rest,
        )

    def _add(self, module: Module, term: Term, place: Place) -> None:
        for other, owner in list(self.taken.get(place.tensor, [])):
            # one module may do several things to its tensor, as a LoRA with a sparse remainder
            if owner is not module and _overlap(term, other):
                if is_zero(self.adapter, other):
                    self.taken[place.tensor].remove((other, owner))
                    self.into.terms[place.tensor].remove(other)
                    continue
                if not is_zero(self.adapter, term):
                    check_same(self.adapter, (owner, other), (module, term), place.tensor)
                    self.duplicates += 1
                return
        if place.stacked and len(self.base.tensors[place.tensor].shape) == 3:
            self.into.stacks.add(place.tensor)
        self.taken.setdefault(place.tensor, []).append((term, module))
        self.into.terms.setdefault(place.tensor, []).append(term)

    def _settings(self, update: Update, region: Region, shape: tuple[int, ...]) -> dict[str, float | None]:
        settings = dict(update.settings)
        if update.algorithm == "oft-peft" and "neumann_terms" not in settings and len(shape) > 2:
            settings["transposed"] = False  # no configuration, so OneTrainer's, which turns convolutions the other way
        if update.algorithm == "vera":  # its matrices are shared and cut to the layer
            across = region.rows if region.transposed else region.columns
            settings["in_features"] = across[1] - across[0]
            shared = self.adapter.source.file.tensors[update.factors["vera_a"]].shape
            if shared[1] < across[1] - across[0]:
                raise Misfit(
                    f"the shared vera_A {list(shared)} has fewer columns than the base's {list(region.columns)}"
                )
        return settings

    def _decomposition(self, module: Module, update: Update, region: Region, shape: tuple[int, ...]) -> Decomposition:
        """What the DoRA magnitude of `update` means; raises Misfit if it fits neither axis."""
        assert update.magnitude is not None
        stored = self.adapter.source.file.tensors[update.factors["magnitude"]].shape
        width = region.columns[1] - region.columns[0]
        weight = (width, region.height) if region.transposed else (region.height, width // math.prod(shape[2:]))
        try:
            flipped = region.transposed and update.magnitude == "m"  # MLX: the outputs, however the factors lie
            axis = magnitude_axis(update.magnitude, stored, weight, transposed=flipped)
        except ValueError as error:
            raise Misfit(str(error)) from None
        if not axis.certain:
            self.unsure_axes.append(module.name)
        elif axis.axis == 1:
            self.has_input_axis = True  # one trainer wrote the file: it settles the others
        return Decomposition(axis.axis, _EPSILON if update.magnitude == "dora_scale" else 0.0)

    def _stored(self, name: str) -> Stored:
        info = self.adapter.source.file.tensors[name]
        return Stored(self.input_place, name, info.dtype, info.shape, (info.begin, info.end))

    def _list_unmatched(self, module: Module, component: str) -> None:
        if component not in self.base.index.spellings:
            self.into.missing.add(component)
        few = len(self.into.unmatched) < _NEAREST_FOR
        nearest = self.resolver.nearest(module, component) if few else None
        reason = self.resolver.reason(module, component)
        self.into.unmatched.append(Unmatched(module.name, self.name, reason, nearest))

    def _refuse_misfits(self) -> None:
        base = self.base.identity.family
        hint = family_by_shapes(self.misfit_shapes) or self.adapter.family_hint
        module, why = self.misfits[0]
        other_family = hint is not None and hint != base
        made_for = f" It looks made for {title(hint)}; the base is {title(base)}." if hint and other_family else ""
        raise (FamilyMismatch if other_family else ShapeMismatch)(
            f"{self.adapter.source.path}: {len(self.misfits)} of {len(self.adapter.modules)} modules do not fit the "
            f"base's shapes, e.g. {module.name!r}: {why}.{made_for}",
            adapter=str(self.adapter.source.path),
            adapter_family=hint,
            base_family=base,
            modules=[[misfit.name, reason] for misfit, reason in self.misfits],
        )


def _overlap(one: Term, two: Term) -> bool:
    return all(
        mine[0] < theirs[1] and theirs[0] < mine[1]
        for mine, theirs in ((one.rows, two.rows), (one.columns, two.columns))
    )
