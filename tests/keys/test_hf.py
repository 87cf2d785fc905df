"""Prefix drift and Conv1D."""

from __future__ import annotations

import pytest

from bake.keys.hf import Drift, find_drift, stores_in_out
from bake.keys.places import Place

KNOWN = {"h.0.attn.c_attn", "h.0.mlp.c_fc", "h.1.attn.c_attn", "wte"}


def test_a_prefix_only_the_adapter_has_is_dropped() -> None:
    drift = find_drift({"transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"}, KNOWN)
    assert drift == Drift("transformer.", "")
    assert drift.apply("transformer.h.1.attn.c_attn") == "h.1.attn.c_attn"


def test_a_prefix_only_the_base_has_is_added() -> None:
    known = {"bert." + name for name in KNOWN}
    assert find_drift({"h.0.mlp.c_fc"}, known) == Drift("", "bert.")


def test_all_names_must_fit() -> None:
    assert find_drift({"transformer.h.0.attn.c_attn", "transformer.h.9.attn.c_attn"}, KNOWN) is None


def test_two_ways_to_fit_are_no_way() -> None:
    known = {"encoder.layers.0.q", "decoder.layers.0.q"}
    assert find_drift({"layers.0.q"}, known) is None


def test_nothing_drifts_from_nothing() -> None:
    assert find_drift(set(), KNOWN) is None


@pytest.mark.parametrize(("shape", "expected"), [((4, 12), True), ((12, 4), False)])
def test_the_fused_projection_tells_which_way_weights_are_stored(shape: tuple[int, int], expected: bool) -> None:
    modules = {"h.0.attn.c_attn": {"weight": (Place("w"),)}}
    assert stores_in_out(modules, {"w": shape}) is expected


def test_a_model_without_that_projection_stores_out_in() -> None:
    assert not stores_in_out({"q_proj": {"weight": (Place("w"),)}}, {"w": (4, 12)})
