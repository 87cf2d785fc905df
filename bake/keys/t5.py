"""T5 text encoders: Hugging Face names everywhere, and an embedding that may be stored twice."""

from __future__ import annotations

from collections.abc import Mapping

from bake.keys.places import Parameters

_EMBEDDINGS = ("shared", "encoder.embed_tokens")


def aliases(modules: Mapping[str, Parameters], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameters]:
    """Both names of the tied embedding, each for all stored copies of it, so that they stay equal."""
    copies = [modules[name]["weight"][0] for name in _EMBEDDINGS if "weight" in modules.get(name, {})]
    return {name: {"weight": tuple(copies)} for name in _EMBEDDINGS} if copies else {}
