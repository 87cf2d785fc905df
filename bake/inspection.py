"""What is this file? The facts behind `bake inspect`, for checkpoints and adapters alike."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bake.doctor import diagnose
from bake.errors import BakeError, UsageError
from bake.identify.adapter import Adapter, identify_adapter, is_adapter
from bake.identify.checkpoint import identify_checkpoint
from bake.identify.families import title
from bake.identify.fingerprints import trainer_of
from bake.identify.others import kind_of
from bake.identify.parts import component_of, in_order
from bake.identify.scaled import quantised, scaled_layers
from bake.identify.training import training_of
from bake.io.adapter import AdapterFile, has_adapter, open_adapter
from bake.io.checkpoint import Checkpoint, open_checkpoint
from bake.io.digest import data_sha256, known_digest
from bake.io.files import check_exists
from bake.io.jsontext import is_deep
from bake.io.tensorfile import read_number
from bake.keys.factors import split_key
from bake.plan.record import RECIPE_KEY


def inspect(
    path: str | Path, against: str | Path | None = None, hashes: bool = False, norms: bool = False
) -> dict[str, Any]:
    """Return what the file or folder at `path` is, as plain JSON data, from names and headers.

    Keys: kind, family, layout (checkpoint) or dialects (adapter), algorithms, ranks, components,
    training, tensors, dtypes, metadata, hashes and more. against: a base; says then, under "coverage",
    what of the adapter would map and why not, as `bake.doctor.diagnose` gives it. hashes: also read
    every byte for its digests. norms: also read the weights of an adapter for the size of its updates.
    Raises InputError for what cannot be read, Unsupported for formats bake knows only by name,
    UsageError if `against` or `norms` is asked of anything but an adapter.
    """
    path = Path(path)
    check_exists(path)
    source = _adapter_at(path)
    if source is not None:
        adapter = identify_adapter(source)
        found = _describe_adapter(adapter)
        if against is not None:
            found["coverage"] = diagnose(adapter, Path(against))
        if norms:
            from bake.norms import measure_norms  # needs torch, which nothing else here does

            found["norms"] = measure_norms(adapter)
    else:
        found = _describe_other(path)
        if against is not None or norms:
            option = "--against" if against is not None else "--norms"
            raise UsageError(f"{option} is for adapters; {path} is {found['kind']}")
    if hashes:
        found["hashes"] = {str(file): _hashes(file) for file in _weight_files(path)}
    return found


def _adapter_at(path: Path) -> AdapterFile | None:
    """The adapter at `path`, or None if there is something else."""
    if path.is_dir() and not has_adapter(path):
        return None  # it may be a checkpoint
    source = open_adapter(path)
    return source if is_adapter(source) else None


def _describe_other(path: Path) -> dict[str, Any]:
    """A checkpoint, or a file of another known kind."""
    checkpoint = open_checkpoint(path)
    kind = kind_of([name for name, _, _ in checkpoint.tensors()], beside_factors=False)
    if kind is None or kind.is_checkpoint:
        return _describe_checkpoint(checkpoint)
    return {"kind": kind.name, "path": str(path), "advice": kind.advice}


def _describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    identity = identify_checkpoint(checkpoint)
    tensors = [(name, info) for name, _, info in checkpoint.tensors()]
    metadata: dict[str, str] = {}
    for part in checkpoint.files:
        metadata = {**part.file.metadata, **metadata}
    scaled = scaled_layers(checkpoint)
    obstacle = quantised(checkpoint, scaled)
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.root),
        "family": identity.family,
        "title": title(identity.family),
        "variant": identity.variant,
        "layout": identity.layout,
        "packaging": checkpoint.packaging,
        "evidence": list(identity.evidence),
        "components": {
            component.name: sum(name.startswith(component.prefix) for name, _ in tensors)
            for component in identity.components
        },
        "quantised": obstacle.kind if obstacle is not None else None,
        "scaled_layers": len(scaled.layers),
        "files": [{"name": part.relative, "size": part.file.size} for part in checkpoint.files],
        "tensors": len(tensors),
        "dtypes": dict(Counter(info.dtype for _, info in tensors)),
        "bytes": sum(info.nbytes for _, info in tensors),
        "recipe": _parsed(metadata.get(RECIPE_KEY)),
        "metadata": _shown(metadata),
        "hashes": _stored_hashes(metadata),
    }


def _describe_adapter(adapter: Adapter) -> dict[str, Any]:
    file = adapter.source.file
    return {
        "kind": "adapter",
        "path": str(adapter.source.path),
        "family": adapter.family,
        "families": sorted(adapter.families),
        "evidence": [adapter.evidence] if adapter.evidence else [],
        "dialects": list(adapter.dialects),
        "algorithms": list(adapter.algorithms),
        "trainer": trainer_of(file.tensors, file.metadata),
        "supported": not adapter.refusals,
        "refusal": adapter.refusals[0].message if adapter.refusals else None,
        "ranks": list(adapter.ranks),
        "components": _components(adapter),
        "training": training_of({**_texts(adapter.source.config), **file.metadata}).to_json(),
        "modules": len(adapter.modules),
        "embeddings": list(adapter.embeddings),
        "unknown": list(adapter.unknown),
        "tensors": len(file.tensors),
        "dtypes": dict(Counter(info.dtype for info in file.tensors.values())),
        "bytes": sum(info.nbytes for info in file.tensors.values()),
        "notes": list(adapter.notes),
        "metadata": _shown(file.metadata),
        "hashes": _stored_hashes(file.metadata),
    }


def _components(adapter: Adapter) -> dict[str, Any]:
    """Component -> its modules, algorithms, ranks, alphas and scales, each value with its count."""
    alphas = _alphas(adapter)
    found: dict[str, dict[str, Counter[Any]]] = {}
    modules: Counter[str] = Counter()
    for module in adapter.modules:
        component = component_of(module, adapter)
        counts = found.setdefault(component, {key: Counter() for key in ("algorithms", "ranks", "alphas", "scales")})
        modules[component] += 1
        for update in module.updates:
            counts["algorithms"][update.algorithm] += 1
            counts["scales"][update.scale] += 1
            if update.rank is not None:
                counts["ranks"][update.rank] += 1
                counts["alphas"][alphas.get(module.name)] += 1
    return {
        name: {"modules": modules[name], **{key: _counted(counter) for key, counter in counts.items()}}
        for name, counts in sorted(found.items(), key=lambda item: in_order(item[0]))
    }


def _alphas(adapter: Adapter) -> dict[str, float]:
    """module -> the alpha stored for it; modules that are refused may hold anything of that name."""
    file, found = adapter.source.file, {}
    for key, info in file.tensors.items():
        split = split_key(key)
        if split is not None and split[1].factor == "alpha" and math.prod(info.shape) == 1:
            found[split[0]] = read_number(file, key)
    return found


def _counted(counter: Counter[Any]) -> list[dict[str, Any]]:
    """Values with their counts, the most frequent first."""
    ordered = sorted(counter.items(), key=lambda item: (-item[1], str(item[0])))
    return [{"value": value, "count": count} for value, count in ordered]


def _texts(config: Mapping[str, Any] | None) -> dict[str, str]:
    """The entries of an adapter_config.json that are texts: the base's name is one of them."""
    return {key: value for key, value in (config or {}).items() if isinstance(value, str)}


def _weight_files(path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    try:
        return [open_adapter(path).file.path]
    except BakeError:
        return [part.file.path for part in open_checkpoint(path).files]


def _hashes(path: Path) -> dict[str, str | None]:
    digest = known_digest(path)
    data = data_sha256(path)
    return {
        "sha256": digest.sha256,
        "autov1": digest.legacy,
        "autov2": digest.sha256[:10],
        "autov3": data[:12] if data is not None else None,
        "data_sha256": data,
    }


def _stored_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Hashes that other tools wrote into the file."""
    keys = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
    return {key: metadata[key] for key in keys if key in metadata}


def _shown(metadata: Mapping[str, str]) -> dict[str, Any]:
    return {key: value for key, value in sorted(metadata.items()) if key != RECIPE_KEY}


def _parsed(text: str | None) -> Any:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if is_deep(found) else found
