"""PEFT configurations, against PEFT's own resolution of patterns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bake.errors import InputError, Unsupported
from bake.identify.peft import configs_in_metadata, parse_config, parse_mlx_config, parse_peft_config

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


def test_factors_of_a_bare_parameter_are_scaled_by_its_path() -> None:
    targets = {"target_parameters": ["mlp.experts.down_proj"], "alpha_pattern": {"down_proj": 4}}
    assert scale("model.layers.0.mlp.experts.down_proj", 8, **targets) == 0.5
    with pytest.raises(Unsupported, match="bare parameter"):
        scale("model.layers.0.mlp.experts", 32, **targets)


def test_without_an_alpha_the_scale_is_one() -> None:
    assert scale("q_proj", 8, lora_alpha=None) == 1.0


FUSED = ("LORA", "LOHA", "LOKR", "ADALORA", "BOFT", "IA3", "VERA", "HRA", "TRAINABLE_TOKENS", "LN_TUNING")


@pytest.mark.parametrize("kind", FUSED)
def test_mergeable_kinds_pass(kind: str) -> None:
    assert parse_peft_config({"peft_type": kind, "r": 4}, "config").kind == kind


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("PROMPT_TUNING", "changes no weights"),
        ("PREFIX_TUNING", "changes no weights"),
        ("XLORA", "for every input"),
        ("VBLORA", "merge_and_unload"),
        ("SOMETHING_NEW", "merge_and_unload"),
    ],
)
def test_other_kinds_are_refused_by_name_with_what_to_do(kind: str, remedy: str) -> None:
    with pytest.raises(Unsupported, match=f"{kind}.*{remedy}"):
        parse_peft_config({"peft_type": kind}, "config")


def test_every_kind_that_peft_knows_is_fused_or_refused_by_name() -> None:
    peft = pytest.importorskip("peft", reason="the PEFT oracle is not installed")
    for kind in peft.PeftType:
        config = {"peft_type": kind.value, "oft_block_size": 4}
        if kind.value in (*FUSED, "OFT"):
            assert parse_peft_config(config, "config").kind == kind.value
        else:
            with pytest.raises(Unsupported, match=kind.value):
                parse_peft_config(config, "config")


@pytest.mark.parametrize(
    "setting",
    [
        {"layer_replication": [[0, 2], [1, 3]]},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"arrow_config": {"top_k": 2}},
        {"kasa_config": {"beta": 0.1}},
        {"use_bdlora": {"nblocks": 2}},
        {"peft_type": "VERA", "save_projection": False},
        {"peft_type": "OFT"},
        *({"init_lora_weights": name} for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")),
    ],
    ids=str,
)
def test_what_no_sum_can_express_is_refused(setting) -> None:
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
        {"lora_alpha": float("inf")},
        {"alpha_pattern": {"a": float("nan")}},
        {"modules_to_save": "lm_head"},
        {"target_parameters": [3]},
        {"trainable_token_indices": "all"},
        {"trainable_token_indices": {"embed_tokens": [1, -2]}},
        {"trainable_token_indices": [True]},
        {"trainable_token_indices": [7, 7]},
    ],
    ids=str,
)
def test_malformed_settings_are_input_errors(setting) -> None:
    with pytest.raises(InputError, match="malformed"):
        parse_peft_config({**BASE, **setting}, "config")


def test_settings_are_read() -> None:
    config = parse_peft_config(
        {
            **BASE,
            "use_dora": True,
            "bias": "lora_only",
            "lora_bias": True,
            "modules_to_save": ["score"],
            "target_parameters": ["experts.down_proj"],
            "ensure_weight_tying": True,
            "peft_version": "0.21.2",
            "base_model_name_or_path": "some/model",
            "a_setting_of_next_year": [1],
        },
        "config",
    )
    assert (config.dora, config.bias, config.lora_bias, config.ties_embeddings) == (True, "lora_only", True, True)
    assert (config.modules_to_save, config.target_parameters) == (("score",), ("experts.down_proj",))
    assert (config.peft_version, config.base_model, config.notes) == ("0.21.2", "some/model", ())


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, {}),
        ({"trainable_token_indices": [3, 1]}, {"": (3, 1)}),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, {"embed_tokens": (3,)}),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [5], "target_modules": ["wte"]}, {"wte": (5,)}),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [5]}, {"": (5,)}),
    ],
)
def test_token_rows_belong_to_an_embedding(setting, expected) -> None:
    assert parse_peft_config({**BASE, **setting}, "config").token_rows == expected


@pytest.mark.parametrize(
    ("setting", "terms"),
    [({}, 5), ({"use_cayley_neumann": False}, None), ({"num_cayley_neumann_terms": 3}, 3)],
)
def test_oft_inverts_by_a_series_or_exactly(setting, terms) -> None:
    config = parse_peft_config({"peft_type": "OFT", "oft_block_size": 4, "peft_version": "0.21.2", **setting}, "config")
    assert config.neumann_terms == terms
    assert config.notes == ()


def test_a_series_that_would_never_end_is_malformed() -> None:
    with pytest.raises(InputError, match="num_cayley_neumann_terms"):
        parse_peft_config({"peft_type": "OFT", "oft_block_size": 4, "num_cayley_neumann_terms": 10**9}, "config")


def test_the_series_of_older_releases_is_noted() -> None:
    assert "0.18" in parse_peft_config({"peft_type": "OFT", "oft_block_size": 4}, "config").notes[0]


@pytest.mark.parametrize(
    "name", ["unsloth/Llama-3.2-1B-bnb-4bit", "a/b-GPTQ-Int4", "x-AWQ", "mlx-community/Qwen2.5-0.5B-Instruct-4bit"]
)
def test_a_quantised_base_is_noted(name: str) -> None:
    assert name in parse_peft_config({**BASE, "base_model_name_or_path": name}, "config").notes[0]


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "bigscience/mt0-large", "", None, "a/4bitten"])
def test_an_ordinary_base_is_not(name: str | None) -> None:
    assert parse_peft_config({**BASE, "base_model_name_or_path": name}, "config").notes == ()


def test_kinds_without_a_scale_have_scale_one() -> None:
    assert parse_peft_config({"peft_type": "VERA", "r": 256}, "config").scale("q_proj", 4) == 1.0


def test_full_factors_take_the_configured_rank() -> None:
    config = parse_peft_config({"peft_type": "LOKR", "r": 8, "alpha": 4, "rank_pattern": {"q": 2}}, "config")
    assert config.scale("v", None) == 0.5
    assert config.scale("q", None) == 2.0


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "LoKrConfig", "AdaLoraConfig"])
def test_peft_scales_alike(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the PEFT oracle is not installed")
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    alpha = {"alpha": 5} if kind in ("LoHaConfig", "LoKrConfig") else {"lora_alpha": 5}
    special = {"init_r": 3, "total_step": 10} if kind == "AdaLoraConfig" else {"r": 4, "rank_pattern": {"1": 2}}
    config = getattr(peft, kind)(target_modules=["0", "1"], **alpha, **special)
    wrapped = peft.get_peft_model(model, config)
    config.save_pretrained(tmp_path)
    parsed = parse_peft_config(json.loads((tmp_path / "adapter_config.json").read_text()), "config")
    for name in ("0", "1"):
        layer = wrapped.base_model.model.get_submodule(name)
        rank = layer.r["default"]
        expected = layer.scaling["default"]
        if kind == "AdaLoraConfig":
            expected /= layer.ranknum["default"].item() + 1e-5
        assert parsed.scale(name, rank) == pytest.approx(expected, rel=1e-12)


def test_mlx_multiplies_by_its_scale_alone(shared: Path) -> None:
    settings = json.loads((shared / "data" / "mlx_qwen2" / "adapter_config.json").read_text())
    config = parse_config(settings, "config")
    assert config is not None
    assert (config.kind, config.rank, config.scale("model.layers.0.self_attn.q_proj", 8)) == ("MLX", 8, 20.0)
    assert "4bit" in config.notes[0]


def test_mlx_dora_is_told() -> None:
    settings = {"fine_tune_type": "dora", "lora_parameters": {"rank": 8, "scale": 20.0}}
    assert parse_mlx_config(settings, "config").dora


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"fine_tune_type": "full"}, "mlx_lm.fuse"),
        ({"lora_parameters": {"rank": 8, "alpha": 16, "scale": 10.0}}, "cannot be told"),
    ],
)
def test_mlx_without_a_clear_update_is_refused(settings, match: str) -> None:
    with pytest.raises(Unsupported, match=match):
        parse_config(settings, "config")


def test_mlx_without_a_scale_is_malformed() -> None:
    with pytest.raises(InputError, match="no scale"):
        parse_config({"lora_parameters": {"rank": 8}}, "config")


def test_a_configuration_of_neither_is_nobodys() -> None:
    assert parse_config({"model_type": "llama"}, "config") is None


def test_metadata_holds_one_configuration_per_component() -> None:
    text = json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 2, "text_encoder.lora_alpha": 1})
    configs = configs_in_metadata({"lora_adapter_metadata": text}, "file")
    assert (configs["unet"].scale("x", 4), configs["text_encoder"].scale("x", 2)) == (2.0, 0.5)


def test_metadata_of_a_single_model_names_no_component() -> None:
    """diffusers' save_lora_adapter."""
    text = json.dumps({"r": 4, "lora_alpha": 8, "alpha_pattern": {"down_blocks.0": 2}})
    configs = configs_in_metadata({"lora_adapter_metadata": text}, "file")
    assert (configs[""].scale("x", 4), configs[""].scale("down_blocks.0", 4)) == (2.0, 0.5)
