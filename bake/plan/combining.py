"""Several adapters -> one: which modules of which belong together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bake.errors import FamilyMismatch, Unsupported, UsageError
from bake.identify.adapter import Adapter
from bake.identify.families import title
from bake.keys.spoken import Names, usual_names
from bake.plan.adapter import Ranks
from bake.plan.respelling import WRITTEN_AS, NewModule, Respelled, family_of, respell

EXACT = "concat"
# The others make one update of several, and factors of that. linear is PEFT's name for svd.
METHODS = (EXACT, "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_PRUNES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


@dataclass(frozen=True, slots=True)
class Combination:
    """How updates are combined."""

    method: str = EXACT
    density: float | None = None  # share of the entries that is kept, by the methods that prune
    seed: int = 0  # of the methods that prune by chance

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method}: unknown; it is {', '.join(METHODS)}")
        if (self.method in _PRUNES) != (self.density is not None):
            needed = "needs --density, the share of entries to keep" if self.method in _PRUNES else "takes no --density"
            raise UsageError(f"--method {self.method} {needed}")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"--density {self.density:g}: a share above 0, at most 1")


@dataclass(frozen=True)
class CombinePlan:
    """What is combined."""

    combination: Combination
    ranks: Ranks
    family: str
    names: Names
    weights: tuple[float, ...]
    adapters: tuple[Respelled, ...]
    together: dict[str, tuple[tuple[int, NewModule], ...]]  # module's new name -> (place of its adapter, it there)


def plan_combination(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination: Combination,
    ranks: Ranks,
    names: Names | None,
    only: Iterable[str] = (),
) -> CombinePlan:
    """Which modules are combined. names: of the output; None: the first adapter's.

    Raises UsageError for requests that cannot be meant, FamilyMismatch for adapters of different families, and what
    `respell` raises.
    """
    if len(adapters) < 2:
        raise UsageError("name at least two adapters")
    for adapter, weight in zip(adapters, weights, strict=True):
        if not math.isfinite(weight) or weight == 0:
            raise UsageError(f"{adapter.source.path}: a weight is a finite number other than 0")
    if combination.method == EXACT and ranks != Ranks():
        raise UsageError(f"--method {EXACT} keeps every rank; use --method svd with --rank, --keep and their kin")
    dialect = adapters[0].dialects[0]
    is_language_model = "language-model" in adapters[0].families
    chosen = names or WRITTEN_AS.get(dialect) or usual_names("", is_language_model)
    respelled = _respelled(adapters, chosen, only)
    for adapter, each in zip(adapters, respelled, strict=True):
        if each.family != respelled[0].family:
            raise FamilyMismatch(
                f"{adapters[0].source.path} is for {title(respelled[0].family)}, {adapter.source.path} for "
                f"{title(each.family)}",
                families=[other.family for other in respelled],
            )
        if adapter.transforms:
            kinds = ", ".join(adapter.algorithms)
            raise Unsupported(
                f"{adapter.source.path}: {kinds} change the weight itself, so there is no sum of them and others. Fuse "
                f"the adapters into their base with 'bake fuse' and take the result out again with 'bake extract'.",
                algorithms=list(adapter.algorithms),
            )
    together: dict[str, list[tuple[int, NewModule]]] = {}
    for place, each in enumerate(respelled):
        for module in each.modules:
            together.setdefault(module.name, []).append((place, module))
    return CombinePlan(
        *(combination, ranks, respelled[0].family, chosen, tuple(weights), respelled),
        {name: tuple(found) for name, found in together.items()},
    )


def _respelled(adapters: Sequence[Adapter], names: Names, only: Iterable[str]) -> tuple[Respelled, ...]:
    """All adapters in one dialect; whose own names leave the family open belongs to the first that tells it."""
    told = []
    for adapter in adapters:
        try:
            told.append(family_of(adapter))
        except Unsupported:
            told.append("")
    known = next(filter(None, told), None)
    families = (family or known for family in told)
    return tuple(
        respell(adapter, names, only, family=family) for adapter, family in zip(adapters, families, strict=True)
    )
