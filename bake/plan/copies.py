"""Modules of an adapter that say again what another one says, or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping

from bake.errors import DuplicateTarget
from bake.identify.adapter import Adapter, Module
from bake.io.tensorfile import read_tensor_bytes
from bake.keys.modules import Found
from bake.plan.model import Term

# The factors of which one alone makes an update zero.
_PRODUCTS = {"lora": ("up", "down"), "full": ("diff",)}


def repeats_rows(module: Module, adapter: Adapter, placed: Container[str]) -> bool:
    """True for token rows that another module, one of those in `placed`, gives the same values.

    PEFT saves its trainable tokens under every name of a tied embedding, of which a checkpoint stores
    only one: T5 and BART have them at shared, encoder.embed_tokens and decoder.embed_tokens.
    Source: PEFT tuners/trainable_tokens/model.py.
    """
    if adapter.config is None or adapter.config.kind != "TRAINABLE_TOKENS" or len(module.updates) != 1:
        return False
    (update,) = module.updates
    file = adapter.source.file
    return any(
        other.row_numbers == update.row_numbers
        and read_tensor_bytes(file, other.factors["value"]) == read_tensor_bytes(file, update.factors["value"])
        for another in adapter.modules
        if another.name in placed
        for other in another.updates
        if other.row_numbers
    )


def repeated_projections(family: str, resolved: Mapping[str, Found]) -> set[str]:
    """The fused projections of Z-Image whose parts the file has as well: only the parts count.

    Source: diffusers loaders/lora_conversion_utils.py, which drops the fused ones of such files.
    """
    if family != "z-image":
        return set()
    paths = {found.module for found in resolved.values()}
    return {
        name
        for name, found in resolved.items()
        if found.module.endswith(".qkv")
        and all(f"{found.module.removesuffix('qkv')}to_{part}" in paths for part in "qkv")
    }


def is_zero(adapter: Adapter, term: Term) -> bool:
    """True if the update is nothing but zeros, as what some trainers write beside the module they trained."""
    telling = _PRODUCTS.get(term.algorithm, ()) if term.dora is None else ()
    file = adapter.source.file
    return any(not read_tensor_bytes(file, term.factors[factor].name).strip(b"\0") for factor in telling)


def check_same(adapter: Adapter, one: tuple[Module, Term], two: tuple[Module, Term], tensor: str) -> None:
    """Raise DuplicateTarget unless two modules for one place are copies of each other."""
    (owner, other), (module, term) = one, two
    file = adapter.source.file
    same = dataclasses.replace(term, module=other.module, factors=other.factors) == other and all(
        factor in term.factors
        and read_tensor_bytes(file, stored.name) == read_tensor_bytes(file, term.factors[factor].name)
        for factor, stored in other.factors.items()
    )
    if not same:
        raise DuplicateTarget(
            f"{adapter.source.path}: {owner.name!r} and {module.name!r} both update {tensor}, "
            f"with different values; the file contradicts itself",
            modules=[owner.name, module.name],
            tensor=tensor,
        )
