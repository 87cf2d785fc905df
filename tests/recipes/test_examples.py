"""The recipes in docs/recipes.md: the schema likes them, and they do what they are there for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
from models import llama, random_arrays
from support import DIFFUSERS_LORA, FIXTURES, KOHYA_LORA, ROOT, SD1_BASE, bake, save

from bake.recipes.document import Items, Node, Scalar, read_document
from bake.recipes.schema import recipe_schema

EXAMPLES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "loras").mkdir()
    for name in ("sd15", "anime", "vae"):
        shutil.copyfile(SD1_BASE, folder / f"{name}.safetensors")
    for name, lora in (("style", KOHYA_LORA), ("detail", DIFFUSERS_LORA)):
        shutil.copyfile(lora, folder / f"{name}.safetensors")
        shutil.copyfile(lora, folder / "loras" / f"{name}.safetensors")
    for name in ("one", "two"):
        save(folder / name / "model.safetensors", random_arrays(llama()))
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    return folder


def plain(node: Node) -> object:
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return {name: plain(value) for name, value in node.entries.items()}


@pytest.mark.parametrize("text", EXAMPLES, ids=[f"example-{number}" for number in range(len(EXAMPLES))])
def test_examples_can_be_planned(folder: Path, text: str) -> None:
    path = folder / "recipe.yaml"
    path.write_text(text)
    done = bake("run", path, "--dry-run")
    assert done.code == 0, done.err
    if "merge_method" not in text:
        jsonschema.Draft202012Validator(recipe_schema()).validate(plain(read_document(path)))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


def test_the_long_example_is_done_in_one_pass(folder: Path) -> None:
    path = folder / "long.yaml"
    path.write_text(next(text for text in EXAMPLES if "bake: 1" in text))
    (done,) = bake("run", path, "--json").json["bakes"]
    assert done["verification"]["ok"]
    assert done["verification"]["equal"] == done["verification"]["elements"]
    assert bake("verify", folder / "merged.safetensors", "--search", folder).code == 0


def test_the_fixture_can_be_planned() -> None:
    assert bake("run", FIXTURES / "recipes" / "styles.yaml", "--dry-run").code == 0
