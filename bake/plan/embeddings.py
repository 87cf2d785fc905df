"""Where token embeddings go that travel inside adapters: files beside the output, or into the model itself."""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from bake.dtypes import DTYPES
from bake.errors import InputError, UsageError
from bake.identify.adapter import Adapter
from bake.identify.checkpoint import BaseIdentity
from bake.identify.embeddings import Embedding, Vectors, group_embeddings
from bake.io.checkpoint import Checkpoint
from bake.plan.model import AdapterUse, EmbeddingPlan, EmbeddingVectors, Stored
from bake.plan.recipe import EMBEDDING_MODES, Recipe
from bake.plan.tokens import Growth, grow

_FOLDER_SUFFIX = ".embeddings"
_LONGEST_NAME = 100  # bytes; file systems end at 255, and a number may follow
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # as file names, on Windows
# The tensor's name where a file holds one: any name loads in A1111, ComfyUI and diffusers; this one is known as
# a textual inversion's.
_ONLY = "emb_params"


def embeddings_folder(output: Path) -> Path:
    """The folder beside `output` for its textual-inversion files: out.embeddings for out.safetensors."""
    place = Path(os.path.abspath(output)) if output.name in ("", "..") else output
    return place.with_name(place.name.removesuffix(".safetensors") + _FOLDER_SUFFIX)


def plan_embeddings(
    recipe: Recipe, checkpoint: Checkpoint, identity: BaseIdentity, uses: Sequence[tuple[AdapterUse, Adapter]]
) -> tuple[tuple[EmbeddingPlan, ...], Growth]:
    """The embeddings that the adapters carry, and what adding them changes in the model.

    Raises UsageError for requests that cannot be meant, InputError for malformed embeddings,
    Unsupported, Mismatch and FolderError where they cannot be added.
    """
    mode = recipe.embeddings
    if mode not in EMBEDDING_MODES:
        raise UsageError(f"embeddings is one of {', '.join(EMBEDDING_MODES)}, not {mode!r}")
    if mode == "add" and checkpoint.packaging != "diffusers":
        raise UsageError(
            f"--embeddings add needs a diffusers folder as the base: {recipe.base} has no tokenizer that could learn "
            f"a word. With --embeddings beside they are written as textual-inversion files."
        )
    if mode == "drop":
        return (), Growth()
    planned = [
        _plan(embedding, place, use, adapter)
        for place, (use, adapter) in enumerate(uses)
        for embedding in group_embeddings(adapter.source.file, adapter.embeddings)
    ]
    if mode == "add":
        return grow(recipe, checkpoint, identity, planned)
    return tuple(_with_files(planned)), Growth()


def _plan(embedding: Embedding, place: int, use: AdapterUse, adapter: Adapter) -> EmbeddingPlan:
    alone = len(embedding.vectors) == 1 and not embedding.is_output
    vectors = tuple(_located(each, alone, embedding.is_output, use.input, adapter) for each in embedding.vectors)
    return EmbeddingPlan(embedding.token, place, vectors, None)


def _located(found: Vectors, alone: bool, is_output: bool, place: int, adapter: Adapter) -> EmbeddingVectors:
    info = adapter.source.file.tensors[found.tensor]
    if not DTYPES[info.dtype].computable:
        raise InputError(f"{adapter.source.path}: the embedding {found.tensor!r} is stored as {info.dtype}, no floats")
    encoder = found.encoder
    key = _ONLY if alone and found.named in (None, "clip_l") else encoder or _ONLY
    stored = Stored(place, found.tensor, info.dtype, info.shape, (info.begin, info.end))
    return EmbeddingVectors(f"{key}_out" if is_output else key, encoder, stored)


def is_output(embedding: EmbeddingPlan) -> bool:
    """True if the vectors belong behind the text encoder: only OneTrainer uses them so."""
    return any(vectors.key.endswith("_out") for vectors in embedding.vectors)


def _with_files(planned: Iterable[EmbeddingPlan]) -> Iterable[EmbeddingPlan]:
    taken: set[str] = set()
    for embedding in planned:
        stem = file_stem(embedding.token) + ("_out" if is_output(embedding) else "")
        name, number = stem, 1
        while name.casefold() in taken:  # there are file systems that do not tell case
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        yield dataclasses.replace(embedding, file=f"{name}.safetensors")


def file_stem(token: str) -> str:
    """`token` as a file name without ending that every file system takes: <s1> is s1.

    The web UIs take it for the word that calls the embedding up; ComfyUI's ends at a space.
    """
    plain = unicodedata.normalize("NFC", token.replace("<", "").replace(">", ""))
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in plain).strip(".")
    short = safe.encode("utf-8")[:_LONGEST_NAME].decode("utf-8", "ignore").strip(".")
    return f"_{short}" if not short or _RESERVED.fullmatch(short) else short


def embedding_notes(recipe: Recipe, uses: Iterable[AdapterUse], planned: Iterable[EmbeddingPlan]) -> Iterable[str]:
    """What the user should know about the embeddings, for Plan.notes."""
    if recipe.embeddings == "drop":
        for use in uses:
            if use.embeddings:
                yield f"{use.name}: token embeddings left out (--embeddings drop): {', '.join(use.embeddings)}"
    for embedding in planned:
        if is_output(embedding):
            yield (
                f"{embedding.file}: vectors that belong behind the text encoder; only OneTrainer uses them so, "
                f"a web UI would take them for an ordinary textual inversion"
            )
