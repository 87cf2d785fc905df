"""Components that are taken from other checkpoints: another VAE, another text encoder, one that the base lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from bake.dtypes import DTYPES
from bake.errors import Mismatch, Unsupported
from bake.identify.checkpoint import identify_checkpoint
from bake.identify.scaled import scaled_layers
from bake.io.checkpoint import Checkpoint, open_checkpoint
from bake.plan.adding import add_component
from bake.plan.arranged import Arranged, Origin, origin_of
from bake.plan.counterparts import Counterparts, Opened, check_alike, is_merged
from bake.plan.inputs import input_of
from bake.plan.listing import some
from bake.plan.model import Replacement
from bake.plan.refuse import refuse_quantised


def replace_components(base: Arranged, replaced: Mapping[str, Path], opened: ExitStack) -> Arranged:
    """The base with these components from other checkpoints, in its own names and, unless they are cast, dtypes.

    One that the base has not is added as it is.

    replaced: component -> a checkpoint that has it, alone or among others. opened: closes the checkpoints.
    Raises Mismatch for components that one of the two does not have or that do not fit, Unsupported for quantised ones.
    """
    for component, path in sorted(replaced.items()):
        base = _replace(base, component, path, opened)
    return base


def _replace(base: Arranged, component: str, path: Path, opened: ExitStack) -> Arranged:
    checkpoint = open_checkpoint(path)
    opened.callback(checkpoint.close)
    refuse_quantised(path, checkpoint, scaled := scaled_layers(checkpoint))
    first = len(base.inputs)
    mine = Opened(base.base.name, base.checkpoint, base.identity, 0, "")
    theirs = Opened(path.name, checkpoint, identify_checkpoint(checkpoint), first, "")
    check_alike(mine, theirs)
    replacement = Replacement(component, path, (first, first + len(checkpoint.files)), checkpoint.packaging)
    if component not in mine.owned:
        if scaled.layers:
            raise _scaled(component, theirs)
        return _read(add_component(base, component, theirs), replacement, checkpoint)
    if component not in theirs.owned:
        raise Mismatch(
            f"{theirs.name} has no {component} to be taken; it has {', '.join(theirs.owned)}",
            component=component,
            model=theirs.name,
        )
    for owner, layers in ((mine, base.scaled.layers), (theirs, scaled.layers)):
        if layers.keys() & set(owner.owned[component][1]):
            raise _scaled(component, owner)
    changed = dataclasses.replace(
        base,
        origins={**base.origins, **_origins(component, mine, theirs)},
        notes=(*base.notes, *_notes(component, mine, theirs)),
    )
    return _read(changed, replacement, checkpoint)


def _read(base: Arranged, replacement: Replacement, checkpoint: Checkpoint) -> Arranged:
    """The base that is made of these files too."""
    inputs = (*base.inputs, *(input_of(part.file, "component") for part in checkpoint.files))
    return dataclasses.replace(base, inputs=inputs, replaced=(*base.replaced, replacement))


def _scaled(component: str, owner: Opened) -> Unsupported:
    return Unsupported(
        f"{owner.name}: its {component} is scaled fp8, which cannot be replaced: use a checkpoint in 16 bits",
        model=owner.name,
    )


def _origins(component: str, mine: Opened, theirs: Opened) -> dict[str, Origin]:
    """Full name -> what takes its place, of all numbers of the component. Integers are the same in all of its kind."""
    counterparts = Counterparts(mine, theirs)
    found: dict[str, Origin] = {}
    lacks = []
    for full in mine.owned[component][1]:
        info = mine.base.tensors[full]
        share = counterparts.share(full, component) if DTYPES[info.dtype].computable else None
        if share is not None:
            found[full] = origin_of(full, mine.stored(full), info.shape, share, 0)
        elif is_merged(full, info):
            lacks.append(f"{full} is not in {theirs.name}")
    lacks += [f"{name} is only in {theirs.name}" for name in counterparts.left_over([component])]
    if lacks:
        raise Mismatch(
            f"the {component} of {theirs.name} is built differently: {some(lacks)}. It cannot take the place of "
            f"that of {mine.name}.",
            tensors=lacks,
        )
    return found


def _notes(component: str, mine: Opened, theirs: Opened) -> list[str]:
    """Said where the other file stores the component in other dtypes than those it gets."""
    ours, other = _dtypes(component, mine), _dtypes(component, theirs)
    if ours == other:
        return []
    return [
        f"the {component} of {theirs.name} is {some(sorted(other))}; without --dtype {component}=... it becomes "
        f"{some(sorted(ours))}, as in {mine.name}"
    ]


def _dtypes(component: str, model: Opened) -> set[str]:
    """What the trained numbers of a component are stored as."""
    tensors = model.base.tensors
    return {tensors[name].dtype for name in model.owned[component][1] if is_merged(name, tensors[name])}
