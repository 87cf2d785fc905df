"""Adapter modules -> tensors of the base: every module finds its one place, or is listed with the reason."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bake.errors import DuplicateTarget, FamilyMismatch, ShapeMismatch, Unsupported
from bake.identify.adapter import Adapter, Module
from bake.identify.checkpoint import BaseIdentity
from bake.identify.families import FAMILIES, title
from bake.identify.fingerprints import family_by_metadata, family_by_shapes
from bake.identify.updates import Update
from bake.io.header import TensorInfo
from bake.io.tensorfile import read_tensor_bytes
from bake.keys import hf, numbered
from bake.keys.dialects import Address, flatten
from bake.keys.factors import Decomposition, as_matrix
from bake.keys.modules import Found, ModuleIndex
from bake.keys.nearest import nearest_names
from bake.keys.places import Place
from bake.keys.shapes_transforms import magnitude_axis
from bake.plan.model import Coverage, Skipped, Stored, Term, Unmatched
from bake.plan.recipe import AdapterChoice, Recipe
from bake.plan.regions import Misfit, Region, check_parts, fit
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


@dataclass(frozen=True)
class Base:
    """The base as matching sees it."""

    identity: BaseIdentity
    tensors: Mapping[str, TensorInfo]  # full name -> info
    index: ModuleIndex
    stored_in_out: frozenset[str]  # components whose Linear weights are stored (in, out)

    @classmethod
    def of(cls, identity: BaseIdentity, tensors: Mapping[str, TensorInfo], virtual: Mapping[str, str]) -> Base:
        """virtual: tensors that the model has and the file does not store -> the stored ones they equal."""
        tensors = {**tensors, **{name: tensors[source] for name, source in virtual.items()}}
        shapes = {name: info.shape for name, info in tensors.items()}
        index = ModuleIndex(identity.components, shapes)
        flipped = (name for name, modules in index.spellings.items() if hf.stores_in_out(modules, shapes))
        return cls(identity, tensors, index, frozenset(flipped))


def check_family(base: BaseIdentity, adapter: Adapter) -> None:
    """Raise FamilyMismatch if the adapter's own names belong to another family than the base."""
    if not adapter.families or (base.family not in FAMILIES and not base.language_model):
        return
    fits = "language-model" in adapter.families if base.language_model else base.family in adapter.families
    if not fits:
        made_for = " or ".join(title(name) for name in sorted(adapter.families))
        raise FamilyMismatch(
            f"{adapter.source.path} is made for {made_for}, the base is {title(base.family)}. "
            f"The module {adapter.evidence!r} tells. Use a base of the adapter's family.",
            adapter=str(adapter.source.path),
            adapter_families=sorted(adapter.families),
            base_family=base.family,
        )


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

    def run(self, recipe: Recipe) -> None:
        """Match every module. Raises ShapeMismatch or DuplicateTarget; unmatched modules are only listed."""
        resolved = self._resolve_all()
        shapes = {name: info.shape for name, info in self.base.tensors.items()}
        self.stacks = Stacks(self.adapter, self.base.index, shapes, self.base.identity.family)
        resolved |= {name: found for name, (found, _) in self.stacks.found.items()}
        skipped: Counter[tuple[str, str]] = Counter()
        for module in self.adapter.modules:
            found = resolved.get(module.name)
            component = found.component if found is not None else self._intended_component(module)
            if not recipe.wants(component):
                skipped[component, f"--only {' '.join(recipe.only)}"] += 1
            elif self.choice.weight_for(component) == 0:
                skipped[component, "its weight is 0"] += 1
            else:
                self._place_module(module, component, found)
        for (component, reason), count in sorted(skipped.items()):
            self.into.skipped.append(Skipped(self.name, component, count, reason))
        for tensor in self.adapter.unknown:
            component = self._default_component()
            self.into.total[component] += 1
            self.into.unmatched.append(Unmatched(tensor, self.name, "no adapter format uses this tensor name", None))
        if self.misfits:
            self._refuse_misfits()
        if self.unsure_axes and not self.has_input_axis:
            self.into.notes.append(
                f"{self.name}: the DoRA magnitudes of {len(self.unsure_axes)} modules (e.g. {self.unsure_axes[0]}) "
                f"fit inputs and outputs alike; they are taken as their spelling suggests"
            )
        told, base = family_by_metadata(self.adapter.source.file.metadata), self.base.identity.family
        if told not in (None, base) and base in FAMILIES:
            self.into.notes.append(
                f"{self.name}: its metadata says it was trained on {title(str(told))}, and the base is {title(base)}; "
                f"its names and shapes fit all the same"
            )
        if self.duplicates:
            self.into.notes.append(
                f"{self.name}: {self.duplicates} modules are stored twice under different names; each is used once"
            )

    def _resolve_all(self) -> dict[str, Found]:
        """module name -> its place in the base, for the modules that have one."""
        order = self._numbered_paths()
        found: dict[str, Found] = {}
        for module in self.adapter.modules:
            for reading in module.readings:
                if reading.style == "number":
                    path = order.get((reading.components[0], int(reading.path)))
                    reading = Address(reading.components, path or "", "dotted", reading.dialect)
                hit = self.base.index.find(reading)
                if hit is not None:
                    found[module.name] = hit
                    break
        return found or self._resolve_with_drift()

    def _resolve_with_drift(self) -> dict[str, Found]:
        """The same, where all names of the adapter differ from the base's by one prefix."""
        for component in self.base.identity.components:
            if component.naming not in ("hf", "plain"):
                continue
            known = self.base.index.spellings[component.name]
            paths = {
                module.name: next((r.path for r in module.readings if r.style == "dotted" and not r.components), "")
                for module in self.adapter.modules
            }
            drift = hf.find_drift(set(paths.values()), known)
            if drift is not None:
                change = f"{drift.dropped!r} dropped" if drift.dropped else f"{drift.added!r} added"
                self.into.notes.append(f"{self.name}: its module names fit with {change} in front")
                return {
                    name: Found(component.name, drift.apply(path), known[drift.apply(path)])
                    for name, path in paths.items()
                }
        return {}

    def _numbered_paths(self) -> dict[tuple[str, int], str]:
        """(component, number) -> dotted path, for adapters that number their modules."""
        numbers: dict[str, dict[int, Module]] = {}
        for module in self.adapter.modules:
            if module.readings[0].style == "number":
                component = module.readings[0].components[0]
                numbers.setdefault(component, {})[int(module.readings[0].path)] = module
        paths: dict[tuple[str, int], str] = {}
        for component, modules in numbers.items():
            known = self.base.index.spellings.get(component, {})
            if sorted(modules) != list(range(len(modules))):
                continue
            if component == "te1":
                order = numbered.text_encoder_order(known, len(modules))
            else:
                heights = [modules[number].updates[0].extent[0] or 0 for number in (0, 4) if number in modules]
                order = numbered.unet_order(known, len(modules), len(heights) == 2 and heights[1] == 8 * heights[0])
            paths.update(((component, number), path) for number, path in enumerate(order))
        return paths

    def _default_component(self) -> str:
        return self.base.identity.components[0].name

    def _intended_component(self, module: Module) -> str:
        """The component an unmatched module was meant for."""
        wanted = module.readings[0].components
        if not wanted:
            return self._default_component()
        return next((part.name for part in self.base.identity.components if part.answers(wanted)), wanted[0])

    def _place_module(self, module: Module, component: str, found: Found | None) -> None:
        self.into.total[component] += 1
        if found is None:
            self._list_unmatched(module, component)
            return
        if module.name in self.stacks.found:
            for share in self.stacks.found[module.name][1]:
                self._add(module, self._share_term(module, component, share), share.place)
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
                if self._replaces(update, place, found):
                    self.into.replaced[place.tensor] = self._stored(update.factors["value"])
        for update in updates:
            self._pad(update, found)
        try:
            for update in updates:
                check_parts(update, found.parameters[update.parameter])
            landed = [
                (self._term(module, component, update, place, region), place)
                for update in updates
                for place in found.parameters[update.parameter]
                if not self._replaces(update, place, found)
                for region in self._regions(module, update, place, found)
            ]
        except Misfit as misfit:
            self.misfits.append((module, str(misfit)))
            return
        for term, place in landed:
            self._add(module, term, place)
        self.into.matched[component] += 1

    def _replaces(self, update: Update, place: Place, found: Found) -> bool:
        """True if stored values take the place of a whole tensor; of a vocabulary they may be more."""
        if update.algorithm != "set" or update.row_numbers or place != Place(place.tensor):
            return False
        stored, there = update.extent, as_matrix(self.base.tensors[place.tensor].shape)
        grows = found.module.rpartition(".")[2] in VOCABULARY_LEAVES and (stored[0] or 0) > there[0]
        return stored == there or (grows and stored[1] == there[1])

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
        self.into.padded[tensor] = grown
        self.into.notes.append(f"{self.name}: {tensor} grows from {list(shape)} to {list(grown)}, filled with zeros")

    def _shape_of(self, tensor: str) -> tuple[int, ...]:
        """The shape that updates of `tensor` have to fit."""
        if tensor in self.into.padded:
            return self.into.padded[tensor]
        stored = self.into.replaced.get(tensor)
        shape = self.base.tensors[tensor].shape
        return shape if stored is None or math.prod(stored.shape) == math.prod(shape) else stored.shape

    def _regions(self, module: Module, update: Update, place: Place, found: Found) -> list[Region]:
        """The parts of the target that the update covers; raises Misfit if it does not fit there."""
        shape = self._shape_of(place.tensor)
        if place.stacked and len(shape) == 3:
            shape = (shape[0] * shape[1], shape[2])
        narrower = self._narrower(module, found, shape, update)
        try:
            fitted = fit(update, place, shape, self._stored_in_out(found), narrower)
        except Misfit:
            self.misfit_shapes[found.module] = tuple(size or 0 for size in update.extent)
            raise
        for region in fitted:
            self._check_divisible(module, update, region, shape)
        return fitted

    def _check_divisible(self, module: Module, update: Update, region: Region, shape: tuple[int, ...]) -> None:
        """Raise Unsupported if rows of the update that hang together would lie in several tensors."""
        if region.part == (0, region.height) or update.row_numbers:
            return
        block = update.block
        if update.magnitude is not None and self._decomposition(module, update, region, shape).axis == 1:
            block = None  # a channel's length is that over all rows
        if block is None or any(edge % block for edge in region.part):
            raise Unsupported(
                f"{self.adapter.source.path}: {module.name!r} is one {update.algorithm} module over a projection that "
                f"the base stores in several tensors, and its rows cannot be changed apart from each other. "
                f"Use a base in the layout that the adapter was trained on.",
                module=module.name,
            )

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
        return Term(
            algorithm=update.algorithm,
            factors={factor: self._stored(name) for factor, name in sorted(update.factors.items())},
            scale=update.scale,
            weight=self.choice.weight_for(component),
            rows=region.rows,
            columns=region.columns,
            part=region.part,
            height=region.height,
            transposed=region.transposed,
            adapter=self.place,
            module=module.name,
            dora=decomposition,
            settings=self._settings(update, region, self.base.tensors[place.tensor].shape),
            rank_limit=self.choice.rank_limit if plain_lora else None,
        )

    def _share_term(self, module: Module, component: str, share: Share) -> Term:
        (update,) = module.updates
        return Term(
            algorithm=update.algorithm,
            factors={factor: self._stored(name) for factor, name in sorted(update.factors.items())},
            scale=share.scale,
            weight=self.choice.weight_for(component),
            rows=share.rows,
            columns=share.columns,
            part=share.part,
            height=share.height,
            transposed=share.place.transposed,
            adapter=self.place,
            module=module.name,
            settings={"expert": share.expert, "experts": share.experts},
        )

    def _add(self, module: Module, term: Term, place: Place) -> None:
        for other, owner in self.taken.get(place.tensor, []):
            # one module may do several things to its tensor, as a LoRA with a sparse remainder
            if owner is not module and _overlap(term, other):
                self._check_same(owner, other, module, term, place.tensor)
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
        return settings

    def _decomposition(self, module: Module, update: Update, region: Region, shape: tuple[int, ...]) -> Decomposition:
        """What the DoRA magnitude of `update` means; raises Misfit if it fits neither axis."""
        assert update.magnitude is not None
        stored = self.adapter.source.file.tensors[update.factors["magnitude"]].shape
        width = region.columns[1] - region.columns[0]
        weight = (width, region.height) if region.transposed else (region.height, width // math.prod(shape[2:]))
        try:
            axis = magnitude_axis(update.magnitude, stored, weight)
        except ValueError as error:
            raise Misfit(str(error)) from None
        if not axis.certain:
            self.unsure_axes.append(module.name)
        elif axis.axis == 1:
            self.has_input_axis = True  # one trainer wrote the file: it settles the others
        return Decomposition(axis.axis, 0.0 if update.magnitude == "lora_magnitude_vector" else _EPSILON)

    def _stored(self, name: str) -> Stored:
        info = self.adapter.source.file.tensors[name]
        return Stored(self.input_place, name, info.dtype, info.shape, (info.begin, info.end))

    def _check_same(self, owner: Module, other: Term, module: Module, term: Term, tensor: str) -> None:
        """Two modules for one place are fine if they are copies of each other, and a contradiction if not."""
        file = self.adapter.source.file
        same = dataclasses.replace(term, module=other.module, factors=other.factors) == other and all(
            factor in term.factors
            and read_tensor_bytes(file, stored.name) == read_tensor_bytes(file, term.factors[factor].name)
            for factor, stored in other.factors.items()
        )
        if not same:
            raise DuplicateTarget(
                f"{self.adapter.source.path}: {owner.name!r} and {module.name!r} both update {tensor}, "
                f"with different values; the file contradicts itself",
                modules=[owner.name, module.name],
                tensor=tensor,
            )
        self.duplicates += 1

    def _list_unmatched(self, module: Module, component: str) -> None:
        reading = module.readings[0]
        known = self.base.index.spellings.get(component)
        nearest = None
        if known is None:
            self.into.missing.add(component)
            reason = f"the base has no {component}"
        elif reading.style == "number":
            reason = f"the file numbers its modules, and their count fits no {component} like this base's"
        else:
            reason = f"no such module in the base's {component}"
            if len(self.into.unmatched) < _NEAREST_FOR:
                nearest = _nearest(reading, known)
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


def _nearest(reading: Address, known: Iterable[str]) -> str | None:
    names = (flatten(path) for path in known) if reading.style == "flat" else known
    return next(iter(nearest_names(reading.path, names, 1)), None)
