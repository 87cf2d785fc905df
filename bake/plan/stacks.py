"""LoRAs on stacks of experts (PEFT target_parameters): one term for every expert and tensor of the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from bake.identify.adapter import Adapter, Module
from bake.keys.dialects import Address
from bake.keys.experts import ExpertSlice, Level, expert_updates, split_nesting
from bake.keys.factors import as_matrix
from bake.keys.modules import Found, ModuleIndex
from bake.keys.places import Place
from bake.plan.regions import Region

_PARAMETERS = ("gate_up_proj", "down_proj")  # of a stack of experts


class Share(NamedTuple):
    """What one expert takes from the factors of a stacked LoRA, and where it goes."""

    place: Place
    region: Region  # rows are counted through a stack; part and height are those of the expert's update
    scale: float
    expert: int
    experts: int


class Stacks:
    """The modules of an adapter that are LoRAs on stacks of experts, with what they come to."""

    def __init__(self, adapter: Adapter, index: ModuleIndex, shapes: Mapping[str, tuple[int, ...]], family: str):
        """Raises ShapeMismatch or Unsupported as `expert_updates`; modules without a place are left out."""
        self.found: dict[str, tuple[Found, list[Share]]] = {}
        nested: dict[str, list[Module]] = {}
        for module in adapter.modules:
            if any(update.stacked for update in module.updates):
                nested.setdefault(split_nesting(module.name)[0], []).append(module)
        for modules in nested.values():
            where = next(_stacks_at(modules[0], index), None)
            if where is not None:
                self._add(
                    adapter, where, sorted(modules, key=lambda m: -split_nesting(m.name)[1]), index, shapes, family
                )

    def _add(
        self,
        adapter: Adapter,
        where: Found,
        modules: list[Module],
        index: ModuleIndex,
        shapes: Mapping[str, tuple[int, ...]],
        family: str,
    ) -> None:
        config = adapter.config
        assert config is not None  # only a configuration makes a module a stack
        path = where.module.rpartition(".")[0]
        levels = [
            Level(module.name, *(adapter.source.file.tensors[update.factors[f]].shape for f in ("down", "up")))
            for module in modules
            for update in module.updates
        ]
        spellings = index.spellings[where.component]
        for update in expert_updates(
            *(path, levels, config.target_parameters, spellings, shapes),
            peft_version=config.peft_version,
            model_type=family,
        ):
            scale = config.scale(update.parameter, update.rank)
            shares = [share for slice_ in update.slices for share in _shares(slice_, len(update.slices), scale, shapes)]
            self.found[update.name] = (where, shares)


def _stacks_at(module: Module, index: ModuleIndex) -> Iterator[Found]:
    for reading in module.readings:
        for parameter in _PARAMETERS:
            found = index.find(Address(reading.components, f"{reading.path}.{parameter}", "dotted", reading.dialect))
            if found is not None:
                yield found


def _shares(slice_: ExpertSlice, experts: int, scale: float, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Share]:
    height = sum(_span(place, shapes)[1] - _span(place, shapes)[0] for place in slice_.places)
    for place in slice_.places:
        rows = _span(place, shapes)
        part = place.part or (0, rows[1] - rows[0])
        columns = (0, shapes[place.tensor][-1])
        region = Region(rows, columns, part, height, place.transposed)
        yield Share(place, region, scale, slice_.expert, experts)


def _span(place: Place, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    return place.rows or (0, as_matrix(shapes[place.tensor])[0])
