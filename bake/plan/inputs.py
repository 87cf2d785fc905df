"""The files that a plan reads, as they are when it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bake.io.adapter import AdapterFile
from bake.io.tensorfile import TensorFile
from bake.plan.model import Input


def input_of(file: TensorFile, role: Literal["base", "adapter", "model", "component"]) -> Input:
    """A file as it is now."""
    return Input(file.path, file.size, file.modified, file.changed, file.inode, role)


def input_at(path: Path, role: Literal["config", "like"]) -> Input:
    """A file that is not made of tensors, as it is now."""
    status = path.stat()
    return Input(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, role)


def inputs_of(source: AdapterFile) -> list[Input]:
    """The files of an adapter as they are now: its weights, and its configuration if it has one."""
    inputs = [input_of(source.file, "adapter")]
    if source.config_path is not None:
        inputs.append(input_at(source.config_path, "config"))
    return inputs
