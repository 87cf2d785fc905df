"""A recorded recipe back into a Recipe: its inputs are found by name, size and SHA-256."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from bake.errors import InputError, UsageError
from bake.io.adapter import CONFIG
from bake.io.digest import digest_file
from bake.io.jsontext import shortened
from bake.plan.parameters import setting_from_json
from bake.plan.recipe import AdapterChoice, Layers, MergeChoice, Recipe
from bake.plan.record import RECIPE_SCHEMA
from bake.plan.selection import Selection

_LONGEST_NAME = 255  # in messages
_MOST_ENTRIES = 200_000  # looked at below the folders searched


class _Library:
    """The files below some folders, by size."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._by_size: dict[int, list[Path]] = {}
        self._digests: dict[Path, str] = {}
        seen = 0
        for folder in dict.fromkeys(os.path.realpath(path) for path in folders):
            for parent, _, names in os.walk(folder):
                seen += len(names)
                if seen > _MOST_ENTRIES:
                    return
                for name in names:
                    path = Path(parent) / name
                    try:
                        self._by_size.setdefault(path.stat().st_size, []).append(path)
                    except OSError:
                        continue  # a dangling link

    def find(self, wanted: dict[str, Any]) -> list[Path]:
        """Files with the recorded size and SHA-256; those with the recorded name first."""
        name = _name(wanted).rpartition("/")[2]
        candidates = sorted(set(self._by_size.get(wanted["size"], [])), key=lambda path: (path.name != name, path))
        return [path for path in candidates if self.has(path, wanted)]

    def has(self, path: Path, wanted: dict[str, Any]) -> bool:
        if not os.path.isfile(path) or path.stat().st_size != wanted["size"]:
            return False
        if path not in self._digests:
            self._digests[path] = digest_file(path).sha256
        return self._digests[path] == str(wanted["sha256"])


def recipe_from_record(record: dict[str, Any], folders: Sequence[Path], source: str) -> Recipe:
    """The recipe that `record` describes, its inputs found below `folders`.

    Raises InputError if an input is not there, or the record is not one that bake wrote.
    """
    try:
        if record["schema"] != RECIPE_SCHEMA:
            raise InputError(f"{source}: a recipe of schema {record['schema']}, this bake reads {RECIPE_SCHEMA}")
        library = _Library(folders)
        base: Path | MergeChoice
        also: tuple[Path, ...] = ()
        if "merge" in record:
            base = _find_models(record["merge"], library)
        else:
            base, also = _find_base(record["base"], library)
        settings = record["settings"]
        return Recipe(
            base=base,
            adapters=tuple(_find_adapter(entry, library) for entry in record["adapters"]),
            also=also,
            replaced={str(name): _find_base(entry, library)[0] for name, entry in record.get("replaced", {}).items()},
            layout=str(settings.get("layout", "keep")),
            like=_find_folder(record["like"], library) if "like" in record else None,
            shard_size=None if settings.get("shard_size") is None else int(settings["shard_size"]),
            drop=tuple(str(name) for name in settings.get("drop", ())),
            ema=str(settings.get("ema", "keep")),
            dtype=_dtype(settings["dtype"]),
            only=tuple(str(name) for name in settings["only"]),
            allow_unmatched=bool(settings["allow_unmatched"]),
            embeddings=str(settings["embeddings"]),
            rounding=str(settings.get("rounding", "nearest")),
            seed=int(settings.get("seed", 0)),
            allow_nonfinite_base=bool(settings.get("allow_nonfinite_base", False)),
        )
    except _NotFound as missing:
        where = ", ".join(str(folder) for folder in folders)
        raise InputError(
            f"{source}: its recipe needs {missing.name} (SHA-256 {missing.sha256[:12]}...), which is not below "
            f"{where}. Name the folder that has it with --search.",
            name=missing.name,
            sha256=missing.sha256,
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, UsageError) as error:
        raise InputError(f"{source}: its recipe is malformed: {type(error).__name__} {error}") from None


def _find_models(entry: dict[str, Any], library: _Library) -> MergeChoice:
    """The merge that is recorded as `entry`."""
    models = entry["models"]
    return MergeChoice(
        method=str(entry["method"]),
        models=tuple(_find_base(model, library)[0] for model in models if model["role"] != "base"),
        base=next((_find_base(model, library)[0] for model in models if model["role"] == "base"), None),
        parameters={str(name): setting_from_json(setting) for name, setting in entry["parameters"].items()},
        only=tuple(str(name) for name in entry["only"]),
        allow_missing=bool(entry["allow_missing"]),
        layers=tuple(Layers.parse(str(each)) for each in entry.get("layers", ())),
    )


def _dtype(recorded: Any) -> str | dict[str, str]:
    if isinstance(recorded, dict):
        return {str(component): str(dtype) for component, dtype in recorded.items()}
    return str(recorded)


class _NotFound(Exception):
    def __init__(self, wanted: dict[str, Any]) -> None:
        self.name, self.sha256 = str(wanted["name"])[:_LONGEST_NAME], str(wanted["sha256"])


def _name(wanted: dict[str, Any]) -> str:
    """The recorded name of a file below its folder; raises ValueError for one that leads out of it."""
    name: str = wanted["name"]
    if ".." in name.split("/") or PureWindowsPath(name).root or PurePath(name).anchor:
        raise ValueError(f"the name {shortened(name)} leads out of its folder")
    return name


def _find_base(entry: dict[str, Any], library: _Library) -> tuple[Path, tuple[Path, ...]]:
    files = entry["files"]
    if entry["packaging"] in ("file", "stack"):
        found = []
        for wanted in files:
            candidates = library.find(wanted)
            if not candidates:
                raise _NotFound(wanted)
            found.append(candidates[0])
        return found[0], tuple(found[1:])
    return _find_folder(entry, library), ()


def _find_folder(entry: dict[str, Any], library: _Library) -> Path:
    files = entry["files"]
    for first in library.find(files[0]):
        depth = _name(files[0]).count("/")
        root = first.parents[depth]
        if all(library.has(root / _name(wanted), wanted) for wanted in files[1:]):
            return root
    raise _NotFound({"name": entry["name"], "sha256": files[0]["sha256"]})


def _find_adapter(entry: dict[str, Any], library: _Library) -> AdapterChoice:
    weights, *config = entry["files"]
    for path in library.find(weights):
        if all(library.has(path.parent / CONFIG, wanted) for wanted in config):
            te, unet, limit = entry.get("te"), entry.get("unet"), entry.get("dyn")
            selected = entry.get("selection")
            return AdapterChoice(
                path=path,
                weight=float(entry["weight"]),
                te=None if te is None else float(te),
                unet=None if unet is None else float(unet),
                rank_limit=None if limit is None else int(limit),
                selection=None if selected is None else Selection.from_json(selected),
            )
    raise _NotFound(weights)
