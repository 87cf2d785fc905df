"""Small bakes of every kind of output, and what their folders must look like whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from crashing import FEW, MANY, PARTIAL, Fault, Ran, Server
from models import llama, peft_lora
from support import Arrays, random, save

Files = dict[str, str]  # relative path -> SHA-256

TOUCHED = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]


def _arrays() -> Arrays:
    return {name: random(place, *shape).astype(np.float16) for place, (name, shape) in enumerate(llama().items())}


def _lora(folder: Path, **more: Any) -> Path:
    return save(folder / "in" / "lora.safetensors", peft_lora(llama(), TOUCHED) | more)


def _file(folder: Path) -> list[Path | str]:
    return [save(folder / "in" / "base.safetensors", _arrays()), "-l", _lora(folder), "-o", folder / "out.safetensors"]


def _with_embeddings(folder: Path) -> list[Path | str]:
    words = _file(folder)
    _lora(folder, **{"<s1>": random(1, 768).astype(np.float32), "<s2>": random(2, 768).astype(np.float32)})
    return words


def _folder(folder: Path) -> list[Path | str]:
    arrays, index = _arrays(), {}
    for number, names in enumerate((sorted(arrays)[:9], sorted(arrays)[9:]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save(folder / "in" / "base" / shard, {name: arrays[name] for name in names})
        index |= dict.fromkeys(names, shard)
    base = folder / "in" / "base"
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.json").write_text("{}")
    return [base, "-l", _lora(folder), "-o", folder / "out"]


def _stack(folder: Path) -> list[Path | str]:
    first = {name: array for name, array in _arrays().items() if ".layers.0." in name}
    rest = {name: array for name, array in _arrays().items() if ".layers.0." not in name}
    base, also = (save(folder / "in" / f"{name}.safetensors", part) for name, part in (("one", first), ("two", rest)))
    return [base, "--also", also, "-l", _lora(folder), "-o", folder / "out"]


def _undoable(make: Callable[[Path], list[Path | str]]) -> Callable[[Path], list[Path | str]]:
    return lambda folder: [*make(folder), "--keep-undo"]


# name -> (makes the inputs and gives the words, whether there is an old output)
KINDS: dict[str, tuple[Callable[[Path], list[Path | str]], bool]] = {
    "file": (_file, False),
    "file over an old one": (_file, True),
    "file with embeddings": (_with_embeddings, False),
    "file with embeddings over old ones": (_with_embeddings, True),
    "folder": (_folder, False),
    "folder over an old one": (_folder, True),
    "stack": (_stack, False),
    "stack over an old one": (_stack, True),
    "file with undo data": (_undoable(_file), False),
    "file with undo data over an old one": (_undoable(_file), True),
    "folder with undo data over an old one": (_undoable(_folder), True),
}


def state(path: Path) -> Files:
    """Every file below `path`, or the file itself; empty folders count too."""
    if path.is_file():
        return {"": hashlib.sha256(path.read_bytes()).hexdigest()}
    return {
        each.relative_to(path).as_posix(): hashlib.sha256(each.read_bytes()).hexdigest() if each.is_file() else ""
        for each in sorted(path.rglob("*"))
    }


@dataclass(frozen=True)
class Scene:
    """One kind of bake, prepared, with its folder before and after a run that nothing disturbs."""

    server: Server
    template: Path
    words: list[str]  # with {} for the folder
    output: str  # name of the output in the folder
    has_old: bool
    before: Files
    after: Files
    order: list[tuple[str, str]]  # what the undisturbed run called, see Ran.calls

    @property
    def calls(self) -> dict[str, list[str]]:
        """Paths by the kind of call, in order."""
        return {kind: [path for called, path in self.order if called == kind] for kind in dict.fromkeys(FEW + MANY)}

    def copy(self, folder: Path) -> Path:
        """The scene set up in a new folder."""
        return Path(shutil.copytree(self.template, folder / "scene"))

    def run(self, folder: Path, fault: Fault | None = None, **how: Any) -> Ran:
        words = [word.replace("{}", str(folder)) for word in self.words]
        return self.server.run(*words, folder=folder, fault=fault, **how)

    def part(self, files: Files, name: str) -> Files:
        return {path: digest for path, digest in files.items() if path.split("/")[0] == name}

    def output_of(self, files: Files) -> Files:
        return self.part(files, self.output)

    def litter(self, folder: Path) -> list[str]:
        """What the run, or its predecessor, is not entitled to leave behind."""
        return sorted(set(state(folder)) - self.before.keys() - self.after.keys())

    def points(self, count: int) -> list[tuple[str, int, str]]:
        """(kind, number, moment) of that many events, spread over the run; two thirds of them those that matter."""
        few, many = (
            [
                (kind, number, moment)
                for kind in kinds
                for number in range(len(self.calls[kind]))
                for moment in ("before", "after", *(["half"] if kind in PARTIAL else []))
            ]
            for kinds in (FEW, MANY)
        )
        first = min(len(few), (2 * count + 2) // 3)
        return spread(few, first) + spread(many, count - first)


def spread(items: list[Any], count: int) -> list[Any]:
    """`count` of the items, evenly, the last among them."""
    if count <= 0 or not items:
        return []
    count = min(count, len(items))
    return [items[(place + 1) * len(items) // count - 1] for place in range(count)]


def prepare(server: Server, name: str, folder: Path) -> Scene:
    """Build a scene, and see what an undisturbed run makes of it."""
    make, has_old = KINDS[name]
    template = folder / "template"
    words = [str(word).replace(str(template), "{}") for word in ("fuse", *make(template), "--threads", 2)]
    output = Path(words[words.index("-o") + 1]).name
    if has_old:
        made = server.run(*(word.replace("{}", str(template)) for word in words), folder=template, hooked=False)
        assert made.code == 0, made.err
        words[words.index("-l") + 1] += ":0.5"
        words.append("--overwrite")
    scene = Scene(server, template, words, output, has_old, state(template), {}, [])
    trial = scene.copy(folder)
    ran = scene.run(trial)
    assert ran.code == 0, ran.err
    after = state(trial)
    shutil.rmtree(trial)
    order = [(kind, path.removeprefix(str(trial))) for kind, path in ran.calls]
    return Scene(server, template, words, output, has_old, scene.before, after, order)
