"""What a plan is refused for once its modules are matched, each with what to do about it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from bake.dtypes import DTYPES
from bake.errors import UnmatchedModules, Unsupported
from bake.identify.checkpoint import BaseIdentity
from bake.identify.families import FAMILIES, title
from bake.identify.quantised import quantisation_of
from bake.io.checkpoint import Checkpoint
from bake.io.header import TensorInfo
from bake.plan.match import Matching
from bake.plan.recipe import is_text_encoder

_LISTED = 8  # unmatched modules spelled out in the message; all are in its details
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|shared)\.weight$")
_HEADS = ("lm_head.weight", "embed_out.weight")
_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def refuse_quantised(base: Path, names: Iterable[str]) -> None:
    """Raise Unsupported if the base is quantised."""
    found = quantisation_of(names)
    if found is not None:
        raise Unsupported(
            f"{base}: a {found[0]} checkpoint (it holds {found[1]!r}). Updates cannot be added to packed "
            f"weights: fuse into the 16-bit original and quantise the result.",
            kind=found[0],
            tensor=found[1],
        )


def refuse_packed(tensors: Mapping[str, TensorInfo], matching: Matching) -> None:
    """Raise Unsupported if an update goes to a tensor that is stored as anything but plain floats."""
    for name in matching.terms:
        if not DTYPES[tensors[name].dtype].computable:
            raise Unsupported(
                f"{name} is stored as {tensors[name].dtype}, to which an update cannot be added: "
                f"fuse into the 16-bit original.",
                tensor=name,
            )


def refuse_tied(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], matching: Matching) -> None:
    """Raise Unsupported if an update goes to an embedding that is also the output head.

    The two would have to be stored apart, and both the configuration and the loader told.
    """
    architectures = checkpoint.configs.get("", {}).get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if not architecture.endswith(_GENERATORS) or any(name.endswith(_HEADS) for name in tensors):
        return
    for name in matching.terms:
        if _EMBEDDING.search(name):
            raise Unsupported(
                f"the adapter updates {name}, which this model also uses as its output head (tied embeddings). "
                f"Fusing it would change both. Save the base untied first, or train without the embedding.",
                tensor=name,
            )


def refuse_unmatched(identity: BaseIdentity, matching: Matching, allowed: bool) -> None:
    """Raise UnmatchedModules if nothing matched, or not everything and that is not `allowed`."""
    total, matched = sum(matching.total.values()), sum(matching.matched.values())
    if matched and (allowed or not matching.unmatched):
        return
    lines = [f"{len(matching.unmatched)} of {total} adapter modules have no place in the base:"]
    for part in matching.skipped:
        lines.append(f"  {part.modules} of {part.component} ({part.adapter}) left out: {part.reason}")
    for entry in matching.unmatched[:_LISTED]:
        nearest = f"; nearest: {entry.nearest}" if entry.nearest else ""
        lines.append(f"  {entry.module} ({entry.adapter}): {entry.reason}{nearest}")
    if len(matching.unmatched) > _LISTED:
        lines.append(f"  ... and {len(matching.unmatched) - _LISTED} more (--json lists all)")
    lines += _remedies(identity, matching, matched)
    raise UnmatchedModules(
        "\n".join(lines),
        matched=matched,
        total=total,
        unmatched=[dataclasses.asdict(entry) for entry in matching.unmatched],
        components={name: dataclasses.asdict(part) for name, part in matching.coverage(identity).items()},
    )


def _remedies(identity: BaseIdentity, matching: Matching, matched: int) -> Iterable[str]:
    missing = sorted(filter(is_text_encoder, matching.missing))
    if missing:
        rest = next((part.name for part in identity.components if not is_text_encoder(part.name)), "unet")
        yield (
            f"The base has no {', '.join(missing)}. Name the file that has it with --also FILE, "
            f"or leave the text encoder out with --only {rest}."
        )
    elif matched:
        yield "Use --allow-unmatched to fuse the rest."
    else:
        yield "Nothing at all matched, so there is nothing to fuse."
    family = FAMILIES.get(identity.family)
    if family is not None and not family.spelled:
        yield f"The base is {title(family.name)}: this version of bake fuses into it only what has its very names."
