"""Suffixes and algorithms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bake.keys.factors import (
    ALGORITHMS,
    SCALARS,
    SUFFIXES,
    algorithm_of,
    as_matrix,
    full_shape,
    lora_shape,
    split_key,
    supported,
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
    ],
)
def test_a_key_is_split_into_module_and_factor(key: str, module: str, factor: str) -> None:
    found = split_key(key)
    assert found is not None
    assert (found[0], found[1].factor) == (module, factor)


@pytest.mark.parametrize("key", ["w_a_000", "model.layers.0.weight", "lora_up.weight", "alpha", "", "x.bias"])
def test_other_keys_are_not_split(key: str) -> None:
    assert split_key(key) is None


@given(st.sampled_from(sorted(SUFFIXES)), st.text("abc_.", min_size=1).filter(lambda text: not text.endswith("lora_A")))
def test_every_suffix_is_found_behind_any_module(suffix: str, module: str) -> None:
    found = split_key(f"{module}.{suffix}")
    assert found is not None
    assert found[1] == SUFFIXES[suffix] or SUFFIXES.get(found[0][len(module) + 1 :] + "." + suffix)


def test_biases_and_embeddings_are_marked() -> None:
    assert SUFFIXES["diff_b"].parameter == "bias"
    assert SUFFIXES["lora_embedding_A"].transposed


def test_every_factor_of_an_algorithm_has_a_spelling() -> None:
    spelled = {suffix.factor for suffix in SUFFIXES.values()} | set(SCALARS)
    for row in ALGORITHMS:
        assert set(row.factors) <= spelled
        assert row.rank_of is None or row.rank_of in row.required


@pytest.mark.parametrize(
    ("factors", "name"),
    [
        ({"up", "down", "alpha"}, "lora"),
        ({"up", "down", "magnitude"}, "DoRA"),
        ({"diff"}, "full"),
        ({"kron_w1", "kron_w2_a", "kron_w2_b", "alpha"}, "LoKr"),
        ({"w1_a", "w1_b", "w2_a", "w2_b"}, "LoHa"),
    ],
)
def test_the_factors_present_name_the_algorithm(factors: set[str], name: str) -> None:
    row = algorithm_of(factors)
    assert row is not None
    assert row.name == name


@pytest.mark.parametrize("factors", [{"up"}, {"down", "alpha"}, {"kron_w1"}, {"alpha"}, set()])
def test_half_a_module_is_no_algorithm(factors: set[str]) -> None:
    assert algorithm_of(factors) is None


@pytest.mark.parametrize(
    ("up", "down", "mid", "delta"),
    [
        ((8, 2), (2, 6), None, (8, 6)),
        ((8, 2, 1, 1), (2, 6, 3, 3), None, (8, 54)),
        ((8, 2, 1, 1), (2, 6, 1, 1), (2, 2, 3, 3), (8, 54)),
        ((8, 0), (0, 6), None, (8, 6)),
    ],
)
def test_the_shape_of_a_lora_update(up, down, mid, delta) -> None:
    assert lora_shape({"up": up, "down": down, **({"mid": mid} if mid else {})}) == delta


@pytest.mark.parametrize(
    ("up", "down", "mid"),
    [
        ((8, 2), (3, 6), None),
        ((8, 2, 3, 3), (2, 6), None),
        ((8,), (2, 6), None),
        ((8, 2), (6,), None),
        ((8, 2), (2, 6), (3, 2, 3, 3)),
        ((8, 2), (2, 6), (2, 3, 3, 3)),
    ],
)
def test_factors_that_do_not_chain_are_refused(up, down, mid) -> None:
    with pytest.raises(ValueError, match=r"differ|no pair"):
        lora_shape({"up": up, "down": down, **({"mid": mid} if mid else {})})


def test_matrices_of_tensors() -> None:
    assert as_matrix(()) == (1, 1)
    assert as_matrix((5,)) == (5, 1)
    assert as_matrix((5, 2, 3, 3)) == (5, 18)
    assert full_shape({"diff": (4, 3)}) == (4, 3)


def test_supported_rows_are_found_by_name() -> None:
    assert supported("lora").shape is lora_shape
