"""The golden cases under fixtures/golden, as files that bake can be given."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support import FIXTURES, Arrays, load, save

FOLDER = FIXTURES / "golden"
NAMES = sorted(path.name.removesuffix(".adapter.safetensors") for path in FOLDER.glob("*.adapter.safetensors"))


@dataclass(frozen=True)
class Golden:
    """One case."""

    name: str
    base: str
    modules: int  # that the adapter updates
    weights: tuple[float, ...]
    tolerance: float

    @property
    def adapter(self) -> Path:
        return FOLDER / f"{self.name}.adapter.safetensors"

    @property
    def config(self) -> dict[str, Any] | None:
        """adapter_config.json."""
        path = FOLDER / f"{self.name}.adapter_config.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def expected(self, weight: float) -> Arrays:
        """The tensors that change, in float64."""
        place = self.weights.index(weight)
        return {name: values[place] for name, values in load(FOLDER / f"{self.name}.expected.safetensors").items()}

    def write_base(self, folder: Path, dtype: type[np.floating[Any]] = np.float16) -> Path:
        """The base in `dtype`: a file, or a folder where it has a config.json."""
        arrays = {
            name: array.astype(dtype) if array.dtype == np.float64 else array
            for name, array in base_arrays(self.base).items()
        }
        config = FOLDER / "bases" / f"{self.base}.config.json"
        if not config.is_file():
            return save(folder / "base.safetensors", arrays, {"format": "pt"})
        save(folder / "base" / "model.safetensors", arrays, {"format": "pt"})
        shutil.copyfile(config, folder / "base" / "config.json")
        return folder / "base"

    def write_adapter(
        self, folder: Path, arrays: dict[str, NDArray[Any]] | None = None, config: dict[str, Any] | None = None
    ) -> Path:
        """The adapter as its program leaves it, with other tensors or settings if they are given."""
        config = config or self.config
        is_mlx = config is not None and "fine_tune_type" in config
        name = "adapter.safetensors" if config is None else "adapters" if is_mlx else "adapter_model"
        file = folder / "adapter" / Path(name).with_suffix(".safetensors")
        file.parent.mkdir(parents=True)
        if arrays is None:
            shutil.copyfile(self.adapter, file)
        else:
            save(file, arrays, stored(self.adapter)[1])
        if config is None:
            return file
        (file.parent / "adapter_config.json").write_text(json.dumps(config))
        return file.parent


@functools.cache
def base_arrays(base: str) -> Arrays:
    """The tensors of a base; float64, integers as they are."""
    return load(FOLDER / "bases" / f"{base}.safetensors")


def read(name: str) -> Golden:
    """The case `name`."""
    about = json.loads((FOLDER / f"{name}.json").read_text())
    return Golden(name, about["base"], about["modules"], tuple(about["weights"]), about["tolerance"])


def stored(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str] | None]:
    """(tensors as they are stored, metadata) of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a dict


def output_of(folder: Path, base: Path) -> Path:
    """Where the result belongs: what the base is, file or folder."""
    return folder / ("out" if base.is_dir() else "out.safetensors")


def tensors(output: Path) -> Arrays:
    """The tensors of a result, in float64."""
    return load(output / "model.safetensors" if output.is_dir() else output)
