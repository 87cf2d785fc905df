"""PEFT's adapter_config.json: the scale of every module, and what such a file may ask for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bake.errors import InputError, Unsupported

# Settings that change what the factors mean. Value: what to call it in a refusal.
_UNSUPPORTED_IF_SET = {
    "use_dora": "DoRA",
    "modules_to_save": "whole replaced modules (modules_to_save)",
    "trainable_token_indices": "trained token rows (trainable_token_indices)",
    "target_parameters": "updates of bare parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "lora_bias": "trained biases (lora_bias)",
    "alora_invocation_tokens": "an activated LoRA, which is switched on by certain tokens only",
    "use_qalora": "QALoRA",
    "arrow_config": "an Arrow router",
}
# Initialisations that change the base itself: the factors only fit the changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The part of a LoRA configuration that decides scales and orientation."""

    rank: int | None
    alpha: float | None
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    fan_in_fan_out: bool
    source: str  # where it was read, for messages

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank of `module` (alpha / sqrt(rank) if rank-stabilised); 1 where no alpha is known.

        module: dotted path without the `base_model.model.` before it. rank: of its stored factors.
        Raises InputError if the configuration names another rank than the factors have.
        Source: PEFT utils/other.py get_pattern_key, tuners/lora/layer.py update_layer.
        """
        configured = _by_pattern(self.rank_pattern, module, self.rank)
        if configured is not None and configured != rank:
            raise InputError(
                f"{self.source}: rank {configured:g} for {module}, but its factors have rank {rank}; "
                f"the configuration belongs to another adapter",
                module=module,
            )
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def parse_peft_config(config: Mapping[str, Any], source: str) -> PeftConfig:
    """The scales that `config` sets.

    Raises InputError if it is malformed, Unsupported if it asks for what bake does not fuse.
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise Unsupported(
            f"{source}: a PEFT adapter of type {kind}. bake fuses LORA; "
            f"for this one call merge_and_unload() in PEFT itself.",
            peft_type=kind,
        )
    for setting, meaning in _UNSUPPORTED_IF_SET.items():
        if config.get(setting):
            raise Unsupported(f"{source}: the adapter contains {meaning}, which bake does not fuse", setting=setting)
    if config.get("bias", "none") != "none":
        raise Unsupported(f"{source}: the adapter replaces biases (bias={config['bias']!r}), which bake does not fuse")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise Unsupported(
            f"{source}: initialised with {start}, so it was trained against a changed base and would "
            f"spoil the original one. Convert it in PEFT first (save_pretrained with "
            f"path_initial_model_for_weight_conversion).",
            init_lora_weights=start,
        )
    try:
        return PeftConfig(
            rank=None if config.get("r") is None else int(config["r"]),
            alpha=None if config.get("lora_alpha") is None else float(config["lora_alpha"]),
            rank_pattern=_checked_patterns(config.get("rank_pattern")),
            alpha_pattern=_checked_patterns(config.get("alpha_pattern")),
            rank_stabilised=bool(config.get("use_rslora")),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            source=source,
        )
    except (TypeError, ValueError, re.error) as error:
        raise InputError(f"{source}: malformed LoRA configuration: {error}") from None


def _checked_patterns(found: Any) -> dict[str, float]:
    patterns = {str(pattern): float(value) for pattern, value in dict(found or {}).items()}
    for pattern in patterns:
        re.compile(pattern)
    return patterns


def configs_in_metadata(metadata: Mapping[str, str], path: str) -> dict[str, PeftConfig]:
    """Component prefix ("unet", "text_encoder", ...) -> configuration, as diffusers stores them.

    Source: diffusers loaders/lora_base.py: one JSON object under "lora_adapter_metadata", its keys
    are "<component>.<setting>".
    """
    if "lora_adapter_metadata" not in metadata:
        return {}
    source = f"{path}: lora_adapter_metadata"
    try:
        flat = json.loads(metadata["lora_adapter_metadata"])
        parts: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, _, setting = key.partition(".")
            parts.setdefault(component, {})[setting] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{source}: not the JSON object it should be: {error}") from None
    return {component: parse_peft_config(settings, source) for component, settings in parts.items()}
