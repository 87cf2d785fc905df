"""Published checkpoints' name lists as a Checkpoint, without a byte of their weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from names import Shapes, read_list

from bake.io.checkpoint import Checkpoint, CheckpointFile, Packaging
from bake.io.header import TensorInfo


def checkpoint_of(
    parts: dict[str, Shapes], packaging: Packaging = "file", configs: dict[str, dict[str, Any]] | None = None
) -> Checkpoint:
    """A checkpoint of these files; keys: what goes before each file's tensor names ("", "transformer/", ...)."""
    files = []
    for group, shapes in parts.items():
        tensors = {name: TensorInfo("F16", shape, 0, 0) for name, shape in shapes.items()}
        files.append(CheckpointFile(SimpleNamespace(tensors=tensors), f"{group}model.safetensors", group))  # type: ignore[arg-type]
    return Checkpoint(Path("base"), packaging, tuple(files), configs=configs or {})


def checkpoint_of_list(path: Path) -> Checkpoint:
    """The checkpoint that a list describes, in its own packaging."""
    about, shapes = read_list(path)
    configs = {name.removesuffix("config.json"): config for name, config in about.get("config", {}).items()}
    folders = sorted({file.rpartition("/")[0] for file in about.get("files", {})})
    if about["layout"] == "diffusers":
        in_one = len(folders) == 1
        parts: dict[str, Shapes] = {f"{folder}/": {} for folder in folders}
        for name, shape in shapes.items():
            folder, _, tensor = ("", "", name) if in_one else name.partition("/")
            parts[f"{folder or folders[0]}/"][tensor] = shape
        return checkpoint_of(parts, "diffusers", configs)
    return checkpoint_of({"": shapes}, "sharded" if about["layout"] == "hf" else "file", configs)


def shapes_of(checkpoint: Checkpoint) -> Shapes:
    return {name: info.shape for name, _, info in checkpoint.tensors()}
