"""Experts, one by one and stacked, against PEFT's merge of target_parameters adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bake.errors import ShapeMismatch, Unsupported
from bake.keys import experts, hf
from bake.keys.experts import ExpertUpdate, Level, expert_updates, split_nesting
from bake.keys.places import Parameters, Place, split_parameter

EXPERTS, WIDE, HIDDEN, RANK = 4, 6, 8, 2
TARGETS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
MODULE = "model.layers.0.mlp.experts"


def spellings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameters]:
    modules: dict[str, Parameters] = {}
    for name in shapes:
        module, parameter = split_parameter(name)
        modules.setdefault(module, {})[parameter] = (Place(name),)
    return modules | hf.aliases(modules, shapes)


def stacked(height_first: bool = True, wide: int = WIDE, hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    gate_up, down = (EXPERTS, 2 * wide, hidden), (EXPERTS, hidden, wide)
    flip = slice(None) if height_first else [0, 2, 1]
    return {
        f"{MODULE}.gate_up_proj": tuple(np.array(gate_up)[flip].tolist()),
        f"{MODULE}.down_proj": tuple(np.array(down)[flip].tolist()),
        "model.layers.0.mlp.gate.weight": (EXPERTS, hidden),
    }


def published(block: str = "block_sparse_moe", leaves: tuple[str, ...] = ("w1", "w3", "w2")) -> dict:
    sizes = ((WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE))
    each = {
        f"model.layers.0.{block}.experts.{expert}.{leaf}.weight": size
        for expert in range(EXPERTS)
        for leaf, size in zip(leaves, sizes, strict=True)
    }
    return each | {f"model.layers.0.{block}.gate.weight": (EXPERTS, HIDDEN)}


def level(name: str, out: int, inner: int) -> Level:
    return Level(name, (EXPERTS * RANK, inner), (out, RANK * EXPERTS))


def deltas(
    update: ExpertUpdate, down: np.ndarray, up: np.ndarray, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, int], np.ndarray]]:
    """(tensor, rows of it seen as a matrix, what is added there) as the slices say."""
    for one in update.slices:
        first, step = one.up_columns
        product = up[:, first::step] @ down[slice(*one.down_rows)]
        for place in one.places:
            oriented = product.T if place.transposed else product
            part = oriented[slice(*place.part)] if place.part is not None else oriented
            height = int(np.prod(shapes[place.tensor][:-1]))
            yield place.tensor, place.rows or (0, height), part


def fused(tensors: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], scales: Mapping[str, float], **known):
    """`tensors` with the expert updates of a PEFT adapter added in float64; scales: by leaf of the parameter."""
    out = {name: array.astype(np.float64) for name, array in tensors.items()}
    shapes = {name: array.shape for name, array in tensors.items()}
    index = spellings(shapes)
    modules: dict[str, list[str]] = {}
    for key in adapter:
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            modules.setdefault(split_nesting(path)[0], []).append(path)
    for module, paths in modules.items():
        pairs = {
            path: [adapter[f"base_model.model.{path}.lora_{x}.weight"].astype(np.float64) for x in "AB"]
            for path in paths
        }
        if not module.endswith("experts"):
            (place,) = index[module]["weight"]
            down, up = pairs[module]
            out[place.tensor] += scales["other"] * up @ down
            continue
        levels = [Level(path, down.shape, up.shape) for path, (down, up) in pairs.items()]
        for update in expert_updates(module, levels, TARGETS, index, shapes, **known):
            scale = scales[update.parameter.rpartition(".")[2]]
            for tensor, rows, delta in deltas(update, *pairs[update.name], shapes):
                out[tensor].reshape(-1, shapes[tensor][-1])[slice(*rows)] += scale * delta
    return out


@pytest.mark.parametrize(
    "base",
    [published(), published("mlp", ("gate_proj", "up_proj", "down_proj")), stacked()],
    ids=["w", "proj", "stack"],
)
def test_every_layout_answers_to_the_names_of_the_others(base: dict) -> None:
    known = spellings(base)
    assert f"{MODULE}.gate_up_proj" in known
    assert f"{MODULE}.down_proj" in known
    for router in ("block_sparse_moe.gate", "mlp.gate", "mlp.router"):
        assert known[f"model.layers.0.{router}"]["weight"][0].tensor.endswith("gate.weight")


def test_the_stack_of_published_experts_has_gate_above_up() -> None:
    places = spellings(published())[f"{MODULE}.gate_up_proj"]["weight"]
    assert [place.tensor.split(".")[5:7] for place in places[:4]] == [
        ["0", "w1"],
        ["0", "w3"],
        ["1", "w1"],
        ["1", "w3"],
    ]
    assert [place.part for place in places[:3]] == [(0, 6), (6, 12), (12, 18)]


@pytest.mark.parametrize("names", [("mlp", "gate_proj", "up_proj"), ("block_sparse_moe", "w1", "w3")])
def test_an_expert_of_a_stack_is_rows_of_it(names: tuple[str, str, str]) -> None:
    known, (block, gate, up) = spellings(stacked()), names
    at = f"model.layers.0.{block}.experts.1"
    assert known[f"{at}.{gate}"]["weight"] == (Place(f"{MODULE}.gate_up_proj", (12, 18), stacked=True),)
    assert known[f"{at}.{up}"]["weight"] == (Place(f"{MODULE}.gate_up_proj", (18, 24), stacked=True),)


def test_experts_stored_in_out_have_no_rows_of_their_own() -> None:
    assert not any(".experts.0." in path for path in spellings(stacked(height_first=False)))


def test_a_missing_expert_makes_no_stack() -> None:
    base = published()
    del base["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    assert f"{MODULE}.gate_up_proj" not in spellings(base)


def test_granite_calls_its_stacks_linear_layers() -> None:
    known = spellings({"model.layers.0.block_sparse_moe.input_linear.weight": (4, 12, 8)})
    assert "model.layers.0.block_sparse_moe.experts.gate_up_proj" in known


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[::-1], ("gate_up_proj", "down_proj")])
def test_shapes_tell_the_nested_levels_apart(order: int, targets: tuple[str, ...]) -> None:
    shapes = stacked()
    levels = [level(f"{MODULE}.base_layer", 2 * WIDE, HIDDEN), level(MODULE, HIDDEN, WIDE)][::order]
    updates = expert_updates(MODULE, levels, targets, spellings(shapes), shapes)
    expected = [f"{MODULE}.gate_up_proj", f"{MODULE}.down_proj"][::order]
    assert [update.parameter for update in updates] == expected
    assert [update.rank for update in updates] == [RANK, RANK]


def test_a_target_that_the_configuration_does_not_name_is_no_candidate() -> None:
    shapes = stacked()
    with pytest.raises(ShapeMismatch, match="do not fit the base"):
        expert_updates(MODULE, [level(MODULE, HIDDEN, WIDE)], TARGETS[:1], spellings(shapes), shapes)


def test_another_number_of_experts_does_not_fit() -> None:
    shapes = stacked()
    odd = Level(MODULE, (3 * RANK, WIDE), (HIDDEN, 3 * RANK))
    with pytest.raises(ShapeMismatch):
        expert_updates(MODULE, [odd], TARGETS, spellings(shapes), shapes)


def test_factors_trained_with_the_axes_swapped_are_transposed() -> None:
    shapes = stacked()
    (update,) = expert_updates(MODULE, [level(MODULE, WIDE, HIDDEN)], TARGETS, spellings(shapes), shapes)
    assert update.parameter == f"{MODULE}.down_proj"
    assert all(place.transposed for one in update.slices for place in one.places)


@pytest.mark.parametrize(
    ("version", "transposed"), [("0.18.1", True), ("0.19.1", False), ("0.21.2", False), ("0.20.0.dev0@abc", False)]
)
def test_square_experts_go_by_the_release_of_peft(version: str, transposed: bool) -> None:
    shapes = stacked(wide=HIDDEN)
    square = [level(MODULE, HIDDEN, HIDDEN)]
    (update,) = expert_updates(MODULE, square, TARGETS, spellings(shapes), shapes, peft_version=version)
    assert {place.transposed for one in update.slices for place in one.places} == {transposed}


@pytest.mark.parametrize("version", [None, "0.19.0", "strange"])
def test_square_experts_of_an_unknown_release_are_refused(version: str | None) -> None:
    shapes = stacked(wide=HIDDEN)
    square = [level(MODULE, HIDDEN, HIDDEN)]
    with pytest.raises(Unsupported, match="square"):
        expert_updates(MODULE, square, TARGETS, spellings(shapes), shapes, peft_version=version)


def test_square_experts_stored_in_out_are_known_by_model() -> None:
    shapes = stacked(height_first=False, wide=HIDDEN)
    square, index = [level(MODULE, HIDDEN, HIDDEN)], spellings(shapes)
    (update,) = expert_updates(MODULE, square, TARGETS, index, shapes, peft_version="0.21.2", model_type="gpt_oss")
    assert update.slices[0].places == (Place(f"{MODULE}.down_proj", (0, HIDDEN), True, None, stacked=True),)
    with pytest.raises(Unsupported):
        expert_updates(MODULE, square, TARGETS, index, shapes, peft_version="0.21.2", model_type="llama4")


@pytest.mark.parametrize(
    ("module", "expected"), [("a.experts", ("a.experts", 0)), ("a.experts.base_layer.base_layer", ("a.experts", 2))]
)
def test_nesting_is_counted(module: str, expected: tuple[str, int]) -> None:
    assert split_nesting(module) == expected


def test_an_empty_model_has_no_experts() -> None:
    assert experts.aliases({}, {}) == {}


def _models() -> dict[str, Callable[[], Any]]:
    transformers = pytest.importorskip("transformers", reason="the transformers oracle is not installed")
    common = {
        "vocab_size": 16,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    }
    return {
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**common, num_local_experts=EXPERTS)
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(**common, num_experts=EXPERTS, moe_intermediate_size=WIDE, head_dim=4)
        ),
        "gpt_oss": lambda: transformers.GptOssForCausalLM(  # square matrices, as in the real one
            transformers.GptOssConfig(
                **{**common, "intermediate_size": HIDDEN}, num_local_experts=EXPERTS, head_dim=4, pad_token_id=0
            )
        ),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_peft_merges_the_same_into_stacks_and_into_published_files(kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft", minversion="0.19.1", reason="the PEFT oracle is not installed")
    safetensors = pytest.importorskip("safetensors.numpy")
    torch.manual_seed(0)
    model = _models()[kind]().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base")
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(
        r=RANK, lora_alpha=3, target_modules=["q_proj"], target_parameters=list(TARGETS), alpha_pattern={"down_proj": 7}
    )
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    adapter = {key: tensor.numpy().copy() for key, tensor in peft.get_peft_model_state_dict(wrapped).items()}
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    scales = {"gate_up_proj": 1.5, "down_proj": 3.5, "other": 1.5}
    for base, expected in (
        (before, {name: tensor.numpy() for name, tensor in merged.state_dict().items()}),
        tuple(safetensors.load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged")),
    ):
        result = fused(base, adapter, scales, peft_version=peft.__version__, model_type=kind)
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(result[name], tensor, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_experts_of_a_stack_are_those_of_the_published_file(kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.numpy")
    model = _models()[kind]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    whole = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    index = spellings({name: array.shape for name, array in whole.items()})
    each = safetensors.load_file(tmp_path / "model.safetensors")
    assert each.keys() - whole.keys()
    for name, array in each.items():
        (place,) = index[split_parameter(name)[0]]["weight"]
        matrix = whole[place.tensor]
        rows = matrix.reshape(-1, matrix.shape[-1])[slice(*place.rows)] if place.rows is not None else matrix
        np.testing.assert_array_equal(rows, array, err_msg=name)


def test_the_case_written_by_peft_agrees(shared: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    case = shared / "cases" / "peft-moe-target-params"
    if not case.is_dir():
        pytest.skip("this case is not there")
    base = safetensors.load_file(shared / "cases" / "_base" / "llm-moe" / "model.safetensors")
    config = json.loads((case / "adapter_config.json").read_text())
    for weight in (1.0, 0.7):
        scale = weight * config["lora_alpha"] / config["r"]
        scales = dict.fromkeys(("gate_up_proj", "down_proj", "other"), scale)
        adapter = safetensors.load_file(case / "adapter_model.safetensors")
        result = fused(base, adapter, scales, peft_version=config["peft_version"])
        expected = safetensors.load_file(case / f"expected_{weight}.safetensors")
        for name, array in result.items():
            assert np.abs(array - expected.get(name, base[name])).max() <= 1e-6, name
