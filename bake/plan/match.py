"""Adapter modules -> tensors of the base: every module finds its one place, or is listed with the reason."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bake.errors import DuplicateTarget, FamilyMismatch, ShapeMismatch
from bake.identify.adapter import Adapter, Module, Update
from bake.identify.checkpoint import BaseIdentity
from bake.identify.families import FAMILIES, title
from bake.identify.fingerprints import family_by_shapes
from bake.io.header import TensorInfo
from bake.io.tensorfile import read_tensor_bytes
from bake.keys import hf, numbered
from bake.keys.dialects import Address, flatten
from bake.keys.factors import as_matrix
from bake.keys.modules import Found, ModuleIndex
from bake.keys.places import Place
from bake.plan.model import Coverage, Skipped, Stored, Term, Unmatched
from bake.plan.recipe import AdapterChoice, Recipe

_NEAREST_FOR = 50  # unmatched modules that get a suggestion; comparing names is slow
_FIRST_CONVOLUTIONS = ("conv_in", "input_blocks.0.0")


class Region(NamedTuple):
    """The part of a tensor, seen as a matrix, that an update covers."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    transposed: bool  # the factors give (columns, rows)

    def overlaps(self, other: Term) -> bool:
        return all(
            mine[0] < theirs[1] and theirs[0] < mine[1]
            for mine, theirs in ((self.rows, other.rows), (self.columns, other.columns))
        )


class _Misfit(Exception):
    """An update has another shape than its target; says which."""


@dataclass
class Matching:
    """What all adapters do to the base."""

    terms: dict[str, list[Term]] = field(default_factory=dict)  # full tensor name -> updates
    matched: Counter[str] = field(default_factory=Counter)  # by component
    total: Counter[str] = field(default_factory=Counter)
    unmatched: list[Unmatched] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)  # components the adapters want and the base lacks
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
    def of(cls, identity: BaseIdentity, tensors: Mapping[str, TensorInfo]) -> Base:
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

    def run(self, recipe: Recipe) -> None:
        """Match every module. Raises ShapeMismatch or DuplicateTarget; unmatched modules are only listed."""
        resolved = self._resolve_all()
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
            if component.naming != "plain":
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
                heights = [modules[number].updates[0].delta[0] for number in (0, 4) if number in modules]
                order = numbered.unet_order(known, len(modules), len(heights) == 2 and heights[1] == 8 * heights[0])
            paths.update(((component, number), path) for number, path in enumerate(order))
        return paths

    def _default_component(self) -> str:
        return self.base.identity.components[0].name

    def _intended_component(self, module: Module) -> str:
        """The component an unmatched module was meant for."""
        wanted = module.readings[0].components
        present = [component.name for component in self.base.identity.components]
        if not wanted:
            return self._default_component()
        return next((name for name in wanted if name in present), wanted[0])

    def _place_module(self, module: Module, component: str, found: Found | None) -> None:
        self.into.total[component] += 1
        if found is None:
            self._list_unmatched(module, component)
            return
        for update in module.updates:
            if update.parameter not in found.parameters:
                reason = f"the base has no {update.parameter} at {found.module}"
                self.into.unmatched.append(Unmatched(module.name, self.name, reason, None))
                return
        for update in module.updates:
            (place,) = found.parameters[update.parameter]
            try:
                region = self._region(update, place, found)
            except _Misfit as misfit:
                self.misfits.append((module, str(misfit)))
                self.misfit_shapes[found.module] = update.delta
                return
            self._add_term(module, component, update, place.tensor, region)
        self.into.matched[component] += 1

    def _region(self, update: Update, place: Place, found: Found) -> Region:
        """The part of the target that the update covers; raises _Misfit if there is none."""
        shape = self.base.tensors[place.tensor].shape
        height, width = as_matrix(shape)
        first, last = place.rows or (0, height)
        room = (last - first, width)
        straight, flipped = update.delta == room, update.delta[::-1] == room
        if update.transposed != place.transposed:
            transposed, fits = True, flipped
        elif self._stored_in_out(found) and flipped:
            transposed, fits = True, True
        else:
            transposed, fits = False, straight
        if fits:
            return Region((first, last), (0, width), transposed)
        if self._is_widened_input(found, shape, update):
            return Region((first, last), (0, update.delta[1]), False)
        part = f" rows {first} to {last}" if place.rows is not None else ""
        hint = " (it would fit transposed)" if flipped else ""
        raise _Misfit(
            f"the update is {update.delta[0]} x {update.delta[1]}, {place.tensor}{part} is {list(shape)}{hint}"
        )

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
        kernel = shape[2] * shape[3]
        return update.delta[0] == shape[0] and update.delta[1] == 4 * kernel

    def _add_term(self, module: Module, component: str, update: Update, tensor: str, region: Region) -> None:
        term = Term(
            algorithm=update.algorithm,
            factors={factor: self._stored(name) for factor, name in sorted(update.factors.items())},
            scale=update.scale * self.choice.weight_for(component),
            rows=region.rows,
            columns=region.columns,
            transposed=region.transposed,
            adapter=self.place,
            module=module.name,
            rank_limit=self.choice.rank_limit if update.algorithm == "lora" and "mid" not in update.factors else None,
        )
        for other, owner in self.taken.get(tensor, []):
            if region.overlaps(other):
                self._check_same(owner, other, module, term, tensor)
                return
        self.taken.setdefault(tensor, []).append((term, module))
        self.into.terms.setdefault(tensor, []).append(term)

    def _stored(self, name: str) -> Stored:
        info = self.adapter.source.file.tensors[name]
        return Stored(self.input_place, name, info.dtype, info.shape, (info.begin, info.end))

    def _check_same(self, owner: Module, other: Term, module: Module, term: Term, tensor: str) -> None:
        """Two modules for one place are fine if they are copies of each other, and a contradiction if not."""
        file = self.adapter.source.file
        same = (other.algorithm, other.scale, other.rows) == (term.algorithm, term.scale, term.rows) and all(
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


def _nearest(reading: Address, known: Iterable[str]) -> str | None:
    names = (flatten(path) for path in known) if reading.style == "flat" else known
    close = difflib.get_close_matches(reading.path, list(names), n=1, cutoff=0.6)
    return close[0] if close else None
