"""What is left out of a base: averaged copies of its weights, what training left there, whole components."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bake.errors import UsageError
from bake.identify.scaled import ScaledBase
from bake.io.checkpoint import read_json_object
from bake.keys.modules import split_by_component
from bake.plan.arranged import Arranged
from bake.plan.composed import ComposedFile, Part, share_of
from bake.plan.recipe import EMA, is_text_encoder
from bake.sizes import format_bytes

# What can be dropped beside components.
KINDS = {
    "ema": "averaged weights (model_ema)",
    "training": "training state",
    "rest": "tensors outside its components",
}
MODEL_INDEX = "model_index.json"

# Source: latent-diffusion ldm/modules/ema.py, which calls a weight as the model does, without the dots.
_AVERAGED, _MODEL = "model_ema.", "model."
# What PyTorch Lightning and other trainers save beside a model, and the losses and critics that VAEs are trained with.
_TRAINING = re.compile(
    r"(optimizer(_states?)?|lr_schedulers?|callbacks|loops|amp_scaling_state|(grad_)?scaler|"
    r"((first_stage_model|vae)\.)?(loss|discriminator|perceptual_loss))\..+|epoch|global_step|step"
)
_STEPS_OF_SD2 = "global_step"  # by which programs tell its variants apart


def prune(base: Arranged, drop: Sequence[str], ema: str) -> Arranged:
    """The base without what is to be dropped. Raises UsageError for what there is none of.

    drop: components, "te" for every text encoder, and KINDS. ema: "use" puts the averaged weights in the place of
    the others.
    """
    if ema not in EMA:
        raise UsageError(f"--ema {ema}: there are {', '.join(EMA)}")
    if ema == "use":
        return prune(_averaged(base), [each for each in drop if each != "ema"], "keep")
    if not drop:
        return base
    meant = {each: _meant(each, base) for each in dict.fromkeys(drop)}
    for each, names in meant.items():
        if not names:
            raise _nothing(each, base)
    gone = set().union(*meant.values())
    if all(full in gone for full, _, _ in base.checkpoint.tensors()):
        raise UsageError(f"--drop {', '.join(drop)}: nothing of {base.base.name} would be left")
    notes = [f"dropped ({each}): {_size(base, names)}" for each, names in meant.items()]
    return _without(base, gone, notes)


def index_without(index: Mapping[str, Any], components: Iterable[str]) -> str:
    """A model_index.json that says of these components that there are none."""
    changed = {**index, **{name: [None, None] for name in components if name in index}}
    return json.dumps(changed, indent=2, ensure_ascii=False) + "\n"


def _meant(what: str, base: Arranged) -> set[str]:
    """The full names of the tensors that are to go."""
    names = [full for full, _, _ in base.checkpoint.tensors()]
    if what == "ema":
        return {full for full in names if _path(full).startswith(_AVERAGED)}
    if what == "training":
        kept = _STEPS_OF_SD2 if base.identity.family == "sd2" else None
        return {full for full in names if _TRAINING.fullmatch(_path(full)) and _path(full) != kept}
    owned = {
        component.name: set(mine) for component, mine in split_by_component(base.identity.components, names) if mine
    }
    if what == "rest":
        return set(names).difference(*owned.values())
    wanted = [name for name in owned if name == what or (what == "te" and is_text_encoder(name))]
    return set().union(*(owned[name] for name in wanted))


def _path(full: str) -> str:
    """A tensor's name without the folder of its component."""
    return full.rpartition("/")[2]


def _without(base: Arranged, gone: set[str], notes: Sequence[str]) -> Arranged:
    """The base without some of its tensors, and without the side files of components that are gone with them."""
    checkpoint = base.checkpoint
    files = []
    for place, part in enumerate(checkpoint.files):
        kept = {
            name: Part(share_of(part, place, name), info.shape)
            for name, info in part.file.tensors.items()
            if part.group + name not in gone
        }
        if kept:
            composed = ComposedFile(part.file.path, kept, part.file.metadata, base.files)
            files.append(dataclasses.replace(part, file=composed))
    lost = {part.group for part in checkpoint.files if part.group} - {part.group for part in files}
    components = tuple(
        component
        for component, names in split_by_component(base.identity.components, [f for f, _, _ in checkpoint.tensors()])
        if not gone.issuperset(names)
    )
    layers = {name: layer for name, layer in base.scaled.layers.items() if name not in gone}
    return dataclasses.replace(
        base,
        checkpoint=dataclasses.replace(
            checkpoint,
            files=tuple(files),
            indexes=tuple(index for index in checkpoint.indexes if not index.relative.startswith(tuple(lost))),
            configs={group: config for group, config in checkpoint.configs.items() if group not in lost},
            side_files=tuple(file for file in checkpoint.side_files if not file.startswith(tuple(lost))),
        ),
        identity=dataclasses.replace(base.identity, components=components),
        scaled=ScaledBase(layers, base.scaled.markers - gone, base.scaled.obstacle),
        contents=_contents(base, lost),
        notes=(*base.notes, *notes),
    )


def _contents(base: Arranged, lost: Iterable[str]) -> Mapping[str, str]:
    """The side files that have to say that components, by their groups, are no longer there."""
    if base.checkpoint.packaging != "diffusers" or not lost:
        return base.contents
    index = read_json_object(base.checkpoint.root / MODEL_INDEX)
    return {**base.contents, MODEL_INDEX: index_without(index, [group.rstrip("/") for group in lost])}


def _averaged(base: Arranged) -> Arranged:
    """The base with the averaged weights in the place of the others. Raises UsageError if it does not carry them."""
    shares = {
        part.group + name: share_of(part, place, name)
        for place, part in enumerate(base.checkpoint.files)
        for name in part.file.tensors
    }
    averages = {full for full in shares if _path(full).startswith(_AVERAGED)}
    found: dict[str, str] = {}
    for full in shares.keys() - averages:
        group, name = full[: len(full) - len(_path(full))], _path(full)
        average = f"{group}{_AVERAGED}{name.removeprefix(_MODEL).replace('.', '')}"
        if name.startswith(_MODEL) and average in averages:
            found[full] = average
    counters = {full for full in averages if _path(full) in (f"{_AVERAGED}decay", f"{_AVERAGED}num_updates")}
    strange = averages - counters - set(found.values())
    if not found or strange:
        which = f"{min(strange)!r} is the average of nothing in it" if strange else "it carries no averaged weights"
        raise UsageError(f"--ema use: {base.base.name}: {which}")
    files = []
    for part in base.checkpoint.files:
        parts = {
            name: Part(shares[found.get(part.group + name, part.group + name)], info.shape)
            for name, info in part.file.tensors.items()
            if part.group + name not in averages
        }
        files.append(
            dataclasses.replace(part, file=ComposedFile(part.file.path, parts, part.file.metadata, base.files))
        )
    return dataclasses.replace(
        base,
        checkpoint=dataclasses.replace(base.checkpoint, files=tuple(files)),
        notes=(*base.notes, f"{len(found)} averaged weights (model_ema) are in the place of the others"),
    )


def _nothing(what: str, base: Arranged) -> UsageError:
    if what in KINDS:
        return UsageError(f"--drop {what}: {base.base.name} has no {KINDS[what]}")
    present = ", ".join(component.name for component in base.identity.components)
    return UsageError(
        f"--drop {what}: {base.base.name} has no such component; it has {present}. Beside components there are "
        f"{', '.join(KINDS)}."
    )


def _size(base: Arranged, names: set[str]) -> str:
    size = sum(info.nbytes for full, _, info in base.checkpoint.tensors() if full in names)
    return f"{len(names)} tensors, {format_bytes(size)}"
