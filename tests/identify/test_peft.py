"""PEFT configurations, against PEFT's own resolution of patterns."""

from __future__ import annotations

import math

import pytest

from bake.errors import InputError, Unsupported
from bake.identify.peft import parse_peft_config

BASE = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def scale(module: str, rank: int, **changed) -> float:
    return parse_peft_config({**BASE, **changed}, "config").scale(module, rank)


def test_alpha_over_rank() -> None:
    assert scale("model.layers.0.q_proj", 8) == 2.0


def test_rank_stabilised() -> None:
    assert scale("q_proj", 8, use_rslora=True) == 16 / math.sqrt(8)


def test_patterns_pick_rank_and_alpha_by_module() -> None:
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.1\..*": 2}}
    assert scale("model.layers.0.q_proj", 4, **patterns) == 4.0
    assert scale("model.layers.1.v_proj", 8, **patterns) == 0.25
    assert scale("model.layers.1.q_proj", 4, **patterns) == 0.5
    assert scale("model.layers.0.big_q_proj", 8, **patterns) == 2.0


def test_peft_resolves_the_same_patterns_alike() -> None:
    other = pytest.importorskip("peft.utils.other", reason="the PEFT oracle is not installed")
    patterns = {"q_proj": 1, "layers.1.v_proj": 2, r"layers\.[02]\.mlp": 3, "proj": 4, ".*k_proj": 5}
    for module in ("model.layers.0.q_proj", "layers.1.v_proj", "x.layers.2.mlp", "my_q_proj", "a.k_proj", "proj"):
        key = other.get_pattern_key(patterns.keys(), module)
        expected = patterns.get(key, 16)
        assert scale(module, 8, alpha_pattern=patterns) * 8 == expected


def test_another_rank_than_the_factors_have_is_an_input_error() -> None:
    with pytest.raises(InputError, match="rank 8 for q_proj, but its factors have rank 4"):
        scale("q_proj", 4)


def test_without_an_alpha_the_scale_is_one() -> None:
    assert scale("q_proj", 8, lora_alpha=None) == 1.0


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "IA3", "VERA", "ADALORA", "PROMPT_TUNING", "BOFT"])
def test_other_kinds_are_refused_by_name(kind: str) -> None:
    with pytest.raises(Unsupported, match=kind):
        parse_peft_config({"peft_type": kind}, "config")


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"lora_bias": True},
        {"bias": "all"},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        *({"init_lora_weights": name} for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")),
    ],
    ids=str,
)
def test_what_would_be_lost_is_refused(setting) -> None:
    with pytest.raises(Unsupported):
        parse_peft_config({**BASE, **setting}, "config")


@pytest.mark.parametrize("setting", [{"init_lora_weights": True}, {"init_lora_weights": "gaussian"}, {"bias": "none"}])
def test_harmless_settings_pass(setting) -> None:
    assert parse_peft_config({**BASE, **setting}, "config").rank == 8


@pytest.mark.parametrize(
    "setting",
    [
        {"r": "many"},
        {"lora_alpha": []},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"(": 1}},
        {"rank_pattern": {"a": "b"}},
    ],
    ids=str,
)
def test_malformed_settings_are_input_errors(setting) -> None:
    with pytest.raises(InputError, match="malformed"):
        parse_peft_config({**BASE, **setting}, "config")
