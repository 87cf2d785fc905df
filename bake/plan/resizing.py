"""Which LoRAs of an adapter can have another rank, and what in the file says their rank and alpha."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bake.errors import Unsupported
from bake.identify.adapter import Adapter, Module
from bake.identify.parts import component_of
from bake.identify.updates import Update
from bake.keys.factors import split_key
from bake.keys.written import Scaled, peft_settings
from bake.plan.adapter import Ranks

_WRAPPER = "base_model.model."
_METADATA = "lora_adapter_metadata"
_FROM_MODULES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


@dataclass(frozen=True, slots=True)
class Resizable:
    """A LoRA and the tensors that a new rank changes."""

    name: str
    path: str  # as a configuration calls it
    component: str
    up: str  # tensor names
    down: str
    mid: str | None
    alpha: str | None  # None: alpha is in a configuration, or there is none
    scale: float  # alpha / rank, which stays
    columns: tuple[int, ...]  # the shape of the weight without its rows: (in, kernel...)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor that the new rank takes the place of."""
        return tuple(name for name in (self.up, self.down, self.mid, self.alpha) if name is not None)


@dataclass(frozen=True)
class ResizePlan:
    """What is resized."""

    ranks: Ranks
    modules: tuple[Resizable, ...]
    others: int  # modules of other kinds, which are copied


def plan_resizing(adapter: Adapter, ranks: Ranks) -> ResizePlan:
    """What of `adapter` gets another rank.

    Raises Unsupported if nothing can, or if its configuration can only name one rank.
    """
    path = adapter.source.path
    if adapter.refusals:
        raise adapter.refusals[0]
    if adapter.config is not None and adapter.config.kind == "MLX":
        raise Unsupported(
            f"{path}: MLX knows one rank for all modules; make it PEFT's first: bake convert --names peft"
        )
    alphas = {found[0]: key for key, found in _split(adapter) if found[1].factor == "alpha"}
    modules = tuple(filter(None, (_resizable(adapter, module, alphas) for module in adapter.modules)))
    if adapter.config is not None and len(modules) < sum(_has_lora(module) for module in adapter.modules):
        raise Unsupported(
            f"{path}: LoRAs on stacked experts are among its modules, whose rank its configuration says together with "
            f"the others'. Fuse it into its base with 'bake fuse' and take the result out again with 'bake extract'."
        )
    if not modules:
        raise Unsupported(
            f"{path}: no LoRA in it ({', '.join(adapter.algorithms)}), and no other kind has a rank that can be "
            f"changed without training"
        )
    return ResizePlan(ranks, modules, len(adapter.modules) - len(modules))


def _split(adapter: Adapter) -> Iterator[tuple[str, Any]]:
    for key in adapter.source.file.tensors:
        found = split_key(key)
        if found is not None:
            yield key, found


def _resizable(adapter: Adapter, module: Module, alphas: Mapping[str, str]) -> Resizable | None:
    update = next((update for update in module.updates if update.algorithm == "lora"), None)
    if update is None or update.stacked or _is_part(update):
        return None
    tensors = adapter.source.file.tensors
    wide = tensors[update.factors.get("mid", update.factors["down"])].shape
    return Resizable(
        name=module.name,
        path=_configured_path(module.name, adapter),
        component=component_of(module, adapter),
        up=update.factors["up"],
        down=update.factors["down"],
        mid=update.factors.get("mid"),
        alpha=alphas.get(module.name),
        scale=update.scale,
        columns=(tensors[update.factors["down"]].shape[1], *wide[2:]),
    )


def _has_lora(module: Module) -> bool:
    return any(update.algorithm == "lora" for update in module.updates)


def _is_part(update: Update) -> bool:
    """True for one of several LoRAs of a projection that share their alpha."""
    found = split_key(update.factors["up"])
    return found is not None and found[1].part is not None


def _configured_path(module: str, adapter: Adapter) -> str:
    """The module as the configuration that speaks of it calls it."""
    if adapter.config is None:
        return module
    while module.startswith(_WRAPPER):
        module = module[len(_WRAPPER) :]
    return module


def resized_config(adapter: Adapter, scaled: Mapping[str, Scaled]) -> dict[str, Any] | None:
    """adapter_config.json with the new ranks and alphas; None if there is none."""
    config = adapter.source.config
    return None if config is None else {**config, **_changed(scaled)}


def resized_metadata(adapter: Adapter, scaled: Mapping[str, Scaled]) -> dict[str, str]:
    """diffusers' configurations in the metadata with the new ranks and alphas; {} if there are none."""
    text = adapter.source.file.metadata.get(_METADATA)
    if text is None:
        return {}
    settings = json.loads(text)
    for component in dict.fromkeys(key.rpartition(".")[0] for key in settings):
        begin = component + "." if component else ""
        inside = {path[len(begin) :]: each for path, each in scaled.items() if path.startswith(begin)}
        if inside:
            settings |= {begin + key: value for key, value in _changed(inside).items()}
    return {_METADATA: json.dumps(settings)}


def _changed(scaled: Mapping[str, Scaled]) -> dict[str, Any]:
    settings = peft_settings(scaled, False, False, False)
    return {key: settings[key] for key in _FROM_MODULES}
