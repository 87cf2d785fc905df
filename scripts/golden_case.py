"""One golden case, and how cases are put together from what happens to single modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from golden_bases import BASES, Arrays, base_arrays
from numpy.typing import NDArray

WEIGHTS = (1.0, 0.7, -0.5)
TOLERANCE = 1e-6  # largest difference to the expected values, which are of the order of 1

# At which weight -> the parameters as the tool leaves them: (its module path, "weight" or "bias") -> values
Outcome = Callable[[float], Mapping[tuple[str, str], "NDArray[np.float64]"]]


@dataclass(frozen=True)
class Case:
    """An adapter file and what it makes of its base."""

    name: str
    base: str
    tool: str
    expected_from: str
    settings: Mapping[str, Any]
    modules: int  # that the adapter updates
    adapter: bytes  # the safetensors file
    expected: Arrays  # tensor of the base -> (weights, *shape), float32
    config: Mapping[str, Any] | None = None  # adapter_config.json
    notes: Sequence[str] = field(default_factory=tuple)

    def description(self) -> str:
        """What case.json says."""
        about = {
            "name": self.name,
            "tool": self.tool,
            "base": self.base,
            "settings": dict(self.settings),
            "modules": self.modules,
            "weights": list(WEIGHTS),
            "expected": "float32, axis 0 runs over the weights; only the tensors that change",
            "expected_from": self.expected_from,
            "notes": list(self.notes),
            "tolerance": TOLERANCE,
        }
        return json.dumps(about, indent=1) + "\n"


def interpolated(outcome: Outcome, base: str) -> Outcome:
    """From the result at weight 1, the straight line between it and the base: W + s (W1 - W)."""

    def at(weight: float) -> Mapping[tuple[str, str], NDArray[np.float64]]:
        before, after = Changes(base), outcome(1.0)
        return {
            (path, parameter): before.of(path, parameter) + weight * (values - before.of(path, parameter))
            for (path, parameter), values in after.items()
        }

    return at


class Changes:
    """The tensors of a base in float64, changed module by module under the names a trainer uses."""

    def __init__(self, base: str) -> None:
        self._base = BASES[base]
        self._before = {name: array.astype(np.float64) for name, array in base_arrays(base).items()}
        self.tensors = {name: array.copy() for name, array in self._before.items()}

    def of(self, path: str, parameter: str) -> NDArray[np.float64]:
        """What a parameter was before."""
        part = self._base.part(path)
        found = self._before[f"{part.module}.{parameter}"]
        return found if part.rows is None else found[slice(*part.rows)]

    def change(self, path: str, parameter: str, values: NDArray[np.float64]) -> None:
        """Change a parameter; nothing happens to one that the base does not have."""
        part = self._base.part(path)
        found = self.tensors[f"{part.module}.{parameter}"]
        (found if part.rows is None else found[slice(*part.rows)])[...] = values.reshape(self.of(path, parameter).shape)

    def touched(self) -> set[str]:
        """The tensors that are no longer what they were."""
        return {name for name, array in self.tensors.items() if not np.array_equal(array, self._before[name])}


def expected_of(base: str, outcome: Outcome) -> Arrays:
    """The tensors that `outcome` changes at any weight, with axis 0 for the weights, in float32."""
    results = []
    for weight in WEIGHTS:
        changes = Changes(base)
        for (path, parameter), values in outcome(weight).items():
            changes.change(path, parameter, values)
        results.append(changes)
    touched = sorted({name for result in results for name in result.touched()})
    return {name: np.stack([result.tensors[name] for result in results]).astype(np.float32) for name in touched}
