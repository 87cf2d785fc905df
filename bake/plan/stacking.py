"""One language model out of layers of several, one above the other: a frankenmerge."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bake.errors import ShapeMismatch, Unsupported, UsageError
from bake.identify.checkpoint import identify_checkpoint
from bake.io.checkpoint import Checkpoint, CheckpointFile
from bake.io.tensorfile import TensorFile
from bake.plan.arranged import Arranged
from bake.plan.composed import ComposedFile, Part
from bake.plan.counterparts import Opened
from bake.plan.recipe import Layers

# What configurations call the number of layers, and lists with an entry for each of them.
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_LISTS = ("layer_types", "no_rope_layers", "block_types", "attention_types")
_NESTED = ("text_config", "llm_config", "language_config")
_LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks|layer)\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed|wte|wpe|word_embeddings|tok_embeddings)")  # before the first layer


class _Model(NamedTuple):
    """One of the models that layers are taken from."""

    opened: Opened
    layers: dict[int, dict[str, str]]  # number -> name within the layer -> full name
    rest: dict[str, str]  # full name of what is in no layer -> the same


def stack_layers(base: Arranged, models: Sequence[Opened], layers: Sequence[Layers]) -> Arranged:
    """The model that has these `layers`, in their order, counted anew.

    base: the first of `models`, which gives the configuration and the side files. What comes before the layers is that
    of the model that the first of them are of, what comes after them that of the last one's.
    Raises UsageError for layers that there are none of, ShapeMismatch for models of other sizes, Unsupported for what
    is no plain language model.
    """
    sorted_out = [_sorted_out(model) for model in models]
    for chosen in layers:
        _check(chosen, sorted_out)
    prefix = _prefix(models[0], sorted_out[0])
    parts: dict[str, Part] = {}
    number = 0
    for chosen in layers:
        model = sorted_out[chosen.model]
        for layer in range(chosen.first, chosen.end):
            for inner, full in model.layers[layer].items():
                parts[f"{prefix}{number}.{inner}"] = _part(model, full)
            number += 1
    before, after = (sorted_out[chosen.model] for chosen in (layers[0], layers[-1]))
    for model, wants_embeddings in ((before, True), (after, False)):
        parts |= {full: _part(model, full) for full in model.rest if bool(_EMBEDDINGS.search(full)) is wants_embeddings}
    _check_shapes(parts, sorted_out[0], models[0], prefix)
    return _arranged(base, models, parts, layers, number)


def _sorted_out(model: Opened) -> _Model:
    if not model.identity.language_model or model.checkpoint.packaging != "sharded":
        raise Unsupported(
            f"{model.name}: layers are put together of language models in folders; this is {model.identity.family}.",
            model=model.name,
        )
    layers: dict[int, dict[str, str]] = {}
    rest: dict[str, str] = {}
    for full, _, _ in model.checkpoint.tensors():
        found = _LAYER.match(full)
        if found is None:
            rest[full] = full
        else:
            layers.setdefault(int(found[1]), {})[full[found.end() :]] = full
    stacks = {full[: found.start(1)] for full, _, _ in model.checkpoint.tensors() if (found := _LAYER.match(full))}
    if len(stacks) != 1:
        has = f"several stacks of layers, {', '.join(sorted(stacks))}" if stacks else "no numbered layers"
        raise Unsupported(f"{model.name} has {has}: layers cannot be taken from it.", model=model.name)
    return _Model(model, layers, rest)


def _prefix(model: Opened, sorted_out: _Model) -> str:
    """What stands before the number of a layer."""
    full = next(iter(next(iter(sorted_out.layers.values())).values()))
    found = _LAYER.match(full)
    assert found is not None
    return full[: found.start(1)]


def _check(chosen: Layers, models: Sequence[_Model]) -> None:
    if not 0 <= chosen.model < len(models):
        raise UsageError(f"--layers {chosen}: there are {len(models)} models, counted from 1")
    model = models[chosen.model]
    count = len(model.layers)
    if not 0 <= chosen.first < chosen.end <= count or model.layers.keys() != set(range(count)):
        raise UsageError(
            f"--layers {chosen}: {model.opened.name} has the layers 0 to {count - 1}; END is one past the last"
        )


def _part(model: _Model, full: str) -> Part:
    return Part(model.opened.stored(full), model.opened.base.tensors[full].shape)


def _check_shapes(parts: Mapping[str, Part], first: _Model, opened: Opened, prefix: str) -> None:
    """Raise ShapeMismatch if a tensor is not what the first model has of its kind."""
    like = {inner: opened.base.tensors[full].shape for inner, full in next(iter(first.layers.values())).items()}
    for name, part in parts.items():
        inner = name[len(prefix) :].partition(".")[2] if name.startswith(prefix) else None
        due = opened.base.tensors[name].shape if inner is None and name in first.rest else like.get(inner or "")
        if due is None or due != part.shape:
            (stored, *_) = part.share.stored
            raise ShapeMismatch(
                f"{stored.name} {list(part.shape)} does not fit {opened.name}, which "
                f"{'has no such tensor' if due is None else f'has {list(due)}'}: layers are put together of models of "
                f"one architecture and size.",
                tensor=stored.name,
            )


def _arranged(
    base: Arranged, models: Sequence[Opened], parts: Mapping[str, Part], layers: Sequence[Layers], count: int
) -> Arranged:
    """The stacked model as one file, with the configuration of as many layers."""
    checkpoint = models[0].checkpoint
    files: dict[int, TensorFile] = {
        model.inputs + place: part.file for model in models for place, part in enumerate(model.checkpoint.files)
    }
    metadata = checkpoint.files[0].file.metadata
    file = CheckpointFile(ComposedFile(base.base, parts, metadata, files), "model.safetensors", "")
    config = _counted(checkpoint.configs.get("", {}), models, layers, count)
    stacked = Checkpoint(base.base, "sharded", (file,), (), {"": config}, checkpoint.side_files, checkpoint.left_out)
    return dataclasses.replace(
        base,
        checkpoint=stacked,
        identity=identify_checkpoint(stacked),
        files=files,
        contents={**base.contents, "config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"},
    )


def _counted(
    config: Mapping[str, Any], models: Sequence[Opened], layers: Sequence[Layers], count: int
) -> dict[str, Any]:
    """The first model's configuration with the new number of layers, and what it lists for each of them."""
    changed = dict(config)
    for key in _COUNTS:
        if key in changed:
            changed[key] = count
    for key in _LISTS:
        if isinstance(changed.get(key), list):
            changed[key] = [
                entry for chosen in layers for entry in _listed(models[chosen.model], key)[chosen.first : chosen.end]
            ]
    for key in _NESTED:
        if isinstance(changed.get(key), dict):
            changed[key] = _counted(changed[key], models, layers, count)
    return changed


def _listed(model: Opened, key: str) -> list[Any]:
    """What a model's configuration lists for each layer."""
    config = model.checkpoint.configs.get("", {})
    for each in (config, *(config.get(nested) for nested in _NESTED)):
        if isinstance(each, dict) and isinstance(each.get(key), list):
            found: list[Any] = each[key]
            return found
    return []
