"""mergekit's YAML: the same merge as the one written in bake's own words, and where a mistake is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import llama, random_arrays
from support import bake, load, save

from bake.errors import BakeError
from bake.plan.recipe import Layers, MergeChoice, Recipe
from bake.plan.selection import Gradient, Selection
from bake.recipes.read import Bake, read_recipe

LAYERS = 4
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models `base`, `one`, `two`."""
    folder = tmp_path_factory.mktemp("models")
    norms = {f"model.layers.{layer}.post_attention_layernorm.weight": (8,) for layer in range(LAYERS)}
    for number, name in enumerate(("base", "one", "two")):
        generator = np.random.default_rng(number)
        arrays = {
            name: (array + number * 0.02 * generator.standard_normal(array.shape)).astype(np.float32)
            for name, array in random_arrays(llama(layers=LAYERS) | norms, np.float32).items()
        }
        save(folder / name / "model.safetensors", arrays, {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
    return folder


def read(models: Path, text: str) -> Bake:
    path = models / "mergekit.yaml"
    path.write_text(text)
    (found,) = read_recipe(path).bakes
    return found


def notes(found: Bake) -> list[str]:
    return [note.partition("mergekit.yaml:")[2] for note in found.notes]


def choice(models: Path, method: str, names: str, base: str | None = None, **parameters: Any) -> MergeChoice:
    return MergeChoice(
        method, tuple(models / name for name in names.split()), None if base is None else models / base, parameters
    )


LINEAR = """
models:
  - model: one
    parameters:
      weight: 0.3
  - model: two
    parameters:
      weight: 0.7
merge_method: linear
dtype: float16
"""

SLERP = """
slices:
  - sources:
      - model: one
        layer_range: [0, 4]
      - model: two
        layer_range: [0, 4]
merge_method: slerp
base_model: one
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""

TIES = """
models:
  - model: base
    # no parameters necessary for base model
  - model: one
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: two
    parameters:
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
  density: 0.33
dtype: float16
out_dtype: float32
"""


def test_linear(models: Path) -> None:
    found = read(models, LINEAR)
    assert found.recipe == Recipe(choice(models, "linear", "one two", weight=[0.3, 0.7]), dtype="fp16")
    assert (found.name, found.output, found.notes) == ("mergekit", None, ())


def test_slerp_over_one_slice_of_all_layers(models: Path) -> None:
    along = Selection(
        number=0.5,
        gradients=(Gradient((0, 0.5, 0.3, 0.7, 1), "self_attn"), Gradient((1, 0.5, 0.7, 0.3, 0), "mlp")),
    )
    assert read(models, SLERP).recipe == Recipe(choice(models, "slerp", "one two", alpha=along), dtype="bf16")


def test_ties_with_its_base_among_the_models(models: Path) -> None:
    found = read(models, TIES)
    weight = [1.0, Selection(number=0, gradients=(Gradient((0.5,), "mlp"),))]
    density = [Selection(number=1, gradients=(Gradient((1, 0.7, 0.1)),)), 0.33]
    parameters = {"weight": weight, "density": density, "normalize": True, "rescale": "none"}
    assert found.recipe == Recipe(choice(models, "ties", "one two", "base", **parameters), dtype="fp32")
    assert notes(found) == ["19:3: int8_mask changes nothing"]


def task(method: str, *more: str, weight: str = "1", base: str = "base") -> str:
    """A configuration with one line for each parameter of all models."""
    lines = "".join(f"  {line}\n" for line in (f"weight: {weight}", *more))
    return f"merge_method: {method}\nbase_model: {base}\nmodels:\n- model: one\n- model: two\nparameters:\n{lines}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (task("task_arithmetic", "lambda: 0.5"), ("task_arithmetic", {"weight": [1, 1], "lambda": 0.5})),
        (task("ties"), ("ties", {"weight": [1, 1], "density": [1, 1], "rescale": "none"})),
        (task("ties", "rescale: true"), ("ties", {"weight": [1, 1], "density": [1, 1], "rescale": "l1"})),
        (task("dare_ties", "density: 0.5"), ("dare_ties", {"weight": [1, 1], "density": [0.5] * 2, "rescale": "l1"})),
        (
            task("dare_linear", "density: 0.5", "rescale: false"),
            ("dare_linear", {"weight": [1, 1], "density": [0.5] * 2, "rescale": "none"}),
        ),
        (
            task("breadcrumbs_ties", "density: 0.9", "gamma: 0.02"),
            ("breadcrumbs_ties", {"weight": [1, 1], "density": [0.9] * 2, "gamma": [0.02] * 2, "rescale": "none"}),
        ),
        (
            task("della", "density: 0.9", "epsilon: 0.05", "normalize: false"),
            (
                "della",
                {
                    "weight": [1, 1],
                    "density": [0.9] * 2,
                    "epsilon": [0.05] * 2,
                    "normalize": False,
                    "rescale": "l1",
                },
            ),
        ),
        (task("nuslerp", weight="'0.5'"), ("nuslerp", {"weight": [0.5, 0.5], "along": "tensor"})),
        (task("nuslerp", "nuslerp_flatten: false"), ("nuslerp", {"weight": [1, 1], "along": "row"})),
        (
            task("nuslerp", "nuslerp_flatten: false", "nuslerp_row_wise: true"),
            ("nuslerp", {"weight": [1, 1], "along": "column"}),
        ),
        (task("multislerp", "normalize_weights: false"), ("multislerp", {"weight": [1, 1], "normalize": False})),
    ],
)
def test_parameters_and_defaults_are_mergekits(models: Path, text: str, expected: tuple[str, dict[str, Any]]) -> None:
    method, parameters = expected
    assert read(models, text).recipe.base == choice(models, method, "one two", "base", **parameters)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model_stock\nparameters: {filter_wise: true}", ("model_stock", "one two", "base", {"filter_wise": True})),
        ("sce\nparameters: {select_topk: 0.1}", ("sce", "one two", "base", {"select_topk": 0.1})),
        ("ram\nparameters: {epsilon: 1e-4}", ("ram", "one two", "base", {"epsilon": 1e-4})),
        ("ramplus_tl\nparameters: {r: 0.2}", ("ram_plus", "one two", "base", {"r": 0.2})),
        ("karcher\nparameters: {max_iter: 5}", ("karcher", "one two base", None, {"max_iter": 5})),
    ],
)
def test_methods_without_weights(models: Path, text: str, expected: tuple[str, str, str | None, Any]) -> None:
    method, names, base, parameters = expected
    found = read(models, f"base_model: base\nmodels: [{{model: one}}, {{model: two}}]\nmerge_method: {text}\n")
    assert found.recipe.base == choice(models, method, names, base, **parameters)


def test_methods_of_two_models(models: Path) -> None:
    text = "base_model: base\nmodels: [{model: one}, {model: base}]\nmerge_method: "
    assert read(models, text + "arcee_fusion\n").recipe.base == choice(models, "arcee_fusion", "one", "base")
    near = read(models, text + "nearswap\nparameters: {t: 0.001}\n").recipe.base
    assert near == choice(models, "nearswap", "base one", t=0.001)
    through = "models: [{model: one, parameters: {scale: 0.5}}]\nmerge_method: passthrough\n"
    assert read(models, through).recipe.base == choice(models, "passthrough", "one", scale=0.5)


def test_what_is_narrower_counts_first(models: Path) -> None:
    text = (
        "merge_method: linear\nslices:\n- sources:\n"
        "  - {model: one, layer_range: [0, 4], parameters: {weight: [{filter: mlp, value: 0.1}]}}\n"
        "  - {model: two, layer_range: [0, 4]}\n"
        "  parameters: {weight: [{filter: attn, value: [0, 1]}]}\nparameters: {weight: 0.9, normalize: false}\n"
    )
    mlp, attn = Gradient((0.1,), "mlp"), Gradient((0, 1), "attn")
    weight = [Selection(0.9, gradients=(mlp, attn)), Selection(0.9, gradients=(attn,))]
    assert read(models, text).recipe.base == choice(models, "linear", "one two", weight=weight, normalize=False)


STACK = """
merge_method: passthrough
slices:
- sources: [{model: one, layer_range: [0, 3]}]
- sources: [{model: two, layer_range: [1, 4]}]
- sources: [{model: one, layer_range: [3, 4]}]
dtype: float32
"""


def test_slices_of_one_model_each_are_put_one_above_the_other(models: Path) -> None:
    found = read(models, STACK).recipe.base
    assert isinstance(found, MergeChoice)
    assert found.models == (models / "one", models / "two")
    assert found.layers == (Layers(0, 0, 3), Layers(1, 1, 4), Layers(0, 3, 4))


def test_what_changes_nothing_is_said(models: Path) -> None:
    text = (
        "merge_method: task_arithmetic\nbase_model: base\nname: mine\nmodels:\n"
        "- {model: base, parameters: {weight: 1}}\n"
        "- {model: one, parameters: {weight: 1, normalize: true, t: 3}}\n"
        "parameters: {density: 0.5}\ntokenizer_source: base\n"
    )
    assert notes(read(models, text)) == [
        "3:1: mergekit has no 'name': it changes nothing there, nor here",
        "5:11: parameters of the base change nothing",
        "6:40: normalize is the same for all models; here it changes nothing",
        "6:57: task_arithmetic of mergekit has no 't': it changes nothing there, nor here",
        "7:14: density changes nothing",
    ]


TWO = "models: [{model: one}, {model: two}]\n"

MISTAKES = [
    (f"merge_method: slrp\n{TWO}", 2, "1:15", "is it slerp?"),
    (f"merge_method: evolve\n{TWO}", 2, "1:15", "'evolve' is not one of linear, slerp"),
    (f"merge_method: linear\n{TWO}paramters: {{weight: 1}}\n", 2, "3:1", "is it parameters?"),
    (f"merge_method: linear\n{TWO}parameters: {{wieght: 1}}\n", 2, "3:14", "is it weight?"),
    (f"merge_method: linear\n{TWO}", 2, "2:18", "linear needs weight"),
    (f"merge_method: linear\n{TWO}parameters: {{weight: much}}\n", 2, "3:22", "a number was expected"),
    (f"merge_method: linear\n{TWO}parameters: {{weight: [1, much]}}\n", 2, "3:26", "a number was expected"),
    (f"merge_method: linear\n{TWO}parameters: {{weight: [{{filter: mlp}}]}}\n", 2, "3:23", "there is no value:"),
    (
        f"merge_method: linear\n{TWO}parameters: {{weight: [{{value: 1, fliter: a}}]}}\n",
        2,
        "3:34",
        "there is no 'fliter'",
    ),
    (f"merge_method: linear\n{TWO}parameters: {{weight: [{{value: 1, filter: a}}]}}\n", 2, "2:18", "for all tensors"),
    (
        f"merge_method: linear\n{TWO}parameters: {{weight: [{{value: 1}}, 2]}}\n",
        2,
        "3:35",
        "a mapping with value: and filter:",
    ),
    (f"merge_method: linear\n{TWO}parameters: [1]\n", 2, "3:13", "parameters, a mapping, was expected"),
    (f"merge_method: linear\n{TWO}parameters: {{weight: 1, normalize: [true, false]}}\n", 6, "3:36", "all tensors"),
    (f"merge_method: linear\n{TWO}parameters: {{weight: 1, normalize: maybe}}\n", 2, "3:36", "true or false"),
    ("merge_method: linear\n", 2, "1:1", "either models: or slices:"),
    ("merge_method: linear\nmodels: []\n", 2, "2:9", "a list of models was expected"),
    ("merge_method: linear\nmodels: [one]\n", 2, "2:10", "a mapping with model: was expected"),
    ("merge_method: linear\nmodels: [{modle: one}]\n", 2, "2:10", "a mapping with model: was expected"),
    ("merge_method: linear\nmodels: [{model: someone/else}]\n", 3, "2:18", "bake downloads nothing"),
    ("merge_method: linear\nmodels: [{model: one+lora}]\n", 6, "2:18", "fuse the LoRA first"),
    ("merge_method: linear\nmodels: [{model: {path: one}}]\n", 6, "2:18", "name that alone"),
    (f"merge_method: ties\n{TWO}parameters: {{weight: 1}}\n", 2, "1:1", "ties needs base_model"),
    ("merge_method: sce\nbase_model: one\nmodels: [{model: one}]\n", 2, "1:1", "a model beside its base"),
    (f"merge_method: karcher\n{TWO}dtype: float64\n", 6, "3:8", "bake does not write 'float64'"),
    (f"merge_method: karcher\n{TWO}tokenizer_source: union\n", 6, "3:19", "a tokenizer of 'union'"),
    (f"merge_method: karcher\n{TWO}tokenizer: {{source: two}}\n", 6, "3:21", "a tokenizer of 'two'"),
    (f"merge_method: karcher\n{TWO}tokenizer: {{source: base, tokens: {{x: {{}}}}}}\n", 6, "3:27", "tokens"),
    (f"merge_method: karcher\n{TWO}chat_template: auto\n", 6, "3:1", "chat_template"),
    (f"merge_method: karcher\n{TWO}modules: {{x: {{}}}}\n", 6, "3:1", "modules"),
    (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources: [{model: one, layer_range: [0, 3]}]\n"
        "- sources: [{model: two, layer_range: [1, 4]}]\n",
        *(6, "5:3", "slices are for passthrough"),
    ),
    (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources: [{model: one, layer_range: [0, 3]}]\n",
        *(6, "4:39", "layers 0 to 3 of 4"),
    ),
    (
        "merge_method: passthrough\nslices:\n- sources: [{model: one, layer_range: [0, 3], parameters: {scale: 2}}]\n",
        *(6, "3:47", "scales of single slices"),
    ),
    (
        "merge_method: passthrough\nslices:\n- sources: [{model: one, layer_range: [0, 3]}, "
        "{model: two, layer_range: [0, 3]}]\n",
        *(6, "3:48", "one model in each slice"),
    ),
    (
        "merge_method: passthrough\nslices:\n- sources: [{model: one, layer_range: [0]}]\n",
        *(2, "3:39", "[FIRST, END] was expected"),
    ),
    ("merge_method: passthrough\nslices:\n- sources: [{model: one}]\n", 2, "3:13", "needs layer_range"),
    ("merge_method: passthrough\nslices:\n- layers: []\n", 2, "3:3", "a slice needs sources"),
    (
        "merge_method: passthrough\nslices:\n- sources: [{model: one, layer_range: [0, 4]}]\n  residual_weight: 0.5\n",
        *(6, "4:3", "residual_weight"),
    ),
]


@pytest.mark.parametrize(("text", "code", "place", "says"), MISTAKES)
def test_a_mistake_is_one_message_with_its_place(models: Path, text: str, code: int, place: str, says: str) -> None:
    with pytest.raises(BakeError) as refused:
        read(models, text)
    assert refused.value.message.startswith(f"{models}/mergekit.yaml:{place}: "), refused.value.message
    assert says in refused.value.message
    assert refused.value.exit_code == code


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LINEAR, "linear one two -p weight=0.3,0.7 --dtype fp16"),
        (SLERP, "slerp one two -p alpha=0.5:gradient=self_attn=0,0.5,0.3,0.7,1;mlp=1,0.5,0.7,0.3,0 --dtype bf16"),
        (
            TIES,
            "ties --base base one two -p weight@1=1 -p weight@2=0:gradient=mlp=0.5 -p density@1=1:gradient=1,0.7,0.1 "
            "-p density@2=0.33 -p rescale=none -p normalize=true --dtype fp32",
        ),
    ],
    ids=["linear", "slerp", "ties"],
)
def test_the_plan_is_that_of_bake_merge(models: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    monkeypatch.chdir(models)
    read(models, text)
    ours = bake("merge", *words.split(), "--dry-run", "--json", "-v").json
    (theirs,) = bake("run", "mergekit.yaml", "--dry-run", "--json", "-v").json["bakes"]
    assert theirs["plan"] == ours["plan"]


def merged_by_mergekit(models: Path, text: str, folder: Path) -> dict[str, np.ndarray]:
    pytest.importorskip("mergekit", reason="the mergekit oracle is not installed")
    yaml = pytest.importorskip("yaml")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    path = models / "mergekit.yaml"
    path.write_text(text)
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(text)),
        str(folder),
        MergeOptions(copy_tokenizer=False, write_model_card=False),
    )
    return {name: array for each in folder.glob("*.safetensors") for name, array in load(each).items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.xdist_group("oracles")
@pytest.mark.parametrize("text", [LINEAR, SLERP, TIES, STACK], ids=["linear", "slerp", "ties", "stack"])
def test_mergekit_makes_the_same_of_it(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(models)
    text = "\n".join(line for line in text.splitlines() if "dtype" not in line) + "\ndtype: float32\n"
    expected = merged_by_mergekit(models, text, tmp_path / "theirs")
    done = bake("run", "mergekit.yaml", "-o", tmp_path / "ours")
    assert done.code == 0, done.err
    found = load(tmp_path / "ours" / "model.safetensors")
    assert found.keys() >= expected.keys()
    for name, array in expected.items():
        assert found[name] == pytest.approx(array, rel=1e-4, abs=1e-5), name
