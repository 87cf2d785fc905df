"""Fuse LoRA-type adapters into model checkpoints offline, so that nothing downstream needs LoRA support.

    import bake
    bake.fuse("base.safetensors", [("style.safetensors", 0.8)], output="out.safetensors")

Names are loaded when first used: importing bake does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bake.adapter_api import AdapterResult, combine, extract, resize
    from bake.api import Result, build_plan, check_output, fuse, run_plan
    from bake.converting import convert
    from bake.errors import BakeError
    from bake.inspection import inspect
    from bake.merging import build_merge_plan, merge
    from bake.plan.model import Plan
    from bake.plan.recipe import AdapterChoice
    from bake.plan.selection import Selection
    from bake.running import run_recipe
    from bake.undoing import Restored, undo
    from bake.verify.report import Report

__version__ = "0.1.0"

__all__ = [
    "AdapterChoice",
    "AdapterResult",
    "BakeError",
    "Plan",
    "Report",
    "Restored",
    "Result",
    "Selection",
    "build_merge_plan",
    "build_plan",
    "check_output",
    "combine",
    "convert",
    "extract",
    "fuse",
    "inspect",
    "merge",
    "resize",
    "run_plan",
    "run_recipe",
    "undo",
]

_HOMES = {
    "AdapterChoice": "bake.plan.recipe",
    "AdapterResult": "bake.adapter_api",
    "BakeError": "bake.errors",
    "Plan": "bake.plan.model",
    "Report": "bake.verify.report",
    "Restored": "bake.undoing",
    "Result": "bake.api",
    "Selection": "bake.plan.selection",
    "build_merge_plan": "bake.merging",
    "build_plan": "bake.api",
    "check_output": "bake.api",
    "combine": "bake.adapter_api",
    "convert": "bake.converting",
    "extract": "bake.adapter_api",
    "fuse": "bake.api",
    "inspect": "bake.inspection",
    "merge": "bake.merging",
    "resize": "bake.adapter_api",
    "run_plan": "bake.api",
    "run_recipe": "bake.running",
    "undo": "bake.undoing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bake' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
