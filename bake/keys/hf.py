"""Names and layouts of Hugging Face models, where nothing but a prefix differs from the adapter's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from bake.keys.places import Parameters

Shape = tuple[int, ...]
CONV1D_LEAVES = (".c_attn", ".c_proj", ".c_fc", ".q_attn")  # the layers of GPT-2 that are Conv1D


class Drift(NamedTuple):
    """A constant difference between an adapter's paths and the base's."""

    dropped: str  # prefix that only the adapter has
    added: str  # prefix that only the base has

    def apply(self, path: str) -> str:
        return self.added + path.removeprefix(self.dropped)


def find_drift(paths: Collection[str], known: Collection[str]) -> Drift | None:
    """The one prefix that makes all of `paths` known, by dropping it or by adding it.

    A head class wraps its model under a name (`model.`, `transformer.`, `bert.`) and an adapter
    trained on the one is used on the other. None if no prefix, or more than one, fits all paths.
    """
    if not paths:
        return None
    first = min(paths)
    parts = first.split(".")
    candidates = [Drift("", name[: -len(first)]) for name in known if name.endswith("." + first)]
    candidates += [Drift(".".join(parts[:count]) + ".", "") for count in range(1, len(parts))]
    fitting = [
        drift
        for drift in candidates
        if all(path.startswith(drift.dropped) and drift.apply(path) in known for path in paths)
    ]
    return fitting[0] if len(fitting) == 1 else None


def stores_in_out(modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> bool:
    """True if Linear weights are stored (in, out), as GPT-2's Conv1D does.

    Told by the fused projection c_attn, which makes q, k and v out of one input and is therefore
    wider than tall in that layout; models that took over the name for a Linear have it the other way.
    """
    for path, parameters in modules.items():
        if path.endswith("attn.c_attn") and "weight" in parameters:
            shape = shapes[parameters["weight"][0].tensor]
            return len(shape) == 2 and shape[1] > shape[0]
    return False
