"""Components that the base has not: a VAE or text encoders for a checkpoint without them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from bake.errors import Mismatch, Unsupported
from bake.identify.checkpoint import identify_checkpoint
from bake.io.checkpoint import Checkpoint, CheckpointFile, read_json_object
from bake.io.tensorfile import TensorFile
from bake.keys.layouts import Slot
from bake.keys.modules import Component
from bake.plan.arranged import Arranged
from bake.plan.composed import ComposedFile, Part
from bake.plan.counterparts import Opened
from bake.plan.layout import as_one_file, awaits, parts_of, respelt_parts, slots_of
from bake.plan.pruning import MODEL_INDEX


def add_component(base: Arranged, component: str, theirs: Opened) -> Arranged:
    """The base with a component of another checkpoint, under the names that its own layout has for it.

    Raises Mismatch if there is no such component, or it is of another kind than the family's; Unsupported where bake
    does not know its place.
    """
    packaging = base.checkpoint.packaging
    if packaging not in ("file", "diffusers"):
        raise Unsupported(
            f"{base.base.name} has no {component}, and one can only be added to a single file or a diffusers folder: "
            f"make it one with --layout"
        )
    slot = _slot(base, component)
    source = _source(component, slot, theirs)
    every = parts_of(theirs.checkpoint, theirs.inputs)
    own = {name: every[name] for name in theirs.owned[source.name][1]}
    files: Mapping[int, TensorFile] = {
        **base.files,
        **{theirs.inputs + place: part.file for place, part in enumerate(theirs.checkpoint.files)},
    }
    if packaging == "diffusers":
        return _in_folder(base, slot, theirs, respelt_parts(own, source, slot, "diffusers"), files)
    if any(not each.prefix for each in base.identity.components):  # its names would be taken for the others'
        base = as_one_file(base, True)
    parts = parts_of(base.checkpoint)
    parts |= {slot.prefix + name: part for name, part in respelt_parts(own, source, slot, "original").items()}
    (file,) = base.checkpoint.files
    composed = ComposedFile(file.file.path, parts, file.file.metadata, files)
    return _with(base, dataclasses.replace(base.checkpoint, files=(dataclasses.replace(file, file=composed),)), files)


def _slot(base: Arranged, component: str) -> Slot:
    slots = slots_of(base)
    found = next((slot for slot in slots if slot.component == component), None)
    found = found or next((slot for slot in slots if awaits(slot, [component])), None)
    if found is None:
        known = ", ".join(slot.component for slot in slots)
        raise Mismatch(
            f"{base.base.name} has no {component}, and its family has none that bake knows the place of; it knows "
            f"{known}",
            component=component,
        )
    return found


def _source(component: str, slot: Slot, theirs: Opened) -> Component:
    """The other checkpoint's component for a slot."""
    named = (component, slot.component)
    found = next((each for each in theirs.identity.components if each.answers(named)), None)
    if found is None:
        raise Mismatch(
            f"{theirs.name} has no {component} to be taken; it has {', '.join(theirs.owned)}",
            component=component,
            model=theirs.name,
        )
    if found.naming not in slot.namings:
        raise Mismatch(
            f"the {found.name} of {theirs.name} is of another kind ({found.naming}) than the {component} that is "
            f"wanted ({' or '.join(slot.namings)})",
            component=component,
            model=theirs.name,
        )
    return found


def _in_folder(
    base: Arranged, slot: Slot, theirs: Opened, parts: Mapping[str, Part], files: Mapping[int, TensorFile]
) -> Arranged:
    """A diffusers folder with a further component. Its configuration is the other folder's, or one that is there."""
    checkpoint, group = base.checkpoint, f"{slot.folder}/"
    stem = "model" if slot.folder.startswith("text_encoder") else "diffusion_pytorch_model"
    composed = ComposedFile(theirs.checkpoint.root, parts, {"format": "pt"}, files)
    part = CheckpointFile(composed, f"{group}{stem}.safetensors", group)
    config, entry = _configuration(base, slot, theirs)
    index = json.loads(base.contents.get(MODEL_INDEX) or (checkpoint.root / MODEL_INDEX).read_text("utf-8"))
    contents = {
        **base.contents,
        MODEL_INDEX: json.dumps({**index, slot.folder: entry}, indent=2, ensure_ascii=False) + "\n",
        f"{group}config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    changed = dataclasses.replace(
        checkpoint,
        files=(*checkpoint.files, part),
        configs={**checkpoint.configs, group: config},
        side_files=tuple(file for file in checkpoint.side_files if file not in contents),
    )
    return _with(dataclasses.replace(base, contents=contents), changed, files)


def _configuration(base: Arranged, slot: Slot, theirs: Opened) -> tuple[dict[str, Any], Any]:
    """(config.json of the new component, its entry in model_index.json)."""
    for checkpoint in (theirs.checkpoint, base.checkpoint):
        path, index = checkpoint.root / slot.folder / "config.json", checkpoint.root / MODEL_INDEX
        if path.is_file() and index.is_file():
            entry = read_json_object(index).get(slot.folder)
            if isinstance(entry, list) and any(entry):
                return read_json_object(path), entry
    raise Unsupported(
        f"{theirs.name} does not hold the config.json that a diffusers folder needs for its {slot.folder}: take the "
        f"component from a diffusers folder, which has one",
        component=slot.component,
    )


def _with(base: Arranged, checkpoint: Checkpoint, files: Mapping[int, TensorFile]) -> Arranged:
    return dataclasses.replace(base, checkpoint=checkpoint, identity=identify_checkpoint(checkpoint), files=files)
