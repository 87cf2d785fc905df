"""What the output says about itself: ModelSpec, A1111's merge keys, and bake's own replayable recipe.

The record names its inputs by SHA-256. Digests have a fixed length, so how long the header is at most is known
before they are; nothing here depends on the time, the machine or the output's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bake.identify.checkpoint import BaseIdentity
from bake.identify.families import FAMILIES
from bake.io.jsontext import is_deep
from bake.io.known import Digest
from bake.plan.model import AdapterUse, FilePlan, Merging, ModelUse, Plan

RECIPE_KEY = "bake.recipe"
RECIPE_SCHEMA = 1

# Keys that describe the file they were written into, and are wrong in any other.
_STALE_PREFIXES = ("ss_", "sshs_")
_STALE = {
    *("modelspec.hash_sha256", "modelspec.thumbnail", "modelspec.merged_from", "modelspec.title", "modelspec.date"),
    *("sd_merge_recipe", "sd_merge_models", "prompt", "workflow", RECIPE_KEY),
}
_FORMATS = {"pt", "tf", "flax", "mlx"}
_IMPLEMENTATIONS = {
    "original": "https://github.com/Stability-AI/generative-models",
    "diffusers": "https://github.com/huggingface/diffusers",
}


def carried_metadata(base: Mapping[str, str], identity: BaseIdentity, added: Mapping[str, str]) -> dict[str, str]:
    """The base's metadata without what is stale, with the family's ModelSpec identity and the user's keys."""
    kept = {key: value for key, value in base.items() if key not in _STALE and not key.startswith(_STALE_PREFIXES)}
    if kept.get("format") not in _FORMATS:
        kept["format"] = "pt"
    known = FAMILIES.get(identity.family)
    architecture = known.architecture(identity.variant) if known is not None else ""
    if architecture:
        kept.setdefault("modelspec.sai_model_spec", "1.0.0")
        kept.setdefault("modelspec.architecture", architecture)
        kept.setdefault("modelspec.implementation", _IMPLEMENTATIONS[identity.layout])
    return kept | dict(added)


def history_of(base: Mapping[str, str]) -> dict[str, str]:
    """The records of earlier work on the base, among its metadata."""
    return {key: base[key] for key in (RECIPE_KEY, "sd_merge_recipe", "sd_merge_models") if key in base}


def file_metadata(plan: Plan, file: FilePlan, digests: Sequence[Digest] | None, version: str) -> dict[str, str]:
    """The complete metadata of one output file; with placeholders where `digests` is None.

    digests: one for each of `plan.inputs`.
    """
    if not (plan.record and file.is_recorded):
        return dict(file.metadata)
    known = digests if digests is not None else [Digest(f"{place:064}", "0" * 8) for place in range(len(plan.inputs))]
    if plan.merge is None:
        recorded = {RECIPE_KEY: _dump(recipe_record(plan, known, version, file.history))}
    else:
        recorded = {RECIPE_KEY: _dump(merge_record(plan, plan.merge, known, version))}
    family = FAMILIES.get(plan.family)
    if family is not None and family.image:
        if plan.merge is None:
            recorded |= _for_web_uis(plan, known, file.history)
        else:
            recorded |= _merge_for_web_uis(plan.merge, known)
    # A file's name may be bytes that are no Unicode, which a header cannot hold.
    recorded = {key: text.encode("utf-8", "replace").decode("utf-8") for key, text in recorded.items()}
    return recorded | dict(file.metadata)  # what the user gave with --metadata has the last word


def recipe_record(plan: Plan, digests: Sequence[Digest], version: str, history: Mapping[str, str]) -> dict[str, Any]:
    """bake's own record: inputs by name, size and SHA-256, weights and settings; enough for a replay."""

    def described(place: int, name: str = "") -> dict[str, Any]:
        source = plan.inputs[place]
        return {"name": name or source.path.name, "size": source.size, "sha256": digests[place].sha256}

    # The first inputs are the base's files, one for each file of the output.
    files = [described(place, file.relative) for place, file in enumerate(plan.files)]
    base: dict[str, Any] = {"name": plan.base.name, "packaging": plan.packaging, "files": files}
    earlier = _parse(history.get(RECIPE_KEY))
    if earlier is not None:
        base["recipe"] = earlier
    return {
        "schema": RECIPE_SCHEMA,
        "version": version,
        "family": plan.family,
        "base": base,
        "adapters": [
            {
                "name": use.name,
                "files": [described(place) for place in (use.input, use.config) if place is not None],
                **_weights(use),
            }
            for use in plan.adapters
        ],
        "settings": plan.settings,
        "components": {name: [part.matched, part.total] for name, part in plan.components.items()},
    }


def _weights(use: AdapterUse) -> dict[str, Any]:
    chosen: dict[str, Any] = {"weight": use.weight}
    for name, value in (("te", use.te), ("unet", use.unet), ("dyn", use.rank_limit)):
        if value is not None:
            chosen[name] = value
    if use.selection is not None:
        chosen["selection"] = use.selection.to_json()
    return chosen


def _for_web_uis(plan: Plan, digests: Sequence[Digest], history: Mapping[str, str]) -> dict[str, str]:
    """A1111's sd_merge_recipe and sd_merge_models, and ModelSpec's title and merged_from.

    Source: AUTOMATIC1111 modules/extras.py run_modelmerger; later merges there expect
    sd_merge_models to be an object by full SHA-256.
    """
    base, digest = plan.inputs[0].path, digests[0]
    parents = _parse(history.get("sd_merge_models")) or {}
    recipe = {
        "type": "bake",
        "primary_model_hash": digest.sha256,
        "secondary_model_hash": None,
        "tertiary_model_hash": None,
        "interp_method": "LoRA",
        "loras": [{"name": use.name, "sha256": digests[use.input].sha256, **_weights(use)} for use in plan.adapters],
    }
    models = {
        **parents,
        digest.sha256: {
            "name": base.name,
            "legacy_hash": digest.legacy,
            "sd_merge_recipe": _parse(history.get("sd_merge_recipe")),
        },
    }
    named = [f"{_stem(use.name)} ({use.weight:g})" for use in plan.adapters]
    return {
        "sd_merge_recipe": _dump(recipe),
        "sd_merge_models": _dump(models),
        "modelspec.title": " + ".join([_stem(base.name), *named]),
        "modelspec.merged_from": ", ".join([_stem(base.name), *(_stem(use.name) for use in plan.adapters)]),
    }


def merge_record(plan: Plan, merge: Merging, digests: Sequence[Digest], version: str) -> dict[str, Any]:
    """The same for a merge: its models, in the order in which they were merged, its method and parameters."""

    def described(model: ModelUse, place: int) -> dict[str, Any]:
        source = plan.inputs[place]
        is_file = source.path == model.path
        name = source.path.name if is_file else source.path.relative_to(model.path).as_posix()
        return {"name": name, "size": source.size, "sha256": digests[place].sha256}

    models = []
    for model in merge.models:
        files = [described(model, place) for place in range(*model.inputs)]
        entry = {"name": model.path.name, "role": model.role, "packaging": model.packaging, "files": files}
        earlier = _parse(model.history.get(RECIPE_KEY))
        models.append(entry if earlier is None else {**entry, "recipe": earlier})
    return {
        "schema": RECIPE_SCHEMA,
        "version": version,
        "family": plan.family,
        "method": merge.method,
        "models": models,
        "parameters": merge.parameters,
        "settings": plan.settings,
        "components": {name: [part.matched, part.total] for name, part in plan.components.items()},
    }


# What AUTOMATIC1111 calls the methods that it has too; it has no others.
_INTERPOLATIONS = {
    "weighted_sum": "Weighted sum",
    "add_difference": "Add difference",
    "passthrough": "No interpolation",
}


def _merge_for_web_uis(merge: Merging, digests: Sequence[Digest]) -> dict[str, str]:
    """The same keys for a merge, as AUTOMATIC1111 writes them for the first three models; source as above."""
    used = [(model, digests[model.inputs[0]]) for model in merge.models]
    primary, secondary, tertiary = ([digest.sha256 for _, digest in used] + [None, None])[:3]
    recipe = {
        "type": "bake",
        "primary_model_hash": primary,
        "secondary_model_hash": secondary,
        "tertiary_model_hash": tertiary,
        "interp_method": _INTERPOLATIONS.get(merge.method, merge.method),
        "multiplier": merge.parameters.get("alpha"),
        "models": [{"role": model.role, "sha256": digest.sha256} for model, digest in used],
        "parameters": merge.parameters,
    }
    models: dict[str, Any] = {}
    for model in merge.models:
        models |= _parse(model.history.get("sd_merge_models")) or {}
    for model, digest in used:
        models[digest.sha256] = {
            "name": model.path.name,
            "legacy_hash": digest.legacy,
            "sd_merge_recipe": _parse(model.history.get("sd_merge_recipe")),
        }
    names = [_stem(model.path.name) for model, _ in used]
    return {
        "sd_merge_recipe": _dump(recipe),
        "sd_merge_models": _dump(models),
        "modelspec.title": f"{merge.method}: {' + '.join(names)}",
        "modelspec.merged_from": ", ".join(names),
    }


def _stem(name: str) -> str:
    return name.removesuffix(".safetensors")


def _dump(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()  # a file may have a name that is no text


def _parse(text: str | None) -> dict[str, Any] | None:
    """The JSON object in another tool's metadata value; None if there is none or it is something else."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and not is_deep(found) else None
