"""Suffixes and algorithms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bake.keys.factors import (
    ALGORITHMS,
    SCALARS,
    SUFFIXES,
    UNFUSED_PEFT,
    Suffix,
    algorithm_of,
    as_matrix,
    split_key,
    split_value,
    updates_nothing,
)


@pytest.mark.parametrize(
    ("key", "module", "factor"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", "lora_unet_mid_block_attentions_0_proj_in", "up"),
        ("lora_unet_mid_block_attentions_0_proj_in.alpha", "lora_unet_mid_block_attentions_0_proj_in", "alpha"),
        ("unet.mid_block.attn1.to_q.lora.down.weight", "unet.mid_block.attn1.to_q", "down"),
        ("a.attn1.processor.to_q_lora.up.weight", "a.attn1.processor.to_q", "up"),
        ("lora_unet_attn1_to_k_lora.down.weight", "lora_unet_attn1_to_k", "down"),
        ("text_encoder.x.q_proj.lora_linear_layer.up.weight", "text_encoder.x.q_proj", "up"),
        ("base_model.model.x.lora_A.weight", "base_model.model.x", "down"),
        ("base_model.model.x.lora_A.default.weight", "base_model.model.x", "down"),
        ("base_model.model.x.lora_B.my_adapter.weight", "base_model.model.x", "up"),
        ("base_model.model.emb.lora_embedding_A", "base_model.model.emb", "down"),
        ("base_model.model.emb.lora_embedding_B.default", "base_model.model.emb", "up"),
        ("x.diff_b", "x", "diff"),
        ("x.w_norm", "x", "diff"),
        ("x.lokr_w1_a", "x", "kron_w1_a"),
        ("x.lora_A", "x", "down"),
        ("x.lora_A.default", "x", "down"),
        ("x.lora_A.default_0.weight", "x", "down"),
        ("x.lora_A.a1.weight", "x", "down"),
        ("x.oft_R.scaled_oft", "x", "scaled_oft"),
        ("x.lora_B.bias", "x", "up_bias"),
        ("x.lora_B.default.bias", "x", "up_bias"),
        ("x.lora_magnitude_vector", "x", "magnitude"),
        ("lora_unet_mid_attn1.to_q.lora_magnitude_vector", "lora_unet_mid_attn1_to_q", "magnitude"),
        ("lora_te1_layers_0_attn.q_proj.lora_magnitude_vector", "lora_te1_layers_0_attn_q_proj", "magnitude"),
        ("lora_unet.conv_in.lora_magnitude_vector", "lora_unet_conv_in", "magnitude"),
        ("x.lora_magnitude_vector.weight", "x", "magnitude"),
        ("x.lora_magnitude_vector.default.weight", "x", "magnitude"),
        ("x.magnitude", "x", "magnitude"),
        ("x.lora_up.default.weight", "x", "up"),
        ("x.hada_w1_a.default", "x", "w1_a"),
        ("x.lokr_w2.default", "x", "kron_w2"),
        ("x.ia3_l.default", "x", "ia3_l"),
        ("x.oft_R.default.weight", "x", "oft_r"),
        ("x.boft_R.default", "x", "boft_r"),
        ("x.hra_u.default", "x", "hra_u"),
        ("x.vera_lambda_b.default", "x", "vera_lambda_b"),
        ("base_model.vera_A.default", "base_model", "vera_a"),
        ("base_model.vera_B", "base_model", "vera_b"),
        ("x.ln_tuning_layers.default.weight", "x", "value"),
        ("x.ln_tuning_layers.bias", "x", "value"),
        ("x.modules_to_save.default.weight", "x", "value"),
        ("x.base_layer.bias", "x", "value"),
        ("x.set_weight", "x", "value"),
        ("x.token_adapter.trainable_tokens_delta.default", "x", "token_rows"),
        ("x.trainable_tokens_delta", "x", "token_rows"),
        ("x.fourierft_spectrum.default", "x", "fourierft_spectrum"),
        ("lora_unet_x.weight", "lora_unet_x", "ia3_weight"),
        ("lycoris_x.weight", "lycoris_x", "ia3_weight"),
        ("lora_unet_x_lora_up.weight", "lora_unet_x", "up"),
        ("lora_unet_x_lora_down.alpha", "lora_unet_x", "alpha"),
        ("single_blocks.0.processor.proj_lora.up.weight", "single_blocks.0.processor.proj", "up"),
        ("double_blocks.0.processor.proj_lora1.up.weight", "double_blocks.0.processor.proj_lora1", "up"),
    ],
)
def test_a_key_is_split_into_module_and_factor(key: str, module: str, factor: str) -> None:
    found = split_key(key)
    assert found is not None
    assert (found[0], found[1].factor) == (module, factor)


@pytest.mark.parametrize(
    "key",
    [
        *("w_a_000", "model.layers.0.weight", "lora_up.weight", "alpha", "", "x.bias", "x.lora_A.weight.more"),
        # tensors of checkpoints
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "model.diffusion_model.input_blocks.0.0.weight",
        "base_model.model.score.weight",
        "transformer.h.0.ln_1.bias",
        "up.weight",
        "double_blocks.0.up.weight",
        "text_model.logit_scale",
    ],
)
def test_other_keys_are_not_split(key: str) -> None:
    assert split_key(key) is None


@pytest.mark.parametrize("key", ["x.lora_up.2.weight", "x.lora_down.2.weight", "x.oft_blocks.2"])
def test_factors_of_one_projection_say_which(key: str) -> None:
    found = split_key(key)
    assert found is not None
    assert found[1].part == 2
    assert found[1]._replace(part=None) in SUFFIXES.values()


@pytest.mark.parametrize(
    ("key", "module", "parameter"),
    [
        ("base_model.model.lm_head.weight", "base_model.model.lm_head", "weight"),
        ("base_model.model.score.bias", "base_model.model.score", "bias"),
        ("single_blocks.0.norm.key_norm.scale", "single_blocks.0.norm.key_norm", "weight"),
        (
            "transformer.transformer_blocks.0.attn.norm_q.weight",
            "transformer.transformer_blocks.0.attn.norm_q",
            "weight",
        ),
    ],
)
def test_whole_tensors_beside_factors_are_new_values(key: str, module: str, parameter: str) -> None:
    assert split_key(key) is None
    assert split_value(key) == (module, Suffix("value", parameter))


@pytest.mark.parametrize("key", ["x.lora_up.weight", "w_a_000", "x.original_module.weight", "x.position_ids"])
def test_factors_and_leftovers_are_no_values(key: str) -> None:
    assert split_value(key) is None


@pytest.mark.parametrize(
    "key",
    [
        "text_model.embeddings.position_ids",
        "lora_te_text_model_embeddings_position_ids",
        "_aux.slider",
        "lora_unet_x._aux.scale",
        "base_model.model.score.original_module.weight",
        "base_model.model.score.original_module.dense.bias",
    ],
)
def test_leftovers_update_nothing(key: str) -> None:
    assert updates_nothing(key)


@pytest.mark.parametrize("key", ["x.lora_up.weight", "x.weight", "model.embed_positions.weight"])
def test_what_could_update_something_is_no_leftover(key: str) -> None:
    assert not updates_nothing(key)


@given(
    st.sampled_from(
        [suffix for suffix in SUFFIXES if suffix.startswith(("lora_A", "lora_B", "hada_", "lokr_", "ia3_"))]
    ),
    st.from_regex(r"\A[a-z]{1,6}(\.[a-z0-9]{1,6}){0,3}\Z"),
    st.from_regex(r"\A[a-z][a-z0-9_-]{0,10}\Z").filter(lambda name: name not in ("weight", "bias")),
)
def test_the_name_of_the_adapter_is_dropped(suffix: str, module: str, name: str) -> None:
    parameter, dot, leaf = suffix.partition(".")
    assert split_key(f"{module}.{parameter}.{name}{dot}{leaf}") == (module, SUFFIXES[suffix])


@pytest.mark.parametrize(("name", "parameters"), UNFUSED_PEFT.items())
def test_peft_types_without_maths_are_known_by_name(name: str, parameters: tuple[str, ...]) -> None:
    for parameter in parameters:
        found = split_key(f"base_model.model.x.{parameter}.default")
        assert found is not None
        row = algorithm_of({found[1].factor: (2, 2)})
        assert row is not None
        assert (row.name, row.extent) == (name, None)


@given(st.sampled_from(sorted(SUFFIXES)), st.text("abc_.", min_size=1).filter(lambda text: not text.endswith("lora_A")))
def test_every_suffix_is_found_behind_any_module(suffix: str, module: str) -> None:
    found = split_key(f"{module}.{suffix}")
    assert found is not None
    assert found[1] == SUFFIXES[suffix] or SUFFIXES.get(found[0][len(module) + 1 :] + "." + suffix)


def test_biases_and_embeddings_are_marked() -> None:
    assert SUFFIXES["diff_b"].parameter == "bias"
    assert SUFFIXES["lora_embedding_A"].transposed


def test_every_factor_of_an_algorithm_has_a_spelling() -> None:
    spelled = {suffix.factor for suffix in SUFFIXES.values()} | set(SCALARS) | {"ia3_weight"}  # see split_key
    for row in ALGORITHMS:
        assert set(row.factors) <= spelled


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        ({"up": (6, 2), "down": (2, 5), "alpha": ()}, "lora"),
        ({"up": (6, 2), "down": (2, 5), "lora_e": (2, 1)}, "adalora"),
        ({"diff": (6, 5)}, "full"),
        ({"kron_w1": (2, 3), "kron_w2_a": (3, 2), "kron_w2_b": (2, 2), "alpha": ()}, "lokr"),
        ({"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (6, 2), "w2_b": (2, 5)}, "loha"),
        ({"oft_blocks": (3, 2, 2)}, "oft"),
        ({"oft_blocks": (1, 3, 2, 2)}, "boft"),
    ],
)
def test_the_factors_present_name_the_algorithm(shapes, name: str) -> None:
    row = algorithm_of(shapes)
    assert row is not None
    assert row.name == name


@pytest.mark.parametrize("factors", [{"up"}, {"down", "alpha"}, {"kron_w1"}, {"alpha"}, set()])
def test_half_a_module_is_no_algorithm(factors: set[str]) -> None:
    assert algorithm_of(dict.fromkeys(factors, (2, 2))) is None


@pytest.mark.parametrize(
    ("name", "shapes", "rank", "block"),
    [
        ("lora", {"up": (6, 2), "down": (2, 5)}, 2, 1),
        ("loha", {"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (6, 3), "w2_b": (3, 5)}, 2, 1),
        ("lokr", {"kron_w1": (2, 3), "kron_w2_a": (3, 4), "kron_w2_b": (4, 2)}, 4, 1),
        ("lokr", {"kron_w1_a": (2, 5), "kron_w1_b": (5, 3), "kron_w2": (3, 2)}, 5, 1),
        ("lokr", {"kron_w1": (2, 3), "kron_w2": (3, 2)}, None, 1),
        ("oft", {"oft_blocks": (3, 4, 4)}, None, 4),
        ("boft", {"oft_blocks": (2, 4, 2, 2)}, None, 4),
    ],
)
def test_ranks_and_rows_that_hang_together(name, shapes, rank, block) -> None:
    row = algorithm_of(shapes)
    assert row is not None
    assert (row.name, row.rank(shapes), row.block(shapes)) == (name, rank, block)


def test_matrices_of_tensors() -> None:
    assert as_matrix(()) == (1, 1)
    assert as_matrix((5,)) == (5, 1)
    assert as_matrix((5, 2, 3, 3)) == (5, 18)
