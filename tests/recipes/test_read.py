"""Recipes into bakes: what every key means, what stands above an entry, and where a mistake is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support import KOHYA_LORA

from bake.errors import BakeError
from bake.plan.recipe import AdapterChoice, MergeChoice, Recipe
from bake.plan.selection import Selection
from bake.plan.words import parse_parameter
from bake.recipes.document import Items, Node, Scalar, read_document
from bake.recipes.read import Bake, read_recipe
from bake.recipes.schema import recipe_schema

VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "loras").mkdir()
    for name in ("style", "detail"):
        (tmp_path / "loras" / f"{name}.safetensors").write_bytes(KOHYA_LORA.read_bytes())
    return tmp_path


def bakes(folder: Path, text: str) -> tuple[Bake, ...]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path).bakes


def recipe(folder: Path, text: str) -> Recipe:
    (found,) = bakes(folder, text)
    return found.recipe


def plain(node: Node) -> Any:
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return {name: plain(value) for name, value in node.entries.items()}


def fits(folder: Path) -> bool:
    """True if the schema has nothing against the recipe."""
    return bool(VALIDATOR.is_valid(plain(read_document(folder / "recipe.yaml"))))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


FULL = """
bake: 1
name: mine
base: base.safetensors
also: [clip_l.safetensors, t5.safetensors]
loras:
  - style.safetensors
  - "detail.safetensors:0.7:te=0.5:lbw=MIDD"
  - {path: /far/away.safetensors, weight: -1, te: 0, unet: 2e-1, dyn: 16}
more_loras: folder/last.safetensors
vae: vae.safetensors
replace: {te1: clip.safetensors}
only: unet
dtype: {unet: fp8_e4m3fn, vae: fp32, all: bf16}
rounding: stochastic
seed: 18446744073709551615
embeddings: drop
allow_unmatched: true
allow_nonfinite_base: true
metadata: {author: me, version: 1.0, nsfw: no}
record: false
output: out/mine.safetensors
overwrite: true
device: cuda:1
memory: 2G
threads: 4
verify: full
"""


def test_every_key_says_what_it_means(folder: Path) -> None:
    (found,) = bakes(folder, FULL)
    assert found.recipe == Recipe(
        base=folder / "base.safetensors",
        adapters=(
            AdapterChoice(folder / "style.safetensors"),
            AdapterChoice(folder / "detail.safetensors", 0.7, te=0.5, selection=Selection.parse("MIDD")),
            AdapterChoice(Path("/far/away.safetensors"), -1.0, te=0.0, unet=0.2, rank_limit=16),
            AdapterChoice(folder / "folder" / "last.safetensors"),
        ),
        also=(folder / "clip_l.safetensors", folder / "t5.safetensors"),
        replaced={"te1": folder / "clip.safetensors", "vae": folder / "vae.safetensors"},
        dtype={"unet": "fp8_e4m3fn", "vae": "fp32", "all": "bf16"},
        only=("unet",),
        allow_unmatched=True,
        metadata={"author": "me", "version": "1.0", "nsfw": "no"},
        record=False,
        embeddings="drop",
        rounding="stochastic",
        seed=18446744073709551615,
        allow_nonfinite_base=True,
    )
    assert (found.name, found.output) == ("mine", folder / "out" / "mine.safetensors")
    assert found.run == {"overwrite": True, "device": "cuda:1", "memory": 2**31, "threads": 4, "verify": "full"}
    assert fits(folder)


@pytest.mark.parametrize(
    ("lora", "selection"),
    [
        ("lbw: MIDD", Selection.parse("MIDD")),
        ("lbw: [1, 0, 0.5]\n  blocks: kohya", Selection.parse("1,0,0.5", scheme="kohya")),
        ("lbw: '1,0,0.5'", Selection.parse("1,0,0.5")),
        ("gradient: [0, 0.5, 1]", Selection.parse(gradient="0,0.5,1")),
        ("gradient: 0,0.5,1", Selection.parse(gradient="0,0.5,1")),
        ("gradient: 'mlp=1,0;*=0.5'", Selection.parse(gradient="mlp=1,0;*=0.5")),
        ("gradient: {mlp: [1, 0], '*': 0.5}", Selection.parse(gradient="mlp=1,0;*=0.5")),
        ("names: '*attn2*=0.5,*.bias=0'", Selection.parse(names="*attn2*=0.5,*.bias=0")),
        ("names: {'*attn2*': 0.5, '*.bias': 0}", Selection.parse(names="*attn2*=0.5,*.bias=0")),
        ("lbwe: IN05-OUT05:attn:0.5", Selection.parse(rules="IN05-OUT05:attn:0.5")),
        ("lbwe: [IN05-OUT05:attn:0.5, M00::1]", Selection.parse(rules="IN05-OUT05:attn:0.5,M00::1")),
    ],
)
def test_block_weights_are_those_of_the_command_line(folder: Path, lora: str, selection: Selection) -> None:
    found = recipe(folder, f"base: b.safetensors\nloras:\n- path: a\n  {lora}\n")
    assert found.adapters[0].selection == selection
    assert fits(folder)


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("alpha: 0.3", ["alpha=0.3"]),
        ("alpha: {value: 0.5, te: 0.3, vae: 0}", ["alpha=0.5:te=0.3:vae=0"]),
        ("alpha: {lbw: GRAD_V, blocks: mecha}", ["alpha:lbw=GRAD_V:blocks=mecha"]),
        ("alpha: {value: 1, names: {'*attn*': 0.5}}", ["alpha=1:names=*attn*=0.5"]),
        ("alpha: {gradient: [0, 1]}", ["alpha:gradient=0,1"]),
    ],
)
def test_parameters_are_those_of_the_command_line(folder: Path, yaml: str, words: list[str]) -> None:
    found = recipe(folder, f"merge: {{method: weighted_sum, models: [a, b], parameters: {{{yaml}}}}}\n")
    assert isinstance(found.base, MergeChoice)
    assert found.base.parameters == {name: setting for name, _, setting in map(parse_parameter, words)}
    assert fits(folder)


def test_a_merge_has_all_that_the_command_has(folder: Path) -> None:
    text = (
        "merge:\n  method: dare_ties\n  base: base\n  models: [a, b]\n  parameters:\n"
        "    density: 0.5\n    weight: [0.3, {value: 1, te: 0.5}]\n    rescale: none\n    normalize: true\n"
        "  only: [unet, te]\n  allow_missing: true\nseed: 7\n"
    )
    assert recipe(folder, text) == Recipe(
        base=MergeChoice(
            method="dare_ties",
            models=(folder / "a", folder / "b"),
            base=folder / "base",
            parameters={
                "density": 0.5,
                "weight": [0.3, Selection(1.0, (("te", 0.5),))],
                "rescale": "none",
                "normalize": True,
            },
            only=("unet", "te"),
            allow_missing=True,
        ),
        seed=7,
    )
    assert fits(folder)


def test_an_entry_has_what_stands_above_but_for_its_own_keys(folder: Path) -> None:
    text = """
base: base.safetensors
dtype: fp16
loras: [style.safetensors]
more_loras: [always.safetensors]
verify: full
bakes:
  - output: plain.safetensors
  - {output: other.safetensors, loras: [other.safetensors:0.5], verify: none}
  - {output: alone.safetensors, more_loras: , dtype: null, name: without}
  - {output: merged.safetensors, merge: {method: linear, models: [a, b]}}
"""
    plain, other, alone, merged = bakes(folder, text)
    style, always = AdapterChoice(folder / "style.safetensors"), AdapterChoice(folder / "always.safetensors")
    base = folder / "base.safetensors"
    assert plain.recipe == Recipe(base, (style, always), dtype="fp16")
    assert other.recipe == Recipe(base, (AdapterChoice(folder / "other.safetensors", 0.5), always), dtype="fp16")
    assert alone.recipe == Recipe(base, (style,))
    assert merged.recipe.base == MergeChoice("linear", (folder / "a", folder / "b"))
    assert [each.run["verify"] for each in (plain, other, alone, merged)] == ["full", "none", "full", "full"]
    assert [each.name for each in (plain, other, alone, merged)] == ["plain", "other", "without", "merged"]
    assert [each.mark.line for each in (plain, other, alone, merged)] == [8, 9, 10, 11]
    assert fits(folder)


def test_a_prompt_names_loras_of_a_folder(folder: Path) -> None:
    text = "base: b\nloras: [a]\nlora_dir: loras\nprompt: a cat, <lora:style:0.8> <lora:style:1> <hypernet:x:1>\n"
    (found,) = bakes(folder, text)
    style = folder / "loras" / "style.safetensors"
    assert found.recipe.adapters == (AdapterChoice(folder / "a"), AdapterChoice(style, 0.8), AdapterChoice(style))
    assert [note.removeprefix(f"{folder}/recipe.yaml:4:1: ") for note in found.notes] == [
        "style is in the prompt 2 times; its weights are added up",
        "<hypernet:x:1> is not a LoRA tag; it stays in the prompt",
    ]
    assert fits(folder)


def test_anchors_share_what_bakes_have_in_common(folder: Path) -> None:
    text = """
bakes:
  - output: a.safetensors
    merge: &sum {method: weighted_sum, models: [a, b], parameters: {alpha: 0.3}}
  - output: b.safetensors
    merge: {<<: *sum, parameters: {alpha: 0.5}}
"""
    first, second = bakes(folder, text)
    assert isinstance(first.recipe.base, MergeChoice)
    assert isinstance(second.recipe.base, MergeChoice)
    assert first.recipe.base.models == second.recipe.base.models
    assert [each.recipe.base.parameters["alpha"] for each in (first, second)] == [0.3, 0.5]
    assert fits(folder)


# (recipe, place, part of the message, whether the schema sees it too)
MISTAKES = [
    ("base: b\nloras: [a]\nlora: [c]\n", "3:1", "a recipe has no 'lora'; is it loras?", True),
    ("base: b\nloras: [a]\nxyzzy: 1\n", "3:1", "a recipe has no 'xyzzy'; it has bake, name", True),
    ("base: b\nloras:\n- {path: a, wieght: 1}\n", "3:13", "a LoRA has no 'wieght'; is it weight?", True),
    ("base: b\nloras:\n- {weight: 1}\n", "3:3", "a LoRA needs path", True),
    ("base: b\nloras:\n- {path: a, weight: much}\n", "3:21", "a number was expected, here is 'much'", True),
    ("base: b\nloras:\n- {path: a, weight: '1'}\n", "3:21", "a number was expected", True),
    ("base: b\nloras:\n- {path: a, weight: .nan}\n", "3:21", "not a finite number", False),
    ("base: b\nloras:\n- {path: a, weight: 1e999}\n", "3:21", "not a finite number", False),
    ("base: b\nloras:\n- {path: a, weight: true}\n", "3:21", "a number was expected", True),
    ("base: b\nloras:\n- {path: a, dyn: 1.5}\n", "3:18", "a whole number was expected", True),
    ("base: b\nloras:\n- {path: a, dyn: 0}\n", "3:18", "out of range; it can be from 1", True),
    ("base: b\nloras:\n- {path: a, blocks: kohya}\n", "3:13", "blocks says nothing without lbw", True),
    ("base: b\nloras:\n- {path: a, lbw: MIDDLE}\n", "3:3", "'MIDDLE' is no preset", False),
    ("base: b\nloras:\n- {path: a, lbw: []}\n", "3:18", "the list is empty", True),
    ("base: b\nloras: [a:1:2]\n", "2:9", "two weights", False),
    ("base: b\nloras: [a:start=3]\n", "2:9", "switches a LoRA during sampling", False),
    ("base: b\nloras: {a: 1}\n", "2:9", "a LoRA has no 'a'", True),
    ("base: b\nloras:\n", "2:7", "a LoRA, as behind -l was expected, here is nothing", True),
    ("base: [b]\nloras: [a]\n", "1:7", "a file or folder was expected, here is a list", True),
    ("base: ''\nloras: [a]\n", "1:7", "a file or folder was expected", True),
    ("base: b\ndtype: fp12\n", "2:8", "'fp12' is not one of keep, fp32", True),
    ("base: b\ndtype: {unet: half}\n", "2:15", "'half' is not one of", True),
    ("base: b\ndtype: bf16\nrounding: stochastc\n", "3:11", "is it stochastic?", True),
    ("base: b\nloras: [a]\nrecord: yes\n", "3:9", "true or false was expected, here is 'yes'", True),
    ("base: b\nloras: [a]\nmemory: much\n", "3:9", "not a size", True),
    ("base: b\nloras: [a]\nthreads: 0\n", "3:10", "out of range", True),
    ("base: b\nloras: [a]\nverify: all\n", "3:9", "is not one of none, sample, full", True),
    ("base: b\nloras: [a]\nmetadata: {a: [1]}\n", "3:15", "a text was expected, here is a list", True),
    ("bake: 2\nbase: b\nloras: [a]\n", "1:7", "a recipe of format 2; this bake reads 1", True),
    ("base: b\nmerge: {method: linear, models: [a, b]}\n", "2:1", "not both", True),
    ("loras: [a]\n", "1:1", "a bake needs a base", True),
    ("base: b\n", "1:1", "nothing to do", False),
    ("merge: {method: linear, models: [a, b]}\nalso: c\n", "2:1", "also is for a split base", False),
    ("base: b\nvae: a\nreplace: {vae: c}\n", "2:1", "vae stands under replace too", False),
    ("base: b\nprompt: <lora:a:1>\n", "2:1", "a prompt needs lora_dir", False),
    ("base: b\nlora_dir: loras\nloras: [a]\n", "2:1", "lora_dir is for a prompt", False),
    ("base: b\nprompt: <lora:styel:1>\nlora_dir: loras\n", "2:1", "Did you mean 'style'?", False),
    ("base: b\nprompt: <lora:a:1>\nlora_dir: nowhere\n", "2:1", "there is no such folder", False),
    ("base: b\nbakes: []\n", "2:8", "the list is empty", True),
    ("base: b\nbakes: [{outptu: x}]\n", "2:10", "a bake has no 'outptu'; is it output?", True),
    ("base: b\nbakes: [x]\n", "2:9", "a bake, a mapping, was expected, here is 'x'", True),
    ("base: b\nbakes: [{loras: [a], bakes: []}]\n", "2:22", "a bake has no 'bakes'", True),
    ("bakes: [{loras: [a]}]\n", "1:9", "a bake needs a base", False),
    ("- base: b\n", "1:1", "a recipe, a mapping, was expected, here is a list", True),
    ("merge: linear\n", "1:8", "a merge, a mapping, was expected, here is 'linear'", True),
    ("merge: {models: [a, b]}\n", "1:8", "a merge needs method", True),
    ("merge: {method: linaer, models: [a, b]}\n", "1:17", "is it linear?", True),
    ("merge: {method: linear}\n", "1:8", "a merge needs models", True),
    ("merge: {method: linear, models: []}\n", "1:33", "the list is empty", True),
    ("merge: {method: ties, models: [a], base: b}\n", "1:8", "the method ties needs parameters: density", True),
    (
        "merge:\n  method: ties\n  models: [a]\n  parameters: {weight: 1}\n",
        "4:15",
        "the method ties needs density",
        True,
    ),
    (
        "merge:\n  method: ties\n  models: [a]\n  parameters: {density: 1.5}\n",
        "4:25",
        "it can be above 0 and up to 1",
        True,
    ),
    (
        "merge:\n  method: ties\n  models: [a]\n  parameters: {density: [0.5, 0]}\n",
        "4:31",
        "it can be above 0 and up to 1",
        True,
    ),
    (
        "merge:\n  method: ties\n  models: [a]\n  parameters: {density: {te: 2}}\n",
        "4:30",
        "it can be above 0 and up to 1",
        True,
    ),
    (
        "merge:\n  method: linear\n  models: [a, b]\n  parameters: {wieght: 1}\n",
        "4:16",
        "the method linear has no 'wieght'; is it weight?",
        True,
    ),
    (
        "merge:\n  method: linear\n  models: [a, b]\n  parameters: {normalize: 1}\n",
        "4:27",
        "true or false was expected",
        True,
    ),
    (
        "merge:\n  method: weighted_sum\n  models: [a, b]\n  parameters: {alpha: [0.1, 0.2]}\n",
        "4:23",
        "a number was expected, here is a list",
        True,
    ),
]


@pytest.mark.parametrize(("text", "place", "says", "is_seen"), MISTAKES)
def test_a_mistake_is_one_message_with_its_place(folder: Path, text: str, place: str, says: str, is_seen: bool) -> None:
    with pytest.raises(BakeError) as refused:
        bakes(folder, text)
    error = refused.value
    assert error.message.startswith(f"{folder}/recipe.yaml:{place}: "), error.message
    assert says in error.message
    assert error.exit_code == (6 if "sampling" in says else 2)
    assert f"{error.details['line']}:{error.details['column']}" == place
    assert fits(folder) is not is_seen


def test_what_the_schema_refuses_the_reader_refuses_too(folder: Path) -> None:
    """Every value of the full recipe, spoiled in many ways."""
    lines = FULL.strip().splitlines()
    refused = 0
    for number, line in enumerate(lines):
        key = line.partition(": ")[0]
        for spoiled in ("[]", "{}", "[[1]]", "{a: {b: 1}}", "", "''", "true", "1", "-1", "1.5", "word", "[word]"):
            if key == line or line.startswith(" "):
                continue
            error = mistake(folder, "\n".join([*lines[:number], f"{key}: {spoiled}", *lines[number + 1 :]]))
            if not fits(folder):
                assert error is not None, f"{key}: {spoiled}"
                assert error.details["line"] == number + 1, error.message
                refused += 1
    assert refused > 100


def mistake(folder: Path, text: str) -> BakeError | None:
    """What the reader has against a recipe."""
    try:
        bakes(folder, text)
    except BakeError as error:
        return error
    return None
