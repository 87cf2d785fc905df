"""How the tensors of an adapter are called in the dialects that bake writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bake.keys.spoken import Names

_LORA = {"up": "lora_B.weight", "down": "lora_A.weight", "magnitude": "lora_magnitude_vector", "up_bias": "lora_B.bias"}
# dialect -> factor -> what follows the module's name. Other factors have no name there.
SUFFIXES: dict[Names, dict[str, str]] = {
    "kohya": {
        "up": "lora_up.weight",
        "down": "lora_down.weight",
        "mid": "lora_mid.weight",
        "alpha": "alpha",
        "magnitude": "dora_scale",
        "diff": "diff",
        "bias": "diff_b",
        "norm": "w_norm",
        "norm_bias": "b_norm",
        "w1_a": "hada_w1_a",
        "w1_b": "hada_w1_b",
        "w2_a": "hada_w2_a",
        "w2_b": "hada_w2_b",
        "t1": "hada_t1",
        "t2": "hada_t2",
        "kron_w1": "lokr_w1",
        "kron_w1_a": "lokr_w1_a",
        "kron_w1_b": "lokr_w1_b",
        "kron_w2": "lokr_w2",
        "kron_w2_a": "lokr_w2_a",
        "kron_w2_b": "lokr_w2_b",
        "kron_t2": "lokr_t2",
    },
    "diffusers": _LORA,
    "peft": _LORA,
}
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")


class Scaled(NamedTuple):
    """What a configuration says of one module."""

    rank: int
    alpha: float


def peft_settings(modules: Mapping[str, Scaled], dora: bool, lora_bias: bool, fan_in_fan_out: bool) -> dict[str, Any]:
    """The part of a PEFT LoRA configuration that follows from its modules. modules: by path in the model.

    The commonest rank and alpha are the configuration's own, modules with others are in its patterns.
    """
    rank, alpha = Counter(modules.values()).most_common(1)[0][0]
    keys = _pattern_keys(modules)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {keys[path]: each.rank for path, each in modules.items() if each.rank != rank},
        "alpha_pattern": {keys[path]: _plain(each.alpha) for path, each in modules.items() if each.alpha != alpha},
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": dora,
        "use_rslora": False,
        "lora_bias": lora_bias,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _pattern_keys(paths: Iterable[str]) -> dict[str, str]:
    """path -> the pattern for it alone: one that is the end of another path would stand for that one as well.

    Source: PEFT utils/other.py get_pattern_key; diffusers loaders/peft.py writes "^" for the same reason.
    """
    paths = list(paths)
    ends = {path[place + 1 :] for path in paths for place, letter in enumerate(path) if letter == "."}
    return {path: f"^{path}" if path in ends else path for path in paths}


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number
