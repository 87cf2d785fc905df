"""What has to be the same for one run to go on with what another finished."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from bake.dtypes import DTYPES
from bake.keys.factors import is_plain
from bake.plan.model import Plan, TensorPlan


def run_identity(plan: Plan, device: str, version: str) -> dict[str, Any]:
    """All that the bytes of the output follow from, as JSON data.

    device: as it was asked for. version: of bake.
    """
    return {
        "version": version,
        "inputs": {
            str(source.path): [source.size, source.modified, source.changed, source.inode] for source in plan.inputs
        },
        "plan": plan.digest(),
        "numbers": None if _is_defined(plan) else _makers(device),
    }


def _is_defined(plan: Plan) -> bool:
    """True if every element is defined to the last bit, whoever computes it: see docs/numerics.md."""
    return plan.rounding != "fast" and all(_is_exact(tensor) for _, tensor in plan.tensors() if tensor.is_computed)


def _is_exact(tensor: TensorPlan) -> bool:
    return DTYPES[tensor.dtype].bits <= 16 and all(is_plain(term.algorithm, term.factors) for term in tensor.terms)


def _makers(device: str) -> dict[str, str]:
    """What the last bits of everything else depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    return {**versions, "device": device, "machine": platform.node()}
