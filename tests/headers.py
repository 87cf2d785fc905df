"""Checkpoints and adapters that are all header: real names and shapes over a hole of the right size.

Planning reads no weights, so what has 12 billion parameters costs a few kilobytes of disk here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from names import read_content

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

_BITS = {"F16": 16, "BF16": 16, "F32": 32, "I32": 32, "I64": 64}
_ONE = {
    "F16": b"\x00\x3c",
    "BF16": b"\x80\x3f",
    "F32": b"\x00\x00\x80\x3f",
    "I32": b"\x01\0\0\0",
    "I64": b"\x01" + 7 * b"\0",
}


def write_header(path: Path, tensors: Mapping[str, tuple[str, Shape]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file with this header, name -> (dtype, shape). Scalars hold 1, all else is a hole."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    scalars, end = [], 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * _BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        if math.prod(shape) == 1:
            scalars.append((begin, _ONE[dtype]))
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin, value in scalars:
            file.seek(8 + len(text) + begin)
            file.write(value)
        file.truncate(8 + len(text) + end)
    return path


def write_shapes(path: Path, shapes: Mapping[str, Shape], dtype: str = "F16") -> Path:
    """The same with one dtype for all tensors."""
    return write_header(path, {name: (dtype, shape) for name, shape in shapes.items()})


def write_listed(place: Path, *lists: Path) -> Path:
    """The base that the lists describe together: a file at `place`.safetensors, or the folder `place`.

    Folders have the shards, indexes and config.json files of the list; several lists share one folder.
    """
    for path in lists:
        content = read_content(path)
        about, tensors = content["about"], content["tensors"]
        if "files" not in about:
            assert len(lists) == 1, path
            return write_header(place.with_name(f"{place.name}.safetensors"), _typed(tensors))
        folders = {file.rpartition("/")[0] for file in about["files"]}
        names = iter(tensors)
        shards: dict[str, list[list[str]]] = {}
        for file, count in about["files"].items():
            folder, _, name = file.rpartition("/")
            inside = [next(names) for _ in range(count)]
            cut = len(folder) + 1 if len(folders) > 1 else 0
            write_header(place / file, {each[cut:]: (tensors[each][0], tuple(tensors[each][1])) for each in inside})
            shards.setdefault(folder, []).append([name, *(each[cut:] for each in inside)])
        for folder, parts in shards.items():
            if len(parts) > 1:
                weight_map = {tensor: shard for shard, *inside in parts for tensor in inside}
                stem = parts[0][0].split("-0")[0]
                index = place / folder / f"{stem}.safetensors.index.json"
                index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for relative, config in about.get("config", {}).items():
            (place / relative).write_text(json.dumps(config))
        if about["layout"] == "diffusers" and not (place / "model_index.json").exists():
            (place / "model_index.json").write_text("{}")
    return place


def _typed(tensors: Mapping[str, Any]) -> dict[str, tuple[str, Shape]]:
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}


def factors(
    module: str, shape: Shape, down: str = "lora_down.weight", up: str = "lora_up.weight", alpha: bool = True
) -> Shapes:
    """The LoRA factors of a module whose weight is (out, in) or (out, in, *kernel), at rank 2."""
    scale: Shapes = {f"{module}.alpha": ()} if alpha else {}
    ones = (1,) * (len(shape) - 2)
    return {f"{module}.{down}": (2, *shape[1:]), f"{module}.{up}": (shape[0], 2, *ones)} | scale


_NO_LAYERS = (  # matrices that no LoRA of a Linear or convolution is for: lookup tables
    *("embed_tokens", "shared", "token_embedding", "position_embedding", "relative_attention_bias", "embed_positions"),
    *("word_embeddings", "position_embeddings", "token_type_embeddings", "wte", "wpe"),
)


def layers(shapes: Mapping[str, Shape], prefix: str = "") -> Shapes:
    """module -> shape of its weight, for the Linear and convolution layers below `prefix`, which is cut off."""
    return {
        name[len(prefix) :].removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.startswith(prefix) and name.endswith(".weight") and len(shape) > 1
        if name.split(".")[-2] not in _NO_LAYERS
    }


def union(parts: Iterable[Shapes]) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}
