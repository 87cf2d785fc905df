"""Write the golden cases under fixtures/golden, or check that they are up to date.

    python scripts/make_golden.py [--check]

A case is an adapter, a small base and what the adapter makes of it at several weights, by the
trainer's own library. Values depend on names alone, so every machine makes the same; --check compares
them with a tolerance, as libraries may round otherwise. Cases whose library is missing are left alone.
Takes about ten seconds, most of which the imports need.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from golden_bases import BASES, Arrays, base_arrays
from golden_case import TOLERANCE, Case
from safetensors.numpy import load, save

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "golden"
_MAKERS = ("golden_formula", "golden_lycoris", "golden_peft", "golden_diffusers")
_VERSIONS = ("tool", "peft_version")  # entries of JSON files that may differ

Content = bytes | str


def make_bases() -> Iterator[tuple[Path, Content]]:
    """(path, content) of every base."""
    for name, base in BASES.items():
        yield FOLDER / "bases" / f"{name}.safetensors", save(base_arrays(name), {"format": "pt"})
        if base.config:
            yield FOLDER / "bases" / f"{name}.config.json", json.dumps(base.config, indent=1) + "\n"


def make_cases() -> Iterator[Case]:
    """Every case whose library is installed; the others are named on stderr."""
    for maker in _MAKERS:
        try:
            yield from import_module(maker).cases()
        except ImportError as missing:
            print(f"{maker}: left alone, {missing}", file=sys.stderr)


def files_of(case: Case) -> Iterator[tuple[Path, Content]]:
    """(path, content) of every file of a case."""
    yield FOLDER / f"{case.name}.json", case.description()
    yield FOLDER / f"{case.name}.adapter.safetensors", case.adapter
    yield FOLDER / f"{case.name}.expected.safetensors", save(case.expected)
    if case.config is not None:
        yield FOLDER / f"{case.name}.adapter_config.json", json.dumps(case.config, indent=0, sort_keys=True) + "\n"


def is_current(path: Path, content: Content) -> bool:
    """True if the file at `path` says what `content` says."""
    if not path.is_file():
        return False
    if isinstance(content, str):
        return _without_versions(path.read_text()) == _without_versions(content)
    return _equal(_read(path.read_bytes()), _read(content))


def _without_versions(text: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(text).items() if key not in _VERSIONS}


def _read(content: bytes) -> tuple[dict[str, str], dict[str, str], Arrays]:
    """(metadata, dtypes, values) of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    return metadata, {name: entry["dtype"] for name, entry in header.items()}, load(content)


def _equal(found: tuple[Any, Any, Arrays], wanted: tuple[Any, Any, Arrays]) -> bool:
    return found[:2] == wanted[:2] and all(
        found[2][name].shape == array.shape
        and np.allclose(found[2][name].astype(np.float64), array.astype(np.float64), rtol=0, atol=TOLERANCE)
        for name, array in wanted[2].items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if a file is stale")
    check = parser.parse_args().check
    warnings.simplefilter("ignore")  # the libraries' own
    logging.disable(logging.WARNING)
    files = [*make_bases(), *(file for case in make_cases() for file in files_of(case))]
    stale = [path for path, content in files if not is_current(path, content)]
    if check:
        if stale:
            sys.exit(f"{len(stale)} files are stale, e.g. {stale[0]}: run python scripts/make_golden.py")
        print(f"{len(files)} files are current")
        return
    contents = dict(files)
    for path in stale:  # those that only round otherwise stay as they are
        content = contents[path]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        print(path.relative_to(FOLDER.parent.parent))


if __name__ == "__main__":
    main()
