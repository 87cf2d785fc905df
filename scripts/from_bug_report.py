"""Make files with the names and shapes of a bug report, so that a user's problem can be seen here.

    python scripts/from_bug_report.py REPORT.json FOLDER [--zeros]

`bake inspect FILE --against BASE --bug-report REPORT.json` writes such reports. The weights are random, the
same in every run; alphas and other stored numbers are the user's. With --zeros the weights are holes that
take no disk space, which is enough for `bake plan` and `bake inspect` on models of full size.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import zlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bake.bugreport import SCHEMA
from bake.dtypes import DTYPES
from bake.io.header import TensorInfo, build_header, lay_out
from bake.io.payload import torch_dtype, view_as

_POOL = 65_537  # random values, used over and over; odd, so that rows differ
_SPREAD = 0.02
_MOST_BYTES = 4 * 1024**3  # of random weights
_PLAIN = re.compile(r"[\w-][\w.-]*")  # a file or folder name that leads nowhere else


class NotAReport(ValueError):
    """The file is no bug report that this version reads."""


def reproduce(report: Mapping[str, Any], folder: Path, zeros: bool = False) -> tuple[Path | None, Path | None]:
    """Make the files of `report` below `folder`; return the paths of FILE and BASE, None for what it lacks.

    zeros: weights are holes. Raises NotAReport for another schema, names that lead out of `folder`, or
    more random weights than fit a test.
    """
    if report.get("bug_report") != SCHEMA:
        raise NotAReport(f"a bug report of schema {report.get('bug_report')}; this version reads {SCHEMA}")
    size = sum(
        info.nbytes
        for model in (report["file"], report["against"])
        for part in (model or {"parts": []})["parts"]
        for info in _layout(part).values()
    )
    if size > _MOST_BYTES and not zeros:
        raise NotAReport(f"the weights would take {size} bytes; --zeros makes files that take none")
    made = [
        None if report[key] is None else _make_model(report[key], folder / key, zeros) for key in ("file", "against")
    ]
    return made[0], made[1]


def _make_model(model: Mapping[str, Any], folder: Path, zeros: bool) -> Path:
    folder.mkdir(parents=True)
    if model["packaging"] in ("file", "adapter folder"):
        (part,) = model["parts"]
        target = folder / _plain(part["name"])
        _write_part(part, target, zeros)
        if "" in model["configs"]:
            _write_json(folder / "adapter_config.json", model["configs"][""])
        return folder if model["packaging"] == "adapter folder" else target
    if model["packaging"] == "diffusers":
        _write_json(folder / "model_index.json", {})
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for part in model["parts"]:
        groups[part["group"]].append(part)
    for group, parts in groups.items():
        inside = folder / _plain(group.removesuffix("/")) if group else folder
        inside.mkdir(exist_ok=True)
        _write_group(parts, inside, zeros)
        if group in model["configs"]:
            _write_json(inside / "config.json", model["configs"][group])
    return folder


def _write_group(parts: list[Mapping[str, Any]], folder: Path, zeros: bool) -> None:
    """One weight file, or shards with their index."""
    if len(parts) == 1:
        _write_part(parts[0], folder / "model.safetensors", zeros)
        return
    index: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _write_part(part, folder / name, zeros)
        index.update(dict.fromkeys(part["tensors"], name))
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def _write_part(part: Mapping[str, Any], path: Path, zeros: bool) -> None:
    placed, numbers = _layout(part), part["numbers"]
    if part["format"] != "safetensors":
        raw = {
            name: torch.frombuffer(_content(name, info, numbers, zeros), dtype=torch.uint8)
            for name, info in placed.items()
        }
        tensors = {name: view_as(raw[name], info.dtype, info.shape) for name, info in placed.items()}
        is_list = part["format"] == "pickled list"
        torch.save(list(tensors.values()) if is_list else {**tensors, **part["metadata"]}, path)
        return
    header = build_header(placed, part["metadata"])
    with path.open("wb") as file:
        file.write(header)
        for name, info in placed.items():
            if not zeros or name in numbers:
                file.seek(len(header) + info.begin)
                file.write(_content(name, info, numbers, zeros))
        file.truncate(len(header) + max((info.end for info in placed.values()), default=0))


def _layout(part: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """name -> place of the tensors, in the report's order."""
    described = ((name, *text.partition(" ")[::2]) for name, text in part["tensors"].items())
    return lay_out(
        (name, dtype, tuple(int(size) for size in sizes.split("x") if size)) for name, dtype, sizes in described
    )


def _content(name: str, info: TensorInfo, numbers: Mapping[str, Any], zeros: bool) -> bytearray:
    """The bytes of one tensor: the number it had, else random floats; zeros for other dtypes."""
    row = DTYPES[info.dtype]
    if name in numbers:
        number = torch.tensor([float(numbers[name])], dtype=torch.float64).to(torch_dtype(info.dtype))
        return bytearray(number.view(torch.uint8).numpy().tobytes())
    if zeros or row.torch is None or row.kind != "float":
        return bytearray(info.nbytes)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(min(_POOL, max(1, math.prod(info.shape))), generator=generator) * _SPREAD
    pool = values.to(torch_dtype(info.dtype)).view(torch.uint8).numpy().tobytes()
    return bytearray((pool * (info.nbytes // len(pool) + 1))[: info.nbytes])


def _plain(name: str) -> str:
    """`name`, which a stranger wrote, if it stays in its folder."""
    if not _PLAIN.fullmatch(name):
        raise NotAReport(f"{name!r} is not the name of a file in a folder")
    return name


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("report", type=Path, help="what --bug-report wrote")
    parser.add_argument("folder", type=Path, help="a new folder for the files")
    parser.add_argument("--zeros", action="store_true", help="weights that take no disk space")
    arguments = parser.parse_args()
    try:
        file, base = reproduce(json.loads(arguments.report.read_text("utf-8")), arguments.folder, arguments.zeros)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{arguments.report}: {error}")
    words = ["bake", "inspect", str(file), *([] if base is None else ["--against", str(base)])]
    print(shlex.join(words))


if __name__ == "__main__":
    main()
