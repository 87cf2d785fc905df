"""Embeddings and output heads of language models: what has to be stored apart, and what grew."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bake.errors import ShapeMismatch, Unsupported
from bake.identify.adapter import Adapter
from bake.identify.checkpoint import BaseIdentity
from bake.identify.tied import Tie, edited, tied_embeddings, untying_edits, vocabulary_edits
from bake.io.checkpoint import Checkpoint, check_stays
from bake.io.header import TensorInfo
from bake.io.tensorfile import TensorFile
from bake.plan.base import Base
from bake.plan.match import VOCABULARY_LEAVES, Matching
from bake.plan.model import Stored, Term

_PIECE = 4 * 1024 * 1024
# What an adapter saved beside its weights after the vocabulary grew.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)


def base_of(
    checkpoint: Checkpoint, identity: BaseIdentity, beside: frozenset[str] = frozenset()
) -> tuple[Base, Tie | None]:
    """(the base as matching sees it, the embedding of a language model that is its output head too).

    A head that is not stored is among the base's tensors all the same, so that adapters can change it.
    beside: tensors that belong to no module, such as the scales of a quantised base.
    """
    tensors = {name: info for name, _, info in checkpoint.tensors() if name not in beside}
    tie = None
    if [component.name for component in identity.components] == ["model"]:
        tie = tied_embeddings(checkpoint.configs.get("", {}), tensors.keys())
    is_virtual = tie is not None and not tie.head_stored and tie.refusal is None
    return Base.of(identity, tensors, {tie.head: tie.embedding} if tie is not None and is_virtual else {}), tie


def settle_heads(
    checkpoint: Checkpoint,
    tie: Tie | None,
    tensors: Mapping[str, TensorInfo],
    adapters: Sequence[tuple[int, Adapter]],
    matching: Matching,
) -> None:
    """Decide what becomes of a tied head that an adapter changes, and of a vocabulary that it lets grow.

    adapters: with their places among the inputs. Fills matching.added, .configs and .side_sources.
    Raises Unsupported where the two cannot be stored apart, ShapeMismatch if only one of them grew.
    """
    config = checkpoint.configs.get("", {})
    if tie is not None and tie.broken_by(matching.changed) and not _stays_tied(tie, adapters, matching):
        if tie.refusal is not None:
            raise Unsupported(
                f"the adapter updates {tie.embedding}, which this model also uses as its output head (tied "
                f"embeddings), and the two cannot be stored apart: {tie.refusal}.",
                tensor=tie.embedding,
            )
        config = _untie(tie, config, matching)
    config = _grow(config, tensors, adapters, tie, matching)
    if config != checkpoint.configs.get("", {}):
        matching.configs[""] = config


def _stays_tied(tie: Tie, adapters: Sequence[tuple[int, Adapter]], matching: Matching) -> bool:
    """True if the adapters change the head exactly as they change the embedding; then it is stored once."""
    embedding, head = (matching.terms.get(name, []) for name in (tie.embedding, tie.head))
    stored = [matching.replaced.get(name) for name in (tie.embedding, tie.head)]
    files = {place: adapter.source.file for place, adapter in adapters}
    if tie.head not in matching.changed:
        # PEFT trains single rows of both, and with ensure_weight_tying everything
        shared = all(
            term.algorithm == "set" or _ties(adapters, next(iter(term.factors.values())).input) for term in embedding
        )
        return stored[0] is None and shared
    if embedding and stored == [None, None] and _same_rows(embedding, head, files):
        if not tie.head_stored:
            del matching.terms[tie.head]
        return True
    if embedding or head or stored[0] is None or stored[1] is None:
        return False
    if _same_bytes(stored[0], stored[1], files):
        if not tie.head_stored:
            del matching.replaced[tie.head]
        return True
    return False


def _ties(adapters: Sequence[tuple[int, Adapter]], place: int) -> bool:
    config = next(adapter.config for number, adapter in adapters if number == place)
    return config is not None and config.ties_embeddings


def _same_rows(embedding: Sequence[Term], head: Sequence[Term], files: Mapping[int, TensorFile]) -> bool:
    """True if both get the same new values for the same rows, as PEFT stores trainable tokens of a tied head."""
    return len(embedding) == len(head) and all(
        one.algorithm == "set"
        and dataclasses.replace(one, module=two.module, factors=two.factors) == two
        and _same_bytes(one.factors["value"], two.factors["value"], files)
        for one, two in zip(embedding, head, strict=True)
    )


def _same_bytes(one: Stored, two: Stored, files: Mapping[int, TensorFile]) -> bool:
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    buffers = [bytearray(_PIECE), bytearray(_PIECE)]
    for offset in range(0, one.span[1] - one.span[0], _PIECE):
        size = min(_PIECE, one.span[1] - one.span[0] - offset)
        views = [memoryview(buffer)[:size] for buffer in buffers]
        for stored, view in zip((one, two), views, strict=True):
            files[stored.input].read_into(stored.span[0] + offset, view)
        if views[0] != views[1]:
            return False
    return True


def _untie(tie: Tie, config: Mapping[str, Any], matching: Matching) -> dict[str, Any]:
    """Store the head, and whatever else the tie had stand for one tensor, by itself."""
    if not tie.head_stored:
        matching.added[tie.head] = tie.embedding
    for name, source in tie.copies:
        matching.added[name] = source
        if source in matching.replaced:
            matching.replaced[name] = matching.replaced[source]
        if source in matching.terms:
            matching.terms[name] = matching.terms[source]
    matching.notes.append(
        f"{tie.embedding} was the output head as well; the two are stored apart now, "
        f"and config.json says so (tie_word_embeddings: false)"
    )
    return edited(config, untying_edits(config))


def _grow(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    adapters: Sequence[tuple[int, Adapter]],
    tie: Tie | None,
    matching: Matching,
) -> dict[str, Any]:
    """The configuration for embeddings that an adapter replaces by larger ones."""
    grown = dict(_grown(tensors, matching))
    if not grown:
        return dict(config)
    if len(set(grown.values())) > 1:
        sizes = ", ".join(f"{name} from {before} to {after}" for name, (before, after) in grown.items())
        raise ShapeMismatch(f"the adapter changes the vocabulary to different sizes: {sizes} rows")
    ((before, after),) = set(grown.values())
    left = next((name for name in tensors if _is_vocabulary(name, tensors[name], before) and name not in grown), None)
    if left is not None:
        raise ShapeMismatch(
            f"the adapter lets {min(grown)} grow from {before} to {after} rows, but not {left}: "
            f"the model could not be loaded. Save the adapter with both (save_embedding_layers=True).",
            tensor=left,
        )
    source = next(adapter for place, adapter in adapters if place == matching.replaced[min(grown)].input)
    folder = source.source.file.path.parent
    found = [name for name in _TOKENIZER_FILES if (folder / name).is_file()] if source.config is not None else []
    for name in found:
        check_stays(folder / name, folder)
        matching.side_sources[name] = folder / name
    tokenizer = "its tokenizer files are taken over" if found else "bring the tokenizer that goes with it"
    matching.notes.append(f"{source.source.name}: the vocabulary grows from {before} to {after} rows; {tokenizer}")
    return edited(config, vocabulary_edits(config, before, after))


def _grown(tensors: Mapping[str, TensorInfo], matching: Matching) -> Iterator[tuple[str, tuple[int, int]]]:
    """Tensor name -> (rows before, after), of the tensors that are replaced by longer ones."""
    for name, stored in matching.replaced.items():
        base = tensors.get(name) or tensors[matching.added[name]]
        if stored.shape != base.shape and math.prod(stored.shape) != math.prod(base.shape):
            yield name, (base.shape[0], stored.shape[0])


def _is_vocabulary(name: str, info: TensorInfo, rows: int) -> bool:
    """True for an embedding or head of as many rows as the vocabulary had."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    return len(info.shape) == 2 and info.shape[0] == rows and leaf in VOCABULARY_LEAVES
