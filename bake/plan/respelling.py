"""An adapter's modules under the names of another dialect: looked up in the tables of its family, never guessed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bake.errors import DuplicateTarget, UnmatchedModules, Unsupported, UsageError
from bake.identify.adapter import Adapter, Module
from bake.identify.checkpoint import identify_checkpoint
from bake.identify.families import title
from bake.identify.updates import Update
from bake.io.checkpoint import open_checkpoint
from bake.keys.dialects import Address
from bake.keys.modules import TABLES, Component, ModuleIndex
from bake.keys.places import Parameters, Place
from bake.keys.spoken import Names, dotted_path, prefix_of, speaks, spelled, spoken_modules
from bake.plan.base import check_family
from bake.plan.recipe import is_text_encoder

_UNETS = ("sd1", "sd2", "sdxl", "sdxl-refiner")
_LISTED = 6
# What the dialect of an adapter's names is written as where nothing else is asked for.
WRITTEN_AS: Mapping[str, Names] = {
    "kohya": "kohya",
    "onetrainer": "kohya",
    "lycoris": "kohya",
    "diffusers": "diffusers",
    "peft": "peft",
}


@dataclass(frozen=True, slots=True)
class Share:
    """A module of the adapter, or some rows of its updates."""

    module: Module
    rows: tuple[int, int] | None  # None: all of them
    height: int  # how many that is


@dataclass(frozen=True, slots=True)
class NewModule:
    """A module under its new name, and which modules of the adapter it is made of, from the top to the bottom."""

    name: str  # without suffix
    path: str  # without prefix, dotted
    component: str
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Respelled:
    """An adapter in the names of a dialect."""

    family: str
    names: Names
    modules: tuple[NewModule, ...]
    prefixes: Mapping[str, str]  # component -> what its modules' names begin with


def respell(
    adapter: Adapter, names: Names, only: Iterable[str] = (), base: Path | None = None, family: str | None = None
) -> Respelled:
    """The modules of `adapter` in the names of a dialect.

    base: a checkpoint of its family, in which modules are looked up; None: in the tables of the family alone.
    family: None where names, shapes and metadata tell it.
    Raises Unsupported where the names do not tell the family or cannot be said in the dialect, UnmatchedModules for
    modules that no model of the family has, DuplicateTarget for two names of one module, UsageError for a dialect
    that is not for this adapter.
    """
    path = adapter.source.path
    if adapter.refusals:
        raise adapter.refusals[0]
    index = None
    if base is not None:
        index, family = _read_names(base, adapter)
    elif family is None:
        family = family_of(adapter)
    located, unknown = _locate_all(adapter, family, names, index)
    if unknown or adapter.unknown:
        lost = [*(module.name for module in unknown), *adapter.unknown]
        raise UnmatchedModules(
            f"{path}: {len(lost)} of its modules are not in {base if base else f'the tables of {title(family)}'}, so "
            f"their names in another dialect are not known: {', '.join(lost[:_LISTED])}"
            f"{', ...' if len(lost) > _LISTED else ''}"
            f"{'' if base else '. --base names a checkpoint to look them up in.'}",
            unmatched=lost,
        )
    located = {
        component: modules for component, modules in located.items() if not only or _is_wanted(component.name, only)
    }
    if not located:
        raise UsageError(f"--only {' '.join(only)}: {path} has no modules there")
    if names == "peft" and len(located) > 1:
        have = ", ".join(component.name for component in located)
        raise UsageError(f"{path} is for {have}, and a PEFT adapter is for one model: choose one with --only")
    if family == "language-model" and names != "peft":
        raise UsageError(f"--names {names}: adapters of language models have PEFT's names")
    found: list[NewModule] = []
    for component, modules in located.items():
        found += _spoken(component, family, modules, names, str(path))
    prefixes = {component.name: prefix_of(component, family, names) for component in located}
    return Respelled(family, names, tuple(found), prefixes)


def _is_wanted(component: str, only: Iterable[str]) -> bool:
    return any(component == name or (name == "te" and is_text_encoder(component)) for name in only)


def family_of(adapter: Adapter) -> str:
    """The family that decides an adapter's names; raises Unsupported if nothing tells."""
    by_config = adapter.config is not None and not adapter.families and adapter.family_hint is None
    if "language-model" in adapter.families or by_config:  # PEFT's names are those of the model itself
        return "language-model"
    if adapter.family is not None:
        return adapter.family
    if adapter.families and adapter.families <= {"sd1", "sd2"}:
        return "sd1"  # the two have the same names
    listed = f" (it may be for {', '.join(sorted(adapter.families))})" if adapter.families else ""
    raise Unsupported(
        f"{adapter.source.path}: neither names nor shapes nor metadata tell which family it is for{listed}, so its "
        f"names in another dialect are not known. --base names a checkpoint of its family.",
    )


def _read_names(base: Path, adapter: Adapter) -> tuple[ModuleIndex, str]:
    """(the modules of a checkpoint, its family); raises FamilyMismatch if the adapter is for another one."""
    checkpoint = open_checkpoint(base)
    checkpoint.close()
    identity = identify_checkpoint(checkpoint)
    check_family(identity, adapter)
    index = ModuleIndex(identity.components, {name: info.shape for name, _, info in checkpoint.tensors()})
    return index, "language-model" if identity.language_model else identity.family


def _locate_all(
    adapter: Adapter, family: str, names: Names, index: ModuleIndex | None
) -> tuple[dict[Component, dict[str, Module]], list[Module]]:
    """(component -> dotted path in any layout -> module, the modules that have none)."""
    located: dict[Component, dict[str, Module]] = {}
    unknown = []
    for module in adapter.modules:
        # The last readings take a name as it stands, prefix and all: they count where there is no prefix.
        readings = [reading for reading in module.readings if reading.dialect == module.readings[0].dialect]
        looked_up = (_look_up(reading, index) if index else _locate(reading, family) for reading in readings)
        place = next(filter(None, looked_up), None) or _kept(module.readings[0], family, names)
        if place is None:
            unknown.append(module)
            continue
        component, path = place
        other = located.setdefault(component, {}).setdefault(path, module)
        if other is not module:
            raise DuplicateTarget(
                f"{adapter.source.path}: {other.name!r} and {module.name!r} are one module by two names",
                module=module.name,
            )
    return located, unknown


def _locate(reading: Address, family: str) -> tuple[Component, str] | None:
    """(component, dotted path) that one reading of a module's name means; None if no such module is known."""
    if reading.style == "number":
        return None
    for component in _components(reading, family):
        path = dotted_path(component.naming, family, reading.path, reading.style == "flat")
        if path is not None:
            return component, path
    return None


def _look_up(reading: Address, index: ModuleIndex) -> tuple[Component, str] | None:
    """The same in a checkpoint."""
    found = index.find(reading)
    if found is None:
        return None
    return next(each for each in index.components if each.name == found.component), found.module


def _kept(reading: Address, family: str, names: Names) -> tuple[Component, str] | None:
    """A flat name that is in no table, where flat names are wanted: it stays as it is."""
    is_listed = family in _UNETS and not reading.components[0].startswith("te")
    is_kept = reading.style == "flat" and names == "kohya" and not is_listed
    component = next(_components(reading, family), None)
    return (component, reading.path) if is_kept and component is not None else None


def _components(reading: Address, family: str) -> Iterator[Component]:
    """The components that the reading may be in, the likeliest first."""
    wanted = reading.components
    if family == "language-model":
        yield Component("model", "", "hf")
        return
    if not wanted or not wanted[0].startswith("te"):
        if family in _UNETS:
            yield Component("unet", "", "diffusers unet")
        elif family == "stable-cascade":
            yield Component("unet", "", "stable-cascade")
        elif family in TABLES:
            yield Component(wanted[0] if wanted[:1] == ("transformer_2",) else "transformer", "", family)
    if not wanted or wanted[0].startswith("te"):
        name = wanted[0] if wanted else "te1"
        yield Component(name, "", "hf clip")
        yield Component("te3" if family == "flux" else name, "", "t5")


def _spoken(
    component: Component, family: str, modules: Mapping[str, Module], names: Names, source: str
) -> Iterator[NewModule]:
    own: dict[str, Parameters] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in modules.items():
        for parameter in dict.fromkeys(update.parameter for update in module.updates):
            own.setdefault(path, {})[parameter] = (Place(f"{path}:{parameter}"),)
            shapes[f"{path}:{parameter}"] = _extent(module, parameter)
    spoken = spoken_modules(component, family, own, shapes, names, whole=False)
    unsaid = [path for path in spoken if not speaks(component.naming, path, names)]
    if unsaid:
        raise Unsupported(
            f"{source}: {len(unsaid)} modules are parts of projections that {names} has as a whole, and their other "
            f"parts are not in the file, e.g. {modules[unsaid[0]].name!r}",
            modules=[modules[path].name for path in unsaid],
        )
    prefix = prefix_of(component, family, names)
    for path, parameters in spoken.items():
        places = parameters.get("weight") or next(iter(parameters.values()))
        yield NewModule(spelled(prefix, path, names), path, component.name, tuple(_shares(places, modules, shapes)))


def _shares(
    places: Iterable[Place], modules: Mapping[str, Module], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Share]:
    for place in places:
        height = shapes[place.tensor][0]
        rows = place.rows
        yield Share(modules[place.tensor.rpartition(":")[0]], rows, height if rows is None else rows[1] - rows[0])


def _extent(module: Module, parameter: str) -> tuple[int, ...]:
    """(rows, columns) of what the module updates, (rows,) of a bias; 0 where its tensors do not tell."""
    update: Update = next(update for update in module.updates if update.parameter == parameter)
    rows, columns = (size or 0 for size in update.extent)
    if update.transposed:
        rows, columns = columns, rows
    return (rows,) if parameter == "bias" else (rows, columns)
