"""The base as matching sees it: every spelling of its modules, and which family it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bake.errors import FamilyMismatch
from bake.identify.adapter import Adapter
from bake.identify.checkpoint import BaseIdentity
from bake.identify.families import FAMILIES, title
from bake.io.header import TensorInfo
from bake.keys import hf
from bake.keys.modules import ModuleIndex


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
