"""What an adapter is: its modules with their algorithms and scales, its dialects, its family."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bake.errors import InputError, NonFinite, UnmatchedModules, Unsupported
from bake.identify.fingerprints import families_by_names, family_by_metadata, family_by_shapes
from bake.identify.others import kind_of
from bake.identify.peft import PeftConfig, configs_in_metadata, parse_peft_config
from bake.io.adapter import AdapterFile
from bake.io.tensorfile import read_number
from bake.keys.dialects import Address, addresses
from bake.keys.factors import SCALARS, Algorithm, Suffix, algorithm_of, split_key

_NUMBERED = re.compile(r"(?P<component>unet|text_encoder):(?P<number>\d+):(?P<factor>up|down)")
_EMBEDDING = re.compile(r"<[^>]+>|bundle_emb\..+")
# Buffers and slider settings that some tools store and that update nothing.
_NO_UPDATE = re.compile(r"(.*[._])?(position_ids|_aux\..+)|_aux\..+")


@dataclass(frozen=True, slots=True)
class Update:
    """What a module does to one parameter of its target."""

    parameter: str  # "weight" or "bias"
    algorithm: str
    factors: Mapping[str, str]  # factor -> tensor name in the adapter
    delta: tuple[int, int]  # (rows, columns) of the update, before any transposition
    rank: int | None
    scale: float  # alpha / rank; what the user typed comes on top
    transposed: bool  # stored (in, out)


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
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({u.rank for module in self.modules for u in module.updates if u.rank is not None}))


class Member(NamedTuple):
    """One tensor of a module."""

    tensor: str
    transposed: bool


Members = dict[str, Member]  # factor -> tensor
Groups = dict[str, dict[str, Members]]  # module -> parameter -> what updates it


def identify_adapter(source: AdapterFile) -> Adapter:
    """Everything bake knows about an adapter without its base.

    What bake recognises and cannot fuse is described all the same, with the reasons in `refusals`.
    Raises Unsupported for files that are no adapters, InputError for incomplete or contradictory
    ones, NonFinite for a NaN or infinite alpha.
    """
    path = str(source.path)
    groups, embeddings, unknown = _group(source)
    kind = kind_of(unknown or embeddings, beside_factors=bool(groups))
    if kind is not None and (kind.has_factors or not groups):
        raise Unsupported(f"{path} is {kind.name}, nothing to fuse. {kind.advice}", path=path, kind=kind.name)
    if not groups:
        example = next(iter(source.file.tensors), "nothing at all")
        raise UnmatchedModules(
            f"{path}: none of its {len(source.file.tensors)} tensors has a name that a known adapter format uses "
            f"(it holds {example!r})",
            path=path,
        )
    refusals: list[Unsupported] = []
    config, by_component = None, {}
    try:
        by_component = configs_in_metadata(source.file.metadata, path)
        if source.config is not None and "peft_type" in source.config:
            config = parse_peft_config(source.config, str(source.config_path))
    except Unsupported as refusal:
        refusals.append(refusal)
    scales = _Scales(source, config, by_component)
    modules = tuple(_module(source, name, parameters, scales, refusals) for name, parameters in groups.items())
    refused = (refusal.details.get("algorithm") for refusal in refusals)
    algorithms = (*(update.algorithm for module in modules for update in module.updates), *filter(None, refused))
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
        embeddings=tuple(embeddings),
        unknown=tuple(unknown),
        notes=tuple(scales.notes()),
        refusals=tuple(refusals),
    )


def is_adapter(source: AdapterFile) -> bool:
    """True if at least one module of the file has all the factors of a known algorithm."""
    groups, _, _ = _group(source)
    return any(algorithm_of(factors) for parameters in groups.values() for factors in parameters.values())


def _group(source: AdapterFile) -> tuple[Groups, list[str], list[str]]:
    """(factors by module and parameter, token embeddings, names no format knows)."""
    groups: Groups = {}
    embeddings: list[str] = []
    unknown: list[str] = []
    names = _list_names(source) if source.file.is_list else {}
    for key in source.file.tensors:
        found = _split_numbered(names.get(key, key)) or split_key(key)
        if found is not None:
            module, suffix = found
            members = groups.setdefault(module, {}).setdefault(suffix.parameter, {})
            if suffix.factor in members:
                raise InputError(
                    f"{source.path}: module {module!r} has two tensors for {suffix.factor}: "
                    f"{members[suffix.factor].tensor!r} and {key!r}"
                )
            members[suffix.factor] = Member(key, suffix.transposed)
        elif _EMBEDDING.fullmatch(key):
            embeddings.append(key)
        elif not _NO_UPDATE.fullmatch(key):
            unknown.append(key)
    return groups, embeddings, unknown


def _split_numbered(key: str) -> tuple[str, Suffix] | None:
    """(module name, suffix) of cloneofsimo's keys, such as unet:0:up."""
    found = _NUMBERED.fullmatch(key)
    return None if found is None else (f"{found['component']}:{found['number']}", Suffix(found["factor"]))


def _list_names(source: AdapterFile) -> dict[str, str]:
    """Names for the tensors of cloneofsimo's .pt lists: [up, down, up, down, ...] of one component.

    Raises InputError if the list does not hold pairs of matrices.
    """
    tensors = list(source.file.tensors.items())
    if len(tensors) % 2 or any(len(info.shape) < 2 for _, info in tensors):
        raise InputError(f"{source.path}: a list of {len(tensors)} tensors that are not pairs of up and down factors")
    # A text encoder is as wide inside as outside; a UNet has several widths.
    widths = {info.shape[0] for _, info in tensors[::2]} | {info.shape[1] for _, info in tensors[1::2]}
    component = "text_encoder" if len(widths) == 1 else "unet"
    return {key: f"{component}:{i // 2}:{('up', 'down')[i % 2]}" for i, (key, _) in enumerate(tensors)}


class _Scales:
    """Finds alpha / rank of a module: in the file, in a configuration, else 1."""

    def __init__(self, source: AdapterFile, config: PeftConfig | None, by_component: Mapping[str, PeftConfig]) -> None:
        self.source = source
        self.config = config
        self.by_component = by_component
        self.without_alpha = 0
        self.total = 0
        self.zero = 0

    def of(self, module: str, row: Algorithm, members: Members, rank: int | None) -> float:
        if "scale" in members:
            return self._number(members["scale"].tensor)
        if row.rank_of is None or rank is None:
            return 1.0
        self.total += 1
        if "alpha" in members:
            alpha = self._number(members["alpha"].tensor)
            self.zero += alpha == 0
            return alpha / rank if rank else 0.0
        component, _, below = module.partition(".")
        if component in self.by_component:
            return self.by_component[component].scale(below, rank)
        if self.config is not None:
            return self.config.scale(module.removeprefix("base_model.model."), rank)
        self.without_alpha += 1
        return 1.0

    def _number(self, tensor: str) -> float:
        value = read_number(self.source.file, tensor)
        if not math.isfinite(value):
            raise NonFinite(f"{self.source.path}: {tensor!r} is {value}", tensor=tensor)
        return value

    def notes(self) -> Iterable[str]:
        if self.without_alpha:
            yield f"no alpha stored for {self.without_alpha} of {self.total} modules: alpha / rank taken as 1"
        if self.zero:
            yield f"alpha is 0 in {self.zero} of {self.total} modules: they change nothing"


def _module(
    source: AdapterFile,
    name: str,
    parameters: Mapping[str, Members],
    scales: _Scales,
    refusals: list[Unsupported],
) -> Module:
    updates = []
    # alpha belongs to the module, whichever of its parameters the other factors update
    for parameter, members in parameters.items():
        if members.keys() <= set(SCALARS) and len(parameters) > 1:
            continue
        try:
            updates.append(_update(source, name, parameter, members, scales))
        except Unsupported as refusal:
            refusals.append(refusal)
    numbered = re.fullmatch(r"(unet|text_encoder):(\d+)", name)
    if numbered is not None:
        component = {"unet": "unet", "text_encoder": "te1"}[numbered[1]]
        return Module(name, (Address((component,), numbered[2], "number", "cloneofsimo"),), tuple(updates))
    return Module(name, addresses(name), tuple(updates))


def _update(source: AdapterFile, module: str, parameter: str, members: Members, scales: _Scales) -> Update:
    row = algorithm_of(members)
    if row is None:
        held = ", ".join(sorted(members))
        raise InputError(
            f"{source.path}: module {module!r} is incomplete: it has {held} and nothing to go with it", module=module
        )
    if row.shape is None:
        raise Unsupported(
            f"{source.path}: {row.name} in module {module!r}: recognised, but this version of bake does not fuse it",
            algorithm=row.name,
            module=module,
        )
    extra = sorted(set(members) - set(row.factors) - set(SCALARS))
    if extra:
        raise Unsupported(
            f"{source.path}: module {module!r} combines {row.name} with {', '.join(extra)}, which bake does not fuse",
            module=module,
        )
    tensors = {factor: member.tensor for factor, member in members.items() if factor in row.factors}
    shapes = {factor: source.file.tensors[key].shape for factor, key in tensors.items()}
    try:
        delta = row.shape(shapes)
    except ValueError as error:
        raise InputError(f"{source.path}: module {module!r}: {error}", module=module) from None
    rank = shapes[row.rank_of][0] if row.rank_of is not None else None
    transposed = any(member.transposed for member in members.values())
    return Update(parameter, row.name, tensors, delta, rank, scales.of(module, row, members, rank), transposed)


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
    families, evidence = families_by_names(outside_text, ("te2",) in components)
    hint = family_by_metadata(source.file.metadata) or family_by_shapes(downs)
    return families, hint, evidence
