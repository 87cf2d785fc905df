"""What a plan is refused for once its modules are matched, each with what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bake.dtypes import DTYPES
from bake.errors import UnmatchedModules, Unsupported, UsageError
from bake.identify.checkpoint import BaseIdentity
from bake.identify.scaled import ScaledBase, quantised
from bake.io.checkpoint import Checkpoint
from bake.io.header import TensorInfo
from bake.plan.match import Matching
from bake.plan.recipe import is_text_encoder

_LISTED = 8  # unmatched modules spelled out in the message; all are in its details


def check_only(only: Sequence[str], identity: BaseIdentity, owner: str) -> None:
    """Raise UsageError for components to be worked on that there are none of; owner: whose they would be."""
    present = [component.name for component in identity.components]
    for name in only:
        if name not in present and not (name == "te" and any(map(is_text_encoder, present))):
            raise UsageError(f"--only {name}: {owner} has no such component; it has {', '.join(present)}")


def refuse_quantised(base: Path, checkpoint: Checkpoint, scaled: ScaledBase) -> None:
    """Raise Unsupported if the base is quantised in another way than with fp8 scales that bake knows."""
    found = quantised(checkpoint, scaled)
    if found is not None:
        raise Unsupported(
            f"{base}: a {found.kind} checkpoint ({found.evidence!r} tells). {found.remedy}",
            kind=found.kind,
            tensor=found.evidence,
        )


def refuse_packed(tensors: Mapping[str, TensorInfo], matching: Matching) -> None:
    """Raise Unsupported if an update goes to a tensor that is stored as anything but plain floats."""
    for name in matching.terms:
        dtype = tensors[matching.added.get(name, name)].dtype
        if not DTYPES[dtype].computable:
            raise Unsupported(
                f"{name} is stored as {dtype}, to which an update cannot be added: fuse into the 16-bit original.",
                tensor=name,
            )


def refuse_unmatched(identity: BaseIdentity, matching: Matching, allowed: bool, is_folder: bool) -> None:
    """Raise UnmatchedModules if nothing matched, or not everything and that is not `allowed`."""
    total, matched = sum(matching.total.values()), sum(matching.matched.values())
    if matched and (allowed or not matching.unmatched):
        return
    lines = ["Every adapter module is left out:"]
    if total:
        lines = [f"{len(matching.unmatched)} of {total} adapter modules have no place in the base:"]
    for part in matching.skipped:
        lines.append(f"  {part.modules} of {part.component} ({part.adapter}) left out: {part.reason}")
    for entry in matching.unmatched[:_LISTED]:
        nearest = f"; nearest: {entry.nearest}" if entry.nearest else ""
        lines.append(f"  {entry.module} ({entry.adapter}): {entry.reason}{nearest}")
    if len(matching.unmatched) > _LISTED:
        lines.append(f"  ... and {len(matching.unmatched) - _LISTED} more (--json lists all)")
    lines += _remedies(identity, matching, matched, is_folder)
    raise UnmatchedModules(
        "\n".join(lines),
        matched=matched,
        total=total,
        unmatched=[dataclasses.asdict(entry) for entry in matching.unmatched],
        components={name: dataclasses.asdict(part) for name, part in matching.coverage(identity).items()},
    )


def _remedies(identity: BaseIdentity, matching: Matching, matched: int, is_folder: bool) -> Iterable[str]:
    missing = sorted(filter(is_text_encoder, matching.missing))
    if missing:
        rest = next((part.name for part in identity.components if not is_text_encoder(part.name)), "unet")
        source = "Use a folder that has it" if is_folder else "Name the file that has it with --also FILE"
        yield f"The base has no {', '.join(missing)}. {source}, or leave the text encoder out with --only {rest}."
    elif matched:
        yield "Use --allow-unmatched to fuse the rest."
    else:
        yield "Nothing at all matched, so there is nothing to fuse."
