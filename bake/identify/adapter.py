"""What an adapter is: its modules with their algorithms and scales, its dialects, its family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bake.errors import InputError, UnmatchedModules, Unsupported
from bake.identify.fingerprints import families_by_names, family_by_metadata, family_by_shapes
from bake.identify.grouping import Members, Part, accept_values, group
from bake.identify.others import kind_of
from bake.identify.peft import PeftConfig, configs_in_metadata, parse_config
from bake.identify.updates import Update, UpdateReader
from bake.io.adapter import AdapterFile
from bake.keys.dialects import Address, addresses, part_addresses
from bake.keys.factors import ALGORITHMS

_NUMBERED_MODULE = re.compile(r"(unet|text_encoder):(\d{1,4})")


@dataclass(frozen=True, slots=True)
class Module:
    """One module of an adapter."""

    name: str  # as the file spells it, without suffix
    readings: tuple[Address, ...]
    updates: tuple[Update, ...]


@dataclass(frozen=True)
class Adapter:
    """An identified adapter."""

    source: AdapterFile
    modules: tuple[Module, ...]
    dialects: tuple[str, ...]
    algorithms: tuple[str, ...]
    families: frozenset[str]  # that its names belong to; empty where they do not tell
    family_hint: str | None  # by metadata or widths, for messages
    evidence: str
    config: PeftConfig | None = None
    embeddings: tuple[str, ...] = ()  # token embeddings that travel in the file
    unknown: tuple[str, ...] = ()  # tensors whose names no adapter format uses
    notes: tuple[str, ...] = ()
    refusals: tuple[Unsupported, ...] = ()  # why it cannot be fused, if it cannot

    @property
    def family(self) -> str | None:
        """The one family it was made for, where names, or names and the hint together, leave only one."""
        if len(self.families) == 1:
            return min(self.families)
        return self.family_hint if not self.families or self.family_hint in self.families else None

    @property
    def transforms(self) -> bool:
        """True if the result depends on what else is fused before it."""
        changing = {row.name for row in ALGORITHMS if row.transforms}
        return any(u.algorithm in changing or u.magnitude for module in self.modules for u in module.updates)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({u.rank for module in self.modules for u in module.updates if u.rank is not None}))


def identify_adapter(source: AdapterFile) -> Adapter:
    """Everything bake knows about an adapter without its base.

    What bake recognises and cannot fuse is described all the same, with the reasons in `refusals`.
    Raises Unsupported for files that are no adapters, InputError for incomplete or contradictory
    ones, NonFinite for a NaN or infinite alpha.
    """
    path = str(source.path)
    grouping = group(source)
    has_factors = bool(grouping.modules)
    others = source.file.tensors if has_factors else grouping.unknown + grouping.values or grouping.embeddings
    kind = kind_of(others, beside_factors=has_factors)
    if kind is not None and (kind.has_factors or not has_factors):
        raise Unsupported(f"{path} is {kind.name}, nothing to fuse. {kind.advice}", path=path, kind=kind.name)
    refusals: list[Unsupported] = []
    config, by_component = None, {}
    try:
        by_component = configs_in_metadata(source.file.metadata, path)
        config = by_component.pop("", None)
        if source.config is not None:
            config = parse_config(source.config, str(source.config_path))
    except Unsupported as refusal:
        refusals.append(refusal)
    if has_factors or config is not None:
        accept_values(source, grouping)
    if not grouping.modules:
        example = next(iter(source.file.tensors), "nothing at all")
        raise UnmatchedModules(
            f"{path}: none of its {len(source.file.tensors)} tensors has a name that a known adapter format uses "
            f"(it holds {example!r})",
            path=path,
        )
    reader = UpdateReader(source, config, by_component, grouping.shared)
    try:
        modules = tuple(_module(part, parameters, reader, refusals) for part, parameters in grouping.modules.items())
    except InputError:
        if refusals:  # what the configuration says explains what the tensors lack
            raise refusals[0] from None
        raise
    refused = (refusal.details.get("algorithm") for refusal in refusals)
    algorithms = (*(update.title for module in modules for update in module.updates), *filter(None, refused))
    families, hint, evidence = _families(source, modules)
    return Adapter(
        source=source,
        modules=modules,
        dialects=tuple(dict.fromkeys(module.readings[0].dialect for module in modules)),
        algorithms=tuple(dict.fromkeys(algorithms)),
        families=families,
        family_hint=hint,
        evidence=evidence,
        config=config,
        embeddings=tuple(grouping.embeddings),
        unknown=tuple(grouping.unknown + grouping.values),
        notes=(*(config.notes if config is not None else ()), *reader.notes()),
        refusals=tuple(refusals),
    )


def is_adapter(source: AdapterFile) -> bool:
    """True if at least one module of the file has all the factors of a known algorithm."""
    return group(source).has_algorithm({name: info.shape for name, info in source.file.tensors.items()})


def _module(part: Part, parameters: Mapping[str, Members], reader: UpdateReader, refused: list[Unsupported]) -> Module:
    try:
        updates = tuple(reader.updates(part.module, parameters))
    except Unsupported as refusal:
        refused.append(refusal)
        updates = ()
    numbered = _NUMBERED_MODULE.fullmatch(part.module)
    if numbered is not None:
        component = {"unet": "unet", "text_encoder": "te1"}[numbered[1]]
        return Module(part.title, (Address((component,), numbered[2], "number", "cloneofsimo"),), updates)
    return Module(part.title, part_addresses(part.module, part.number or 0, part.parts) or _homeless(part), updates)


def _homeless(part: Part) -> tuple[Address, ...]:
    """Readings of a part of a split that bake does not know: paths that no base has, so that it is listed as such."""
    return tuple(reading._replace(path=f"{reading.path}[{part.number}]") for reading in addresses(part.module))


def _families(source: AdapterFile, modules: tuple[Module, ...]) -> tuple[frozenset[str], str | None, str]:
    """(families the names belong to, a hint where names do not tell, the evidence)."""
    components = {address.components for module in modules for address in module.readings[:1]}
    outside_text = [
        module.name
        for module in modules
        if not any(name.startswith("te") for address in module.readings[:1] for name in address.components)
    ]
    downs = {
        module.name: source.file.tensors[update.factors["down"]].shape
        for module in modules
        for update in module.updates
        if "down" in update.factors
    }
    families, evidence = families_by_names(outside_text, {names[0] for names in components if len(names) == 1})
    hint = family_by_metadata(source.file.metadata) or family_by_shapes(downs)
    return families, hint, evidence
