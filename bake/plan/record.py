"""What the output says about itself: ModelSpec, A1111's merge keys, and bake's own replayable recipe.

The record names its inputs by SHA-256. Digests have a fixed length, so how long the header is at most is known
before they are; nothing here depends on the time, the machine or the output's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    recorded = {RECIPE_KEY: _dump(recipe_record(plan, known, version, file.history))}
    family = FAMILIES.get(plan.family)
    if family is not None and family.image:
        recorded |= _for_web_uis(plan, known, file.history)
    # A file's name may be bytes that are no Unicode, which a header cannot hold.
    recorded = {key: text.encode("utf-8", "replace").decode("utf-8") for key, text in recorded.items()}
    return recorded | dict(file.metadata)  # what the user gave with --metadata has the last word


def recipe_record(plan: Plan, digests: Sequence[Digest], version: str, history: Mapping[str, str]) -> dict[str, Any]:
    """bake's own record: inputs by name, size and SHA-256, weights and settings; enough for a replay.

    digests: of `plan.inputs`. history: the records of earlier work on the base, if that is one checkpoint.
    """
    if plan.merge is None:
        count = sum(source.role == "base" for source in plan.inputs)
        base = _checkpoint(plan, plan.base, plan.base_packaging, (0, count), digests, history)
    else:
        base = _merge(plan, plan.merge, digests)
    replaced = {
        each.component: _checkpoint(plan, each.path, each.packaging, each.inputs, digests, {}) for each in plan.replaced
    }
    return {
        "schema": RECIPE_SCHEMA,
        "version": version,
        "family": plan.family,
        ("base" if plan.merge is None else "merge"): base,
        **({"replaced": replaced} if replaced else {}),
        "adapters": [
            {
                "name": use.name,
                "files": [
                    _described(plan, place, digests, plan.inputs[place].path.name)
                    for place in (use.input, use.config)
                    if place is not None
                ],
                **_weights(use),
            }
            for use in plan.adapters
        ],
        **({} if plan.like is None else {"like": _like(plan, plan.like, digests)}),
        "settings": plan.settings,
        "components": {name: [part.matched, part.total] for name, part in plan.components.items()},
    }


def _merge(plan: Plan, merge: Merging, digests: Sequence[Digest]) -> dict[str, Any]:
    """A merge: its models, in the order in which they were merged, its method and parameters."""
    return {
        "method": merge.method,
        "models": [
            {
                "role": model.role,
                **_checkpoint(plan, model.path, model.packaging, model.inputs, digests, model.history),
            }
            for model in merge.models
        ],
        "parameters": merge.parameters,
        "only": list(merge.only),
        "allow_missing": merge.allow_missing,
        **({"layers": list(merge.layers)} if merge.layers else {}),
    }


def _checkpoint(
    plan: Plan,
    root: Path,
    packaging: str,
    inputs: tuple[int, int],
    digests: Sequence[Digest],
    history: Mapping[str, str],
) -> dict[str, Any]:
    """A checkpoint with its files and, if it has one, its own record. inputs: [first, past the last) place of them."""
    is_folder = packaging in ("sharded", "diffusers")
    files = []
    for place in range(*inputs):
        path = plan.inputs[place].path
        name = path.relative_to(root).as_posix() if is_folder else path.name
        files.append(_described(plan, place, digests, name))
    entry: dict[str, Any] = {"name": root.name, "packaging": packaging, "files": files}
    earlier = _parse(history.get(RECIPE_KEY))
    return entry if earlier is None else {**entry, "recipe": earlier}


def _like(plan: Plan, like: Path, digests: Sequence[Digest]) -> dict[str, Any]:
    """The folder whose side files were taken, by what was read of it."""
    places = [place for place, source in enumerate(plan.inputs) if source.role == "like"]
    names = {place: plan.inputs[place].path.relative_to(like).as_posix() for place in places}
    return {"name": like.name, "files": [_described(plan, place, digests, names[place]) for place in places]}


def _described(plan: Plan, place: int, digests: Sequence[Digest], name: str) -> dict[str, Any]:
    return {"name": name, "size": plan.inputs[place].size, "sha256": digests[place].sha256}


def _weights(use: AdapterUse) -> dict[str, Any]:
    chosen: dict[str, Any] = {"weight": use.weight}
    for name, value in (("te", use.te), ("unet", use.unet), ("dyn", use.rank_limit)):
        if value is not None:
            chosen[name] = value
    if use.selection is not None:
        chosen["selection"] = use.selection.to_json()
    return chosen


# What AUTOMATIC1111 calls the methods that it has too; it has no others.
_INTERPOLATIONS = {
    "weighted_sum": "Weighted sum",
    "add_difference": "Add difference",
    "passthrough": "No interpolation",
}


def _for_web_uis(plan: Plan, digests: Sequence[Digest], history: Mapping[str, str]) -> dict[str, str]:
    """A1111's sd_merge_recipe and sd_merge_models, and ModelSpec's title and merged_from.

    Source: AUTOMATIC1111 modules/extras.py run_modelmerger, for up to three models; later merges there expect
    sd_merge_models to be an object by full SHA-256.
    """
    merge, base = plan.merge, plan.inputs[0].path.name
    used = [(base, 0, history)] if merge is None else [_used(model) for model in merge.models]
    primary, secondary, tertiary = ([digests[place].sha256 for _, place, _ in used] + [None, None])[:3]
    recipe: dict[str, Any] = {
        "type": "bake",
        "primary_model_hash": primary,
        "secondary_model_hash": secondary,
        "tertiary_model_hash": tertiary,
        "interp_method": "LoRA" if merge is None else _INTERPOLATIONS.get(merge.method, merge.method),
    }
    if merge is not None:
        models = zip(merge.models, used, strict=True)
        recipe["multiplier"] = merge.parameters.get("alpha")
        recipe["models"] = [{"role": model.role, "sha256": digests[place].sha256} for model, (_, place, _) in models]
        recipe["parameters"] = merge.parameters
    if plan.replaced:
        recipe["replaced"] = {
            each.component: {"name": each.path.name, "sha256": digests[each.inputs[0]].sha256} for each in plan.replaced
        }
    if plan.adapters or merge is None:
        recipe["loras"] = [
            {"name": use.name, "sha256": digests[use.input].sha256, **_weights(use)} for use in plan.adapters
        ]
    parents: dict[str, Any] = {}
    for _, _, records in used:
        parents |= _parse(records.get("sd_merge_models")) or {}
    for name, place, records in used:
        parents[digests[place].sha256] = {
            "name": name,
            "legacy_hash": digests[place].legacy,
            "sd_merge_recipe": _parse(records.get("sd_merge_recipe")),
        }
    names = [_stem(name) for name, _, _ in used]
    loras = [f"{_stem(use.name)} ({use.weight:g})" for use in plan.adapters]
    title = " + ".join([*names, *loras])
    others = [*(each.path.name for each in plan.replaced), *(use.name for use in plan.adapters)]
    return {
        "sd_merge_recipe": _dump(recipe),
        "sd_merge_models": _dump(parents),
        "modelspec.title": title if merge is None else f"{merge.method}: {title}",
        "modelspec.merged_from": ", ".join([*names, *map(_stem, others)]),
    }


def _used(model: ModelUse) -> tuple[str, int, Mapping[str, str]]:
    """(name, place of its first file among the inputs, its own records)."""
    return model.path.name, model.inputs[0], model.history


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
