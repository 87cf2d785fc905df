"""The files that a plan reads, as they are when it is made."""

from __future__ import annotations

from typing import Literal

from bake.io.adapter import AdapterFile
from bake.io.tensorfile import TensorFile
from bake.plan.model import Input


def input_of(file: TensorFile, role: Literal["base", "adapter", "model", "component"]) -> Input:
    """A file as it is now."""
    return Input(file.path, file.size, file.modified, file.changed, file.inode, role)


def inputs_of(source: AdapterFile) -> list[Input]:
    """The files of an adapter as they are now: its weights, and its configuration if it has one."""
    inputs = [input_of(source.file, "adapter")]
    if source.config_path is not None:
        status = source.config_path.stat()
        known = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
        inputs.append(Input(source.config_path, *known, "config"))
    return inputs
