"""A base in the other layout: one file with original names, or a diffusers folder. Bytes are only moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from bake.errors import FolderError, Mismatch, Unsupported, UsageError
from bake.identify.checkpoint import identify_checkpoint
from bake.identify.families import title
from bake.identify.scaled import ScaledBase
from bake.io.checkpoint import Checkpoint, CheckpointFile, open_side_files, read_json_object
from bake.keys.layouts import SLOTS, VARIANTS, Respelt, Slot, prefix_of, respell
from bake.keys.modules import Component, split_by_component
from bake.keys.tables import Layout
from bake.plan.arranged import Arranged
from bake.plan.composed import ComposedFile, Part, cut, share_of
from bake.plan.inputs import input_at
from bake.plan.listing import some
from bake.plan.model import Share, Stored
from bake.plan.pruning import MODEL_INDEX, index_without
from bake.plan.recipe import LAYOUTS
from bake.plan.refuse import refuse_quantised

_FOLDERS = {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
_IMPLEMENTATION = "modelspec.implementation"  # names the layout of the file it was written into
# A component's setting -> the tensor and axis of it that have that size.
_SIZES = {
    "unet": {"in_channels": ("conv_in.weight", 1), "cross_attention_dim": (".attn2.to_k.weight", 1)},
    "vae": {"latent_channels": ("decoder.conv_in.weight", 1)},
    "text": {
        "hidden_size": ("final_layer_norm.weight", 0),
        "d_model": ("shared.weight", 1),
        "vocab_size": ("token_embedding.weight", 0),
    },
}


def lay_out_as(base: Arranged, layout: str, like: Path | None, awaited: Collection[str]) -> Arranged:
    """The base in `layout`, with the names, shapes and rows that it has there.

    like: for "diffusers", a folder whose configuration, tokenizer and scheduler files are taken. awaited: components
    that will be added. What the layout has no place for is left out, and said.
    Raises UsageError for requests that cannot be meant; Unsupported for families and components whose names are not
    known in both layouts, and for quantised ones; FolderError and Mismatch for a `like` of something else.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"--layout {layout}: there are {', '.join(LAYOUTS)}")
    if like is not None and layout != "diffusers":
        raise UsageError("--like is for --layout diffusers, which needs configuration files")
    if layout == "original":
        if base.checkpoint.packaging == "file" and base.identity.layout == layout:
            return dataclasses.replace(base, notes=(*base.notes, f"{base.base.name} has the original layout already"))
        return as_one_file(base, bool(set(awaited) - {component.name for component in base.identity.components}))
    if layout == "diffusers":
        if base.checkpoint.packaging == "diffusers":
            raise UsageError(f"{base.base.name} is a diffusers folder already")
        return _as_folder(base, like, awaited)
    return base


def as_one_file(base: Arranged, others: bool = False) -> Arranged:
    """The base as one file with original names. others: components will be added."""
    slots = _slots(base)
    parts: dict[str, Part] = {}
    for component, slot in slots.items():
        prefix = prefix_of(slot, others or len(slots) > 1)
        parts |= {prefix + name: part for name, part in _respelt(base, component, slot, "original").items()}
    # What belongs to no component stays with a file that was one already.
    if base.checkpoint.packaging == "file":
        parts |= {name: part for name, part in parts_of(base.checkpoint).items() if _is_loose(name, base)}
    file = CheckpointFile(_composed(base, base.base, parts), "model.safetensors", "")
    checkpoint = Checkpoint(base.base, "file", (file,))
    left_out = _left_out(base, parts.values())
    aside = (*base.checkpoint.side_files, *(index.relative for index in base.checkpoint.indexes))
    if aside:
        left_out.append(f"a single file has no place for {some(sorted(aside))}")
    return _rearranged(base, checkpoint, left_out)


def _as_folder(base: Arranged, like: Path | None, awaited: Collection[str]) -> Arranged:
    if like is None:
        raise UsageError(
            f"a diffusers folder has configuration, tokenizer and scheduler files, which {base.base.name} does not "
            f"hold. Name a diffusers folder of a {title(base.identity.family)} model with --like: its weights are not "
            f"needed and not read."
        )
    slots = _slots(base)
    index = _index_of(like)
    files: list[CheckpointFile] = []
    configs: dict[str, dict[str, Any]] = {}
    for component, slot in slots.items():
        parts = _respelt(base, component, slot, "diffusers")
        configs[f"{slot.folder}/"] = _config_of(like, index, slot, parts)
        stem = "model" if slot.folder.startswith("text_encoder") else "diffusion_pytorch_model"
        relative = f"{slot.folder}/{stem}.safetensors"
        files.append(CheckpointFile(_composed(base, base.base, parts), relative, f"{slot.folder}/"))
    files.sort(key=lambda part: part.relative)
    side_files = open_side_files(like)
    present = {part.group for part in files} | {f"{each.folder}/" for each in slots_of(base) if awaits(each, awaited)}
    absent = [name for name in index if _is_model(index, name, side_files) and f"{name}/" not in present]
    kept = tuple(each for each in side_files if not each.startswith(tuple(f"{name}/" for name in absent)))
    notes = _left_out(base, (part for file in files for part in _parts_of(file)))
    if absent:
        notes.append(f"{base.base.name} has no {', '.join(absent)}: {MODEL_INDEX} says that there is none")
    read = [MODEL_INDEX, *(f"{group}config.json" for group in sorted(configs))]
    rearranged = _rearranged(base, Checkpoint(like, "diffusers", tuple(files), (), configs, kept), notes)
    return dataclasses.replace(
        rearranged,
        inputs=(*base.inputs, *(input_at(like / name, "like") for name in read)),
        contents={**base.contents, **({MODEL_INDEX: index_without(index, absent)} if absent else {})},
        like=like,
    )


def slots_of(base: Arranged) -> tuple[Slot, ...]:
    """Where the layouts keep the components of the base's family. Raises Unsupported if that is not known."""
    family, variant = base.identity.family, base.identity.variant
    if family not in SLOTS or variant not in VARIANTS.get(family, (variant,)):
        raise Unsupported(
            f"{base.base.name}: {title(family)}{f' {variant}' if variant else ''} is not a family of which bake knows "
            f"the names in both layouts; it knows {', '.join(title(each) for each in SLOTS)}.",
            family=family,
        )
    return SLOTS[family]


def awaits(slot: Slot, components: Collection[str]) -> bool:
    """True if one of these names of components means the slot: by the single file's or by the folder's."""
    return slot.component in components or any(_FOLDERS.get(name) == slot.folder for name in components)


def _slots(base: Arranged) -> dict[Component, Slot]:
    """Where the layouts keep each component. Raises Unsupported for quantised ones and for unknown names."""
    slots_of(base)
    refuse_quantised(base.base, base.checkpoint, base.scaled)
    if base.scaled.layers:
        raise Unsupported(
            f"{base.base.name}: scaled fp8 weights have no other layout: write them in 16 bits first, with "
            f"'bake convert {base.base.name} --dtype bf16 -o 16bit.safetensors'."
        )
    found = {component: _slot_of(base, component) for component in base.identity.components}
    for component, slot in found.items():
        if slot is None:
            raise Unsupported(
                f"{base.base.name}: bake does not know the names of its {component.name} ({component.prefix!r}) in the "
                f"other layout. --drop {component.name} leaves it out.",
                component=component.name,
            )
    return {component: slot for component, slot in found.items() if slot is not None}


def _slot_of(base: Arranged, component: Component) -> Slot | None:
    """Where the layouts keep a component of the base; None if that is not known."""
    if component.naming in ("plain", "hf", "language model"):
        return None
    for slot in slots_of(base):
        if base.checkpoint.packaging == "diffusers":
            if component.prefix == f"{slot.folder}/":
                return slot
        elif slot.component in (component.name, *component.also):
            return slot
    return None


def parts_of(checkpoint: Checkpoint, first: int = 0) -> dict[str, Part]:
    """Full name -> the tensor, of all in a checkpoint. first: place of its first file among the inputs."""
    return {
        part.group + name: Part(share_of(part, first + place, name), info.shape)
        for place, part in enumerate(checkpoint.files)
        for name, info in part.file.tensors.items()
    }


def _is_loose(name: str, base: Arranged) -> bool:
    """True if a tensor belongs to no component."""
    return not any(name.startswith(component.prefix) for component in base.identity.components)


def _respelt(base: Arranged, component: Component, slot: Slot, layout: Layout) -> dict[str, Part]:
    """A component's tensors by their names in `layout`, in the order of those names."""
    own = parts_of(base.checkpoint)
    names = dict(split_by_component(base.identity.components, own))[component]
    return respelt_parts({name: own[name] for name in names}, component, slot, layout)


def respelt_parts(own: Mapping[str, Part], component: Component, slot: Slot, layout: Layout) -> dict[str, Part]:
    """The tensors of a component by their names in `layout` below its prefix, in the order of these.

    own: full name -> tensor. Raises Unsupported if no table has the names.
    """
    shapes = {name[len(component.prefix) :]: part.shape for name, part in own.items()}
    found = respell(shapes, component.naming, layout, slot)
    if found is None:
        raise Unsupported(f"bake has no names for a {component.name} of this kind in the {layout} layout")
    return {name: _part_of(respelt, own, component.prefix) for name, respelt in sorted(found.items())}


def _part_of(respelt: Respelt, own: Mapping[str, Part], prefix: str) -> Part:
    """The tensor that a respelling means, with the pieces that it lies in. own: full name -> tensor."""
    pieces: list[Stored] = []
    is_transposed = False
    for place in respelt.places:
        share = own[prefix + place.tensor].share
        is_transposed = place.transposed != share.transposed
        pieces += share.stored if place.rows is None else cut(share, place.rows).stored
    if len(pieces) == 1 and not is_transposed:
        pieces = [dataclasses.replace(pieces[0], shape=respelt.shape)]
    return Part(Share(tuple(pieces), is_transposed), respelt.shape)


def _composed(base: Arranged, path: Path, parts: Mapping[str, Part]) -> ComposedFile:
    metadata: dict[str, str] = {}
    for file in base.checkpoint.files:
        metadata = {**file.file.metadata, **metadata}
    metadata.pop(_IMPLEMENTATION, None)
    return ComposedFile(path, parts, metadata, base.files)


def _rearranged(base: Arranged, checkpoint: Checkpoint, notes: Iterable[str]) -> Arranged:
    identity = identify_checkpoint(checkpoint)
    return dataclasses.replace(
        base, checkpoint=checkpoint, identity=identity, scaled=ScaledBase(), notes=(*base.notes, *notes)
    )


def _parts_of(file: CheckpointFile) -> Iterable[Part]:
    assert isinstance(file.file, ComposedFile)
    return (Part(share, file.file.tensors[name].shape) for name, share in file.file.shares.items())


def _left_out(base: Arranged, parts: Iterable[Part]) -> list[str]:
    """What of the base is in none of the parts, as notes."""
    used = {(stored.input, stored.name) for part in parts for stored in part.share.stored}
    lost = [
        full
        for full, part in parts_of(base.checkpoint).items()
        if not any((stored.input, stored.name) in used for stored in part.share.stored)
    ]
    return [f"{len(lost)} tensors have no place in the other layout and are left out: {some(lost)}"] if lost else []


def _index_of(like: Path) -> dict[str, Any]:
    path = like / MODEL_INDEX
    if not path.is_file():
        raise FolderError(f"--like {like}: no diffusers folder: there is no {MODEL_INDEX}", path=str(like))
    return read_json_object(path)


def _is_model(index: Mapping[str, Any], name: str, side_files: Collection[str]) -> bool:
    """True if a pipeline's component has weights, which its config.json tells."""
    return isinstance(index[name], list) and any(index[name]) and f"{name}/config.json" in side_files


def _config_of(like: Path, index: Mapping[str, Any], slot: Slot, parts: Mapping[str, Part]) -> dict[str, Any]:
    """The configuration of a component; raises FolderError or Mismatch if the folder is no model like the base."""
    path = like / slot.folder / "config.json"
    if slot.folder not in index or not path.is_file():
        raise FolderError(
            f"--like {like}: it has no {slot.folder}/config.json, which the {slot.component} needs: name a folder of "
            f"a model of the same family",
            path=str(like),
        )
    config = read_json_object(path)
    for key, (name, axis) in _SIZES.get("text" if slot.folder.startswith("text") else slot.folder, {}).items():
        size = next((part.shape[axis] for full, part in parts.items() if full.endswith(name)), None)
        told = config.get(key)
        if isinstance(told, int) and size is not None and told != size:
            raise Mismatch(
                f"--like {like}: {slot.folder}/config.json says {key} {told}, the checkpoint has {size}: it is the "
                f"configuration of another model",
                key=key,
            )
    return config
