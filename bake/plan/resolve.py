"""The module names of an adapter, looked up in the base: by spelling, by number, by a common prefix."""

from __future__ import annotations

from collections.abc import Iterable

from bake.identify.adapter import Adapter, Module
from bake.keys import hf, numbered
from bake.keys.dialects import Address, flatten
from bake.keys.modules import Found
from bake.keys.nearest import nearest_names
from bake.plan.base import Base


class Resolver:
    """Finds the places of one adapter's modules by their names."""

    def __init__(self, base: Base, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self.notes: list[str] = []

    def resolve_all(self) -> dict[str, Found]:
        """module name -> its place in the base, for the modules that have one."""
        order = self._numbered_paths()
        found: dict[str, Found] = {}
        for module in self._adapter.modules:
            for reading in module.readings:
                if reading.style == "number":
                    path = order.get((reading.components[0], int(reading.path)))
                    reading = Address(reading.components, path or "", "dotted", reading.dialect)
                hit = self._base.index.find(reading)
                if hit is not None:
                    found[module.name] = hit
                    break
        return found or self._resolve_with_drift()

    def _resolve_with_drift(self) -> dict[str, Found]:
        """The same, where all names of the adapter differ from the base's by one prefix."""
        for component in self._base.identity.components:
            if component.naming not in ("hf", "plain", "vae"):
                continue
            known = self._base.index.spellings[component.name]
            paths = {
                module.name: next((r.path for r in module.readings if r.style == "dotted" and not r.components), "")
                for module in self._adapter.modules
            }
            drift = hf.find_drift(set(paths.values()), known)
            if drift is not None:
                change = f"{drift.dropped!r} dropped" if drift.dropped else f"{drift.added!r} added"
                self.notes.append(f"{self._adapter.source.name}: its module names fit with {change} in front")
                return {
                    name: Found(component.name, drift.apply(path), known[drift.apply(path)])
                    for name, path in paths.items()
                }
        return {}

    def _numbered_paths(self) -> dict[tuple[str, int], str]:
        """(component, number) -> dotted path, for adapters that number their modules."""
        numbers: dict[str, dict[int, Module]] = {}
        for module in self._adapter.modules:
            if module.readings[0].style == "number":
                component = module.readings[0].components[0]
                numbers.setdefault(component, {})[int(module.readings[0].path)] = module
        paths: dict[tuple[str, int], str] = {}
        for component, modules in numbers.items():
            known = self._base.index.spellings.get(component, {})
            if sorted(modules) != list(range(len(modules))):
                continue
            if component == "te1":
                order = numbered.text_encoder_order(known, len(modules))
            else:
                heights = [modules[number].updates[0].extent[0] or 0 for number in (0, 4) if number in modules]
                order = numbered.unet_order(known, len(modules), len(heights) == 2 and heights[1] == 8 * heights[0])
            paths.update(((component, number), path) for number, path in enumerate(order))
        return paths

    def default_component(self) -> str:
        """The component that names without one are meant for."""
        return self._base.identity.components[0].name

    def intended_component(self, module: Module) -> str:
        """The component an unmatched module was meant for."""
        wanted = module.readings[0].components
        if not wanted:
            return self.default_component()
        return next((part.name for part in self._base.identity.components if part.answers(wanted)), wanted[0])

    def reason(self, module: Module, component: str) -> str:
        """Why a module that is meant for `component` has no place."""
        if component not in self._base.index.spellings:
            return f"the base has no {component}"
        if module.readings[0].style == "number":
            return f"the file numbers its modules, and their count fits no {component} like this base's"
        return f"no such module in the base's {component}"

    def nearest(self, module: Module, component: str) -> str | None:
        """The spelling in the base that comes nearest to the module's name; None if none comes near."""
        reading, known = module.readings[0], self._base.index.spellings.get(component)
        return None if known is None or reading.style == "number" else _nearest(reading, known)


def _nearest(reading: Address, known: Iterable[str]) -> str | None:
    names = (flatten(path) for path in known) if reading.style == "flat" else known
    return next(iter(nearest_names(reading.path, names, 1)), None)
