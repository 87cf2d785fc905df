"""A base as the user names it: one file, a stack of files, a sharded folder or a diffusers folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from bake.errors import FolderError, InputError, UsageError
from bake.io.files import check_exists, read_bytes, reading
from bake.io.header import TensorInfo
from bake.io.jsontext import parse_object, shortened
from bake.io.tensorfile import TensorFile, open_tensors

Packaging = Literal["file", "stack", "sharded", "diffusers"]

# Weights in formats that are not carried over: the output's own weights replace them.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
# What trainers leave beside a model.
_TRAINING_STATE = {"optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json", "training_args.bin"}
_SKIPPED_FOLDERS = {"__pycache__"}
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
_MOST_JSON = 100_000_000  # bytes; the largest tokenizers and shard indexes take a third of it
_MOST_FILES = 100_000
_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class CheckpointFile:
    """One weight file of a checkpoint."""

    file: TensorFile
    relative: str  # path below the checkpoint, with slashes; the output uses the same
    group: str  # put before this file's tensor names to tell components apart: "" or "unet/"


@dataclass(frozen=True)
class ShardIndex:
    """A *.safetensors.index.json."""

    relative: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """All weight files of a base and everything that has to travel with them.

    Tensors are named as in their file, with the file's group before it: "unet/conv_in.weight" in a
    diffusers folder, plain names where there is one file or one sharded set.
    """

    root: Path
    packaging: Packaging
    files: tuple[CheckpointFile, ...]
    indexes: tuple[ShardIndex, ...] = ()
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # group -> its config.json
    side_files: tuple[str, ...] = ()  # relative paths copied as they are
    left_out: tuple[str, ...] = ()  # files of the folder that do not reach the output

    def tensors(self) -> Iterator[tuple[str, CheckpointFile, TensorInfo]]:
        """(full name, file, info) of every tensor, in the order of the bytes."""
        for part in self.files:
            for name, info in part.file.tensors.items():
                yield part.group + name, part, info

    def close(self) -> None:
        for part in self.files:
            part.file.close()


def open_checkpoint(path: Path, also: Sequence[Path] = ()) -> Checkpoint:
    """Open the base at `path`, with further files of a split stack in `also`.

    Raises InputError and its kin for anything missing, unreadable or contradictory.
    """
    check_exists(path)
    if path.is_dir():
        if also:
            raise UsageError(f"--also adds files to a single-file base; {path} is a folder")
        return _open_folder(path)
    if not also:
        opened = open_tensors(path)
        return Checkpoint(path, "file", (CheckpointFile(opened, _output_name(path), ""),))
    files: list[CheckpointFile] = []
    for place, each in enumerate((path, *also)):
        name = _output_name(each)
        check_exists(each)
        if any(each.samefile(other) for other in (path, *also)[:place]):
            raise UsageError(f"{each} is named twice in the stack")
        if any(name == other.relative for other in files):
            raise UsageError(f"two files of the stack are called {name}; the output folder can hold only one")
        files.append(CheckpointFile(open_tensors(each), name, name + "/"))
    return Checkpoint(path, "stack", tuple(files))


def _output_name(path: Path) -> str:
    return path.with_suffix(".safetensors").name


def _open_folder(root: Path) -> Checkpoint:
    if (root / "model_index.json").is_file():
        return _open_diffusers(root)
    files, indexes, unused = _open_weights(root, "", "")
    if not files:
        for packed in sorted(root.glob("*.gguf")):
            open_tensors(packed).close()  # says that it is a GGUF file and what to do
        raise FolderError(
            f"{root}: no weights here: no .safetensors file, no index with its shards, no model_index.json. "
            f"Weights in PyTorch's .bin files have to be saved as safetensors first.",
            path=str(root),
        )
    side, left_out = _side_files(root, {part.relative for part in files} | {index.relative for index in indexes})
    configs = {"": read_json_object(root / "config.json")} if (root / "config.json").is_file() else {}
    return Checkpoint(root, "sharded", files, indexes, configs, side, (*unused, *left_out))


def _open_diffusers(root: Path) -> Checkpoint:
    read_json_object(root / "model_index.json")  # it is copied; nobody could load the output if it is damaged
    files: list[CheckpointFile] = []
    indexes: list[ShardIndex] = []
    configs: dict[str, dict[str, Any]] = {}
    unused: list[str] = []
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not _is_hidden(entry.name)):
        parts, index, extra = _open_weights(folder, folder.name + "/", folder.name + "/")
        files += parts
        indexes += index
        unused += extra
        if parts and (folder / "config.json").is_file():
            configs[folder.name + "/"] = read_json_object(folder / "config.json")
    if not files:
        raise FolderError(f"{root}: model_index.json is here, but no component folder with weights", path=str(root))
    taken = {part.relative for part in files} | {index.relative for index in indexes}
    side, left_out = _side_files(root, taken)
    return Checkpoint(root, "diffusers", tuple(files), tuple(indexes), configs, side, (*unused, *left_out))


def _open_weights(
    folder: Path, below: str, group: str
) -> tuple[tuple[CheckpointFile, ...], tuple[ShardIndex, ...], tuple[str, ...]]:
    """(weight files, their index, variants passed over) of one folder; an index wins over single files.

    Where several variants lie side by side (fp16 beside fp32), the plain name is taken.
    """
    found = sorted(folder.glob("*.safetensors.index.json"), key=lambda path: len(path.name))
    if found:
        parts = _open_shards(folder, found[0], below, group)
        passed_over = tuple(below + path.name for path in found[1:])
        return parts, (ShardIndex(below + found[0].name, read_json_object(found[0])),), passed_over
    named = [path for stem in _STEMS for path in sorted(folder.glob(f"{stem}*.safetensors"))]
    candidates = sorted(dict.fromkeys(named), key=lambda path: len(path.name))
    if not candidates:
        candidates = sorted(folder.glob("*.safetensors"))
        if len(candidates) > 1:
            names = ", ".join(path.name for path in candidates[:4])
            raise FolderError(f"{folder}: several weight files and no index ({names}); name the one you mean")
    if not candidates:
        return (), (), ()
    if _SHARD.search(candidates[0].name):
        raise FolderError(f"{folder}: shards such as {candidates[0].name}, but no index that lists them")
    part = CheckpointFile(open_tensors(candidates[0]), below + candidates[0].name, group)
    return (part,), (), tuple(below + path.name for path in candidates[1:])


def _open_shards(folder: Path, index: Path, below: str, group: str) -> tuple[CheckpointFile, ...]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FolderError(f"{index}: its weight_map does not map tensor names to files", path=str(index))
    listed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        listed.setdefault(shard, set()).add(name)
    parts = []
    for shard in sorted(listed):
        if PureWindowsPath(shard).name != shard or not shard.endswith(".safetensors"):  # knows both slashes, and C:
            raise FolderError(f"{index}: {shortened(shard)} is not the name of a shard in this folder", path=str(index))
        if not os.path.isfile(folder / shard):  # the name is a stranger's: pathlib raises for some
            raise FolderError(f"{index}: the shard {shard} is missing", path=str(index), shard=shard)
        opened = open_tensors(folder / shard)
        for name in sorted(listed[shard].symmetric_difference(opened.tensors)):
            where = "is not in" if name in listed[shard] else "is in the file but not listed for"
            raise FolderError(f"{index}: {name!r} {where} {shard}", path=str(index), tensor=name)
        parts.append(CheckpointFile(opened, below + shard, group))
    return tuple(parts)


def open_side_files(root: Path) -> tuple[str, ...]:
    """What of a folder is copied beside weights, as paths below it. Raises FolderError as `open_checkpoint`."""
    return _side_files(root, set())[0]


def _side_files(root: Path, taken: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(files to copy, files left out) among everything below `root` that is not `taken`.

    Raises FolderError as `check_stays`, and for folders without end.
    """
    side: list[str] = []
    left_out: list[str] = []
    for count, path in enumerate(_files_below(root, ())):
        if count == _MOST_FILES:
            raise FolderError(f"{root}: more than {_MOST_FILES} files, which is no model's folder", path=str(root))
        relative = path.relative_to(root).as_posix()
        if relative in taken:
            continue
        stale = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        kept_out = stale or path.name in _TRAINING_STATE or path.name.startswith("rng_state")
        if kept_out or not path.is_file():  # such as a link to nowhere
            left_out.append(relative)
            continue
        check_stays(path, root)
        side.append(relative)
    return tuple(side), tuple(left_out)


def check_stays(path: Path, folder: Path) -> None:
    """Raise FolderError if `path`, a file of `folder` to be copied, is a link to somewhere else.

    What a stranger's folder points at would become part of the output. Links into the blobs of the Hugging Face
    cache that the folder is part of are how these caches are built.
    """
    target, real = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = [real, *(place.parent / "blobs" for place in real.parents if place.name == "snapshots")]
    if not any(home in target.parents for home in homes):
        raise FolderError(
            f"{path}: a link out of its folder, to {target}, which would be copied into the output. "
            f"Put a copy of the file in its place if it belongs to the model.",
            path=str(path),
        )


def _files_below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """Everything below `folder` that is no folder, in order, hidden names left out; above: the real paths above it.

    Raises FolderError for a folder that contains itself, or cannot be listed.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise FolderError(f"{folder}: a link to a folder above it, which would never end", path=str(folder))
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise FolderError(f"{folder}: cannot be listed: {error.strerror}", path=str(folder)) from None
    for path in entries:
        if _is_hidden(path.name):
            continue
        if path.is_dir():
            yield from _files_below(path, (*above, real))
        else:
            yield path


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SKIPPED_FOLDERS


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises InputError if it is unreadable, malformed or something else."""
    with reading(path) as fd:
        size = os.fstat(fd).st_size
        if size > _MOST_JSON:
            raise InputError(f"{path}: {size} bytes of JSON, more than any model has", path=str(path))
        text = read_bytes(fd, 0, size, path)
    return parse_object(text, f"{path}: it", path=str(path))
