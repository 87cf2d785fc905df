"""bake env"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import click

from bake import __version__
from bake.cli.options import output_options
from bake.cli.output import Output
from bake.documents import SCHEMA

_PACKAGES = ("torch", "safetensors", "numpy", "click", "tqdm", "PyYAML")


@click.command("env")
@output_options
def command(as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print versions and devices, for bug reports."""
    out = Output(as_json, quiet, verbose)
    facts = _facts()
    if as_json:
        out.document({"schema": SCHEMA, **facts})
        return
    for name, value in facts.items():
        out.line(name, value if isinstance(value, str) else ", ".join(f"{k} {v}" for k, v in value.items()))


def _facts() -> dict[str, Any]:
    import torch

    from bake.api import loops

    devices = {"cpu": f"{os.cpu_count()} cores"}
    for number in range(torch.cuda.device_count()):
        devices[f"cuda:{number}"] = torch.cuda.get_device_name(number)
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return {
        "bake": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "loops": loops(),
        "devices": devices,
    }
