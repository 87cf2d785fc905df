"""The spellings of language models: prefixes, fused projections, Conv1D."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from bake.keys.hf import Drift, aliases, find_drift, stores_in_out
from bake.keys.places import Parameters, Place, split_parameter

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


def spellings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameters]:
    modules: dict[str, Parameters] = {}
    for name in shapes:
        module, parameter = split_parameter(name)
        modules.setdefault(module, {})[parameter] = (Place(name),)
    return modules | aliases(modules, shapes)


def named(*modules: str) -> dict[str, tuple[int, ...]]:
    return {f"{module}.weight": (4, 4) for module in modules}


LAYER = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize("own", ["model.", "", "model.language_model.", "language_model.model.", "language_model."])
@pytest.mark.parametrize("other", ["model.", "", "model.language_model.", "language_model.model.", "language_model."])
def test_the_text_decoder_answers_to_every_prefix(own: str, other: str) -> None:
    known = spellings(named(own + LAYER, own + "embed_tokens", own + "norm"))
    assert known[other + LAYER]["weight"] == (Place(f"{own}{LAYER}.weight"),)
    assert known[other + "embed_tokens"]["weight"] == (Place(f"{own}embed_tokens.weight"),)


@pytest.mark.parametrize(
    ("stored", "spelled"),
    [
        ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.query"),
        ("roberta.encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.query"),
        ("gpt_neox.layers.0.attention.query_key_value", "layers.0.attention.query_key_value"),
        ("decoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.self_attn.q_proj"),
        ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        ("language_model.lm_head", "lm_head"),
        ("lm_head", "language_model.lm_head"),
    ],
)
def test_other_towers_drift_too(stored: str, spelled: str) -> None:
    prefix, of_bert, _ = stored.partition("encoder.layer.")
    known = spellings(named(stored, *([prefix + "embeddings.word_embeddings"] if of_bert else [])))
    assert known[spelled]["weight"] == (Place(f"{stored}.weight"),)


def test_the_towers_of_a_vision_language_model_keep_apart() -> None:
    known = spellings(named("model.layers.0.mlp.up_proj", "visual.layers.0.mlp.up_proj", "lm_head"))
    assert known["model.language_model.layers.0.mlp.up_proj"]["weight"][0].tensor == "model.layers.0.mlp.up_proj.weight"
    assert known["model.visual.layers.0.mlp.up_proj"]["weight"][0].tensor == "visual.layers.0.mlp.up_proj.weight"


def test_a_fused_projection_is_spelled_by_its_parts() -> None:
    at = "model.layers.0"
    known = spellings(
        {
            f"{at}.self_attn.qkv_proj.weight": (16, 8),
            f"{at}.self_attn.qkv_proj.bias": (16,),
            f"{at}.self_attn.o_proj.weight": (8, 8),
            f"{at}.mlp.gate_up_proj.weight": (12, 8),
        }
    )
    rows = {name: known[f"{at}.self_attn.{name}"]["weight"][0].rows for name in ("q_proj", "k_proj", "v_proj")}
    assert rows == {"q_proj": (0, 8), "k_proj": (8, 12), "v_proj": (12, 16)}
    assert known[f"{at}.self_attn.v_proj"]["bias"] == (Place(f"{at}.self_attn.qkv_proj.bias", (12, 16)),)
    assert known[f"{at}.mlp.up_proj"]["weight"] == (Place(f"{at}.mlp.gate_up_proj.weight", (6, 12)),)


@pytest.mark.parametrize(
    "shapes",
    [
        {"a.qkv_proj.weight": (16, 8)},  # without o_proj nothing tells how many rows q has
        {"a.qkv_proj.weight": (15, 8), "a.o_proj.weight": (8, 8)},
        {"a.qkv_proj.weight": (8, 8), "a.o_proj.weight": (8, 8)},
        {"a.gate_up_proj.weight": (13, 8)},
    ],
    ids=["unknown", "odd", "nothing left", "odd halves"],
)
def test_parts_of_unknown_size_are_not_spelled(shapes: dict[str, tuple[int, ...]]) -> None:
    assert not {"a.q_proj", "a.gate_proj"} & spellings(shapes).keys()


def test_split_projections_are_spelled_as_one() -> None:
    at = "layers.0.self_attn"
    known = spellings({f"{at}.q_proj.weight": (8, 8), f"{at}.k_proj.weight": (4, 8), f"{at}.v_proj.weight": (4, 8)})
    parts = [(place.tensor.split(".")[3], place.part) for place in known[f"model.{at}.qkv_proj"]["weight"]]
    assert parts == [("q_proj", (0, 8)), ("k_proj", (8, 12)), ("v_proj", (12, 16))]


def test_projections_of_which_only_one_has_a_bias_are_not_spelled_as_one() -> None:
    shapes = {"a.gate_proj.weight": (8, 8), "a.gate_proj.bias": (8,), "a.up_proj.weight": (8, 8)}
    assert "a.gate_up_proj" not in spellings(shapes)


def real_names(shared: Path, name: str) -> dict[str, tuple[int, ...]]:
    path = shared / "names" / name
    if not path.is_file():
        pytest.skip(f"{name} is not there")
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return {tensor: tuple(shape) for tensor, (_, shape) in json.loads(text)["tensors"].items()}


def modules_of(names: Iterable[str]) -> set[str]:
    return {split_parameter(name)[0] for name in names}


@pytest.mark.parametrize(
    ("adapter", "base"),
    [
        ("qwen25_vl_3b_old.json", "qwen25_vl_3b_new.json"),
        ("qwen25_vl_3b_new.json", "qwen25_vl_3b_old.json"),
        ("qwen3moe_small.json", "qwen3moe_small_fused.json"),
        ("qwen3moe_small_fused.json", "qwen3moe_small.json"),
    ],
)
def test_every_module_of_the_one_release_is_found_in_the_other(adapter: str, base: str, shared: Path) -> None:
    known = spellings(real_names(shared, base))
    assert not modules_of(real_names(shared, adapter)) - known.keys()


def test_every_parameter_of_a_stack_of_experts_is_covered_once(shared: Path) -> None:
    shapes = real_names(shared, "qwen3_30b_a3b.json.gz")
    known = spellings(shapes)
    places = known["model.layers.47.mlp.experts.gate_up_proj"]["weight"]
    assert [place.part for place in places] == [(768 * i, 768 * (i + 1)) for i in range(256)]
    assert len({place.tensor for place in places}) == 256
    assert len(known) < 10 * len(shapes)
