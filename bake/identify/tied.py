"""Tied embeddings: one stored tensor that a model uses twice, as input embedding and as output head.

An adapter that changes only one of the two unties them: both have to be stored, and config.json has to
say so. What each architecture then needs was checked against transformers 5, see the tests.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_FLAG = "tie_word_embeddings"
_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
_NESTED = ("text_config", "llm_config", "language_config")  # where vision-language models keep the decoder's settings

_SCALED = (
    "T5 multiplies the decoder's output by d_model ** -0.5 in front of a tied head and takes "
    "tie_word_embeddings=false to mean that it must not, so an untied copy would give other logits"
)
_BARE = (
    "the file names its tensors without the prefix of the model, and transformers before 5 looks for a head "
    "under that prefix too, so it would start from random values. Save the base with its language-model class first"
)
_UNKNOWN_USE = "no config.json says whether this model uses it as its output head too; give the folder that has one"
_UNKNOWN_HEAD = "the name of this model's output head is not known to bake"


class _Pair(NamedTuple):
    """An input embedding and the head that is tied to it."""

    embedding: str
    head: str
    copies: tuple[tuple[str, str], ...] = ()  # (tensor, what it equals): tied by the same setting
    refusal: str | None = None


def _masked(model: str, head: str) -> _Pair:
    above = head.removesuffix(".decoder")
    return _Pair(f"{model}.embeddings.word_embeddings.weight", f"{head}.weight", ((f"{head}.bias", f"{above}.bias"),))


# The first row whose embedding is stored wins. Source: _tied_weights_keys of the model classes in transformers 5.
_PAIRS = (
    _Pair("model.language_model.embed_tokens.weight", "lm_head.weight"),
    _Pair("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    _Pair("model.embed_tokens.weight", "lm_head.weight"),
    _Pair("transformer.wte.weight", "lm_head.weight"),
    _Pair("transformer.word_embeddings.weight", "lm_head.weight"),
    _Pair("gpt_neox.embed_in.weight", "embed_out.weight"),
    _Pair("backbone.embeddings.weight", "lm_head.weight"),
    _masked("bert", "cls.predictions.decoder"),
    _masked("deberta", "cls.predictions.decoder"),
    _masked("roberta", "lm_head.decoder"),
    _masked("albert", "predictions.decoder"),
    _Pair("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    _Pair("electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"),
    _Pair("model.embeddings.tok_embeddings.weight", "decoder.weight"),
    _Pair(
        "model.shared.weight",
        "lm_head.weight",
        tuple((f"model.{half}.embed_tokens.weight", "model.shared.weight") for half in ("encoder", "decoder")),
    ),
    _Pair("model.decoder.embed_tokens.weight", "lm_head.weight"),
    _Pair("shared.weight", "lm_head.weight", refusal=_SCALED),
    _Pair("wte.weight", "lm_head.weight", refusal=_BARE),
    _Pair("word_embeddings.weight", "lm_head.weight", refusal=_BARE),
    _Pair("embed_tokens.weight", "lm_head.weight", refusal=_BARE),
)
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight")
_WHISPER = _Pair("model.decoder.embed_tokens.weight", "proj_out.weight")


@dataclass(frozen=True, slots=True)
class Tie:
    """An embedding that is also the output head."""

    embedding: str  # the stored tensor
    head: str  # the head's tensor; one of that name exists in the file only if `head_stored`
    head_stored: bool
    copies: tuple[tuple[str, str], ...] = ()  # (tensor, stored tensor it equals): to be stored as well once untied
    refusal: str | None = None  # why the two cannot be stored apart, if they cannot

    def broken_by(self, changed: Collection[str]) -> bool:
        """True if updates of these tensors change the embedding or the head."""
        return self.embedding in changed or self.head in changed


Edit = tuple[tuple[str, ...], Any]  # (path of keys in config.json, new value)


def tied_embeddings(config: Mapping[str, Any], names: Collection[str]) -> Tie | None:
    """The tie in a model with this config.json (empty: none) and these tensors; None if nothing is tied.

    Where the head is stored although the configuration ties it, or does not say, the tie counts:
    releases of transformers disagree about which of the two tensors is used.
    """
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    tied = _is_tied(config)
    if tied is False or (architecture and not architecture.endswith(_GENERATORS)):
        return None
    pair = _pair(architecture, names)
    if pair is None:
        return None
    if not architecture and not tied:
        return None if pair.head in names else Tie(pair.embedding, pair.head, False, refusal=_UNKNOWN_USE)
    copies = tuple((name, source) for name, source in pair.copies if name not in names and source in names)
    return Tie(pair.embedding, pair.head, pair.head in names, copies, pair.refusal)


def _pair(architecture: str, names: Collection[str]) -> _Pair | None:
    rows = (_WHISPER,) if architecture.startswith("Whisper") else _PAIRS
    for row in rows:
        if row.embedding in names:
            return row
    unlisted = min(filter(_EMBEDDING.fullmatch, names), default=None)
    return None if unlisted is None else _Pair(unlisted, "", refusal=_UNKNOWN_HEAD)


def _is_tied(config: Mapping[str, Any]) -> bool | None:
    """What the configuration says; None if nothing. A nested True wins, as it does in transformers 5."""
    found = [part[_FLAG] for _, part in _parts(config) if isinstance(part.get(_FLAG), bool)]
    return any(found) if found else None


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The configuration and those nested in it that are about the text decoder, with their paths."""
    yield (), config
    for key, part in config.items():
        if isinstance(part, Mapping) and (key in _NESTED or _FLAG in part):
            yield (key,), part


def untying_edits(config: Mapping[str, Any]) -> tuple[Edit, ...]:
    """The changes to config.json that make transformers load embedding and head apart."""
    return tuple(((*path, _FLAG), False) for path, _ in _parts(config))


def vocabulary_edits(config: Mapping[str, Any], before: int, after: int) -> tuple[Edit, ...]:
    """The changes to config.json for an embedding that grew from `before` to `after` rows."""
    return tuple(
        ((*path, "vocab_size"), after) for path, part in _parts(config) if part.get("vocab_size") == before != after
    )


def edited(config: Mapping[str, Any], edits: Collection[Edit]) -> dict[str, Any]:
    """A copy of `config` with the edits made."""
    result: dict[str, Any] = copy.deepcopy(dict(config))
    for (*above, key), value in edits:
        part = result
        for name in above:
            part = part[name]
        part[key] = value
    return result
