"""A recipe file into bakes: what stands at the top is that of every bake, but for what its own entry says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bake.errors import BakeError
from bake.io.files import inputs_only
from bake.plan.prompt import LoraFolder, adapters_from_prompt
from bake.plan.recipe import AdapterChoice, MergeChoice, Recipe
from bake.recipes.document import Entries, Items, Mark, Node, Scalar, read_document
from bake.recipes.format import RECIPE, RUN_KEYS, SETTINGS
from bake.recipes.kinds import expect, placed
from bake.recipes.mergekit import is_mergekit, read_configuration

_EXCLUSIVE = {"base": "merge", "merge": "base"}  # one in an entry takes the place of the other above it


@dataclass(frozen=True, slots=True)
class Bake:
    """One bake of a recipe file."""

    name: str
    recipe: Recipe
    output: Path | None  # None: to be named on the command line
    run: dict[str, Any]  # those of RUN_KEYS that are given
    nodes: tuple[Node, ...]  # what it was read from: its own entry, then what stands above it
    notes: tuple[str, ...] = ()  # what was read and changes nothing, or not what one may think

    @property
    def mark(self) -> Mark:
        """Where it stands."""
        return self.nodes[0].mark

    def placed(self, error: BakeError) -> BakeError:
        """The refusal of this bake with its place: where the file stands that it is about, else where the bake does."""
        about = error.details.get("path")
        marks = (mark for node in self.nodes for mark in _marks_of(node, Path(str(about)))) if about else iter(())
        return placed(error, next(marks, self.mark))


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """What a recipe file asks for."""

    path: Path
    bakes: tuple[Bake, ...]


def _marks_of(node: Node, path: Path) -> Iterator[Mark]:
    """Where a file, or the folder it lies in, is named; also with a weight behind it."""
    if isinstance(node, Scalar):
        named = node.mark.file.parent / node.text
        if node.text and (named == path or named in path.parents or str(named).startswith(f"{path}:")):
            yield node.mark
        return
    for each in node.items if isinstance(node, Items) else node.entries.values():
        yield from _marks_of(each, path)


def read_recipe(path: Path) -> RecipeFile:
    """The bakes in the file at `path`: of bake's own format, or a configuration of mergekit.

    Relative paths in it start from its folder. Raises InputError for what is no YAML, UsageError for what cannot be
    meant, Unsupported for what bake does not do; each says line and column. Of the bakes nothing is opened, but for
    the LoRAs that a prompt names.
    """
    with inputs_only():
        return _read(path, read_document(path))


def _read(path: Path, document: Node) -> RecipeFile:
    if not isinstance(document, Entries):
        expect(document, "a recipe, a mapping,")
    if is_mergekit(document):
        return RecipeFile(path, (_from_mergekit(path, document),))
    given = RECIPE.read(document)
    above = {key: value for key, value in given.items() if key not in ("bake", "bakes")}
    folders: dict[Path, LoraFolder] = {}
    entries = given.get("bakes")
    if entries is None:
        return RecipeFile(path, (_Reader((document,), above, folders).bake(),))
    nodes = document.entries["bakes"]
    assert isinstance(nodes, Items)
    return RecipeFile(
        path,
        tuple(
            _Reader((node, _without_bakes(document)), _joined(above, entry), folders).bake()
            for node, entry in zip(nodes.items, entries, strict=True)
        ),
    )


def _from_mergekit(path: Path, document: Entries) -> Bake:
    found = read_configuration(document)
    recipe = Recipe(base=found.merge, dtype=found.dtype)
    return Bake(path.stem, recipe, None, {}, (document,), found.notes)


def _without_bakes(document: Entries) -> Entries:
    above = {key: node for key, node in document.entries.items() if key != "bakes"}
    return Entries(document.mark, above, document.keys)


def _joined(above: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """What counts for an entry: its own keys, and the others above it; nothing after a key takes it away."""
    left = {key: value for key, value in above.items() if _EXCLUSIVE.get(key) not in entry}
    return {key: value for key, value in {**left, **entry}.items() if value is not None}


class _Reader:
    """Makes one bake of what its keys say."""

    def __init__(self, nodes: tuple[Node, ...], given: dict[str, Any], folders: dict[Path, LoraFolder]) -> None:
        self._nodes, self._given, self._folders = nodes, given, folders
        self._notes: list[str] = []

    def bake(self) -> Bake:
        given = self._given
        base: Path | MergeChoice | None = given.get("base", given.get("merge"))
        if "base" in given and "merge" in given:
            self._refuse("merge", "a bake begins with a base or a merge, not both")
        if "merge" in given and "also" in given:
            self._refuse("also", "also is for a split base; a merge takes whole models")
        if base is None:
            self._nodes[0].mark.refuse("a bake needs a base, or a merge of several")
        settings = {field: given[key] for key, field in SETTINGS.items() if key in given}
        recipe = Recipe(base=base, adapters=self._adapters(), replaced=self._replaced(), **settings)
        if isinstance(base, Path) and not (recipe.adapters or recipe.replaced or recipe.converts or recipe.rearranges):
            self._nodes[0].mark.refuse("nothing to do: name loras, a merge, a replacement, a dtype or a layout")
        output: Path | None = given.get("output")
        name = given.get("name") or (output.stem if output is not None else self._nodes[0].mark.file.stem)
        run = {key: given[key] for key in RUN_KEYS if key in given}
        return Bake(name, recipe, output, run, self._nodes, tuple(self._notes))

    def _mark(self, key: str) -> Mark:
        """Where a key that counts stands."""
        keys = [node.keys for node in self._nodes if isinstance(node, Entries) and key in node.keys]
        return keys[0][key] if keys else self._nodes[0].mark

    def _refuse(self, key: str, message: str) -> NoReturn:
        self._mark(key).refuse(message)

    def _adapters(self) -> tuple[AdapterChoice, ...]:
        """Those of loras and more_loras, then those of the prompt."""
        given = self._given
        chosen: tuple[AdapterChoice, ...] = (*given.get("loras", ()), *given.get("more_loras", ()))
        if "prompt" not in given:
            if "lora_dir" in given:
                self._refuse("lora_dir", "lora_dir is for a prompt, and there is none; name single files in loras")
            return chosen
        if "lora_dir" not in given:
            self._refuse("prompt", "a prompt needs lora_dir, the folder with the LoRAs it names")
        folder: Path = given["lora_dir"]
        try:
            if folder not in self._folders:
                self._folders[folder] = LoraFolder(folder)
            named, notes = adapters_from_prompt(given["prompt"], self._folders[folder])
        except BakeError as error:
            raise placed(error, self._mark("prompt")) from None
        self._notes += [f"{self._mark('prompt')}: {note}" for note in notes]
        return (*chosen, *named)

    def _replaced(self) -> dict[str, Path]:
        replaced: dict[str, Path] = dict(self._given.get("replace", {}))
        if "vae" in self._given:
            if "vae" in replaced:
                self._refuse("vae", "vae stands under replace too")
            replaced["vae"] = self._given["vae"]
        return replaced
