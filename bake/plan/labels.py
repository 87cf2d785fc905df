"""What an adapter that bake made says about itself: kohya's and ModelSpec's keys, and the record of how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bake.identify.families import FAMILIES
from bake.io.known import Digest
from bake.plan.model import Input

RECORD_KEY = "bake.adapter"
RECORD_SCHEMA = 1

# What kohya's scripts write into ss_base_model_version. Source: sd-scripts library/sdxl_model_util.py, train_util.py,
# flux_utils.py, sd3_utils.py. Other trainers write the name of the family.
_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "sd3": "sd3m", "flux": "flux1"}
# Keys that describe the bytes of the file they were written into.
_STALE = ("sshs_", "ss_network_", "modelspec.hash_sha256", "modelspec.date", "lora_adapter_metadata", RECORD_KEY)


def network_keys(scaled: Iterable[tuple[int, float]]) -> dict[str, str]:
    """kohya's keys for LoRA modules of these (rank, alpha); "Dynamic" where they differ, as its own resizing says."""
    ranks, alphas = ({f"{each:g}" for each in column} for column in zip(*scaled, strict=True))
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
    }


def family_keys(family: str, variant: str | None, title: str) -> dict[str, str]:
    """What tells people and programs which base an adapter is for."""
    known = FAMILIES.get(family)
    if known is None or not known.image:
        return {"format": "pt"}
    keys = {"format": "pt", "modelspec.title": title}
    architecture = known.architecture(variant)
    if architecture:
        keys |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{architecture}/lora"}
    keys["ss_base_model_version"] = _VERSIONS.get(family, family)
    return keys | ({"ss_v2": "True"} if family == "sd2" else {})


def carried_keys(metadata: Mapping[str, str]) -> dict[str, str]:
    """An adapter's metadata without what is only true of its own file."""
    return {"format": "pt"} | {key: value for key, value in metadata.items() if not key.startswith(_STALE)}


def record(
    verb: str, version: str, inputs: Sequence[Input], digests: Sequence[Digest], settings: Mapping[str, Any]
) -> dict[str, str]:
    """How the adapter was made: inputs by name, size and SHA-256, settings, and the error that is left."""
    described = [
        {"name": source.path.name, "size": source.size, "sha256": digest.sha256}
        for source, digest in zip(inputs, digests, strict=True)
    ]
    content = {"schema": RECORD_SCHEMA, "version": version, "verb": verb, "inputs": described, "settings": settings}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return {RECORD_KEY: text.encode("utf-8", "replace").decode()}
