"""An adapter as the user names it: a file, or the folder that a trainer saved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import InputError
from bake.io.checkpoint import read_json_object
from bake.io.files import check_exists
from bake.io.tensorfile import TensorFile, open_tensors

# In the order of preference; each with the configuration that lies beside it.
_FOLDER_FILES = (
    "adapter_model.safetensors",  # PEFT
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",  # diffusers
    "pytorch_lora_weights.bin",
    "adapters.safetensors",  # MLX
)
CONFIG = "adapter_config.json"

_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class AdapterFile:
    """The weights of an adapter and the configuration they need."""

    path: Path  # as the user gave it
    file: TensorFile
    config: dict[str, Any] | None  # adapter_config.json, where there is one
    config_path: Path | None

    @property
    def name(self) -> str:
        """What to call it: the file's name, or the folder's where the file is called like all others."""
        return self.path.name if self.path.is_dir() else self.file.path.name


def has_adapter(folder: Path) -> bool:
    """True if the folder has a file that is called like an adapter's."""
    return any((folder / name).is_file() for name in _FOLDER_FILES)


def open_adapter(path: Path) -> AdapterFile:
    """Open the adapter at `path`: its header is read, its weights are not.

    Raises InputError and its kin for what is missing, unreadable or malformed.
    """
    check_exists(path)
    weights = path
    if path.is_dir():
        present = [path / name for name in _FOLDER_FILES if (path / name).is_file()]
        if not present:
            raise InputError(f"{path}: no adapter here: none of {', '.join(_FOLDER_FILES)}", path=str(path))
        weights = present[0]
    config_path = weights.parent / CONFIG
    has_config = config_path.is_file() and weights.name in _FOLDER_FILES
    config = read_json_object(config_path) if has_config else None
    return AdapterFile(path, open_tensors(weights), config, config_path if has_config else None)


def content_key(file: TensorFile) -> str:
    """A short digest of what the file holds, from its header and 64 samples spread over its data.

    It orders adapters by content, so that the order in which they were named changes nothing; it
    does not prove identity, for which the whole file is hashed.
    """
    digest = hashlib.sha256()
    end = 0
    for name, info in file.tensors.items():
        digest.update(f"{name}\0{info.dtype}\0{info.shape}\0{info.begin}\n".encode())
        end = info.end
    for sample in range(_SAMPLES):
        begin = max(0, end - _SAMPLE_BYTES) * sample // max(1, _SAMPLES - 1)
        buffer = bytearray(min(_SAMPLE_BYTES, end - begin))
        file.read_into(begin, memoryview(buffer))
        digest.update(buffer)
    return digest.hexdigest()[:32]
