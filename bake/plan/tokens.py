"""New words for a diffusers folder: rows for the token embedding, entries for tokenizer and configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bake.errors import FolderError, InputError, ShapeMismatch, Unsupported, UsageError
from bake.identify.checkpoint import BaseIdentity
from bake.io.checkpoint import Checkpoint, read_json_object
from bake.io.header import TensorInfo
from bake.keys.modules import Component
from bake.plan.model import EmbeddingPlan, EmbeddingVectors, Stored
from bake.plan.recipe import Recipe, is_text_encoder

_TOKEN_EMBEDDING = "embeddings.token_embedding.weight"
_SLOTS = {"clip_l": "te1", "clip_g": "te2"}  # text encoder -> where diffusers keeps it
_END_OF_WORD = "</w>"
_END_OF_TEXT = "<|endoftext|>"
_OLD_END = 2  # eos_token_id of CLIP configurations written before transformers 4.31


@dataclass(frozen=True)
class Growth:
    """What added tokens change in a folder."""

    rows: dict[str, tuple[Stored, ...]] = field(default_factory=dict)  # full tensor name -> vectors to append
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # group -> its config.json, as it is to be
    contents: dict[str, str] = field(default_factory=dict)  # relative path -> text of a file, new or replaced

    def appended(self, name: str, info: TensorInfo) -> tuple[tuple[int, ...], tuple[Stored, ...]]:
        """(shape in the output, vectors to append) of the base's tensor `name`."""
        appended = self.rows.get(name, ())
        more = sum(stored.as_rows[0] for stored in appended)
        return (info.shape[0] + more, *info.shape[1:]) if appended else info.shape, appended


def grow(
    recipe: Recipe, checkpoint: Checkpoint, identity: BaseIdentity, planned: Sequence[EmbeddingPlan]
) -> tuple[tuple[EmbeddingPlan, ...], Growth]:
    """The embeddings with the tokens that stand for them, and what adding these changes in the folder.

    A token of several vectors becomes `token`, `token_1`, ... as in diffusers' load_textual_inversion.
    Raises UsageError for tokens that exist already, ShapeMismatch for vectors that fit no text encoder,
    Unsupported for tokenizers and vectors that cannot be added, FolderError for folders that lack a part.
    """
    vocabularies: dict[str, _Vocabulary] = {}
    growth = Growth()
    added = []
    for embedding in planned:
        vectors = []
        for each in embedding.vectors:
            component = _component_of(embedding, each, checkpoint, identity)
            if not recipe.wants(component.name):
                raise UsageError(
                    f"--embeddings add would change {component.name}, which --only leaves out; use --embeddings beside"
                )
            if component.name not in vocabularies:
                vocabularies[component.name] = _Vocabulary(checkpoint, component)
            vocabulary = vocabularies[component.name]
            tokens = vocabulary.add(embedding.token, each.stored.as_rows[0])
            growth.rows[vocabulary.tensor] = (*growth.rows.get(vocabulary.tensor, ()), each.stored)
            vectors.append(dataclasses.replace(each, tokens=tokens))
        added.append(dataclasses.replace(embedding, vectors=tuple(vectors)))
    for vocabulary in vocabularies.values():
        growth.configs[vocabulary.group] = vocabulary.config()
        growth.contents.update(vocabulary.files())
    return tuple(added), growth


def _component_of(
    embedding: EmbeddingPlan, vectors: EmbeddingVectors, checkpoint: Checkpoint, identity: BaseIdentity
) -> Component:
    """The text encoder of the base that these vectors are for: by name, and where there is none, by width."""
    instead = "Use --embeddings beside or drop."
    if vectors.key.endswith("_out"):
        raise Unsupported(
            f"{embedding.token}: its vectors belong behind the text encoder, where no token can put them. {instead}",
            token=embedding.token,
        )
    slot = _SLOTS.get(vectors.key)
    if slot is None and vectors.key == vectors.encoder:
        raise Unsupported(
            f"{embedding.token}: its vectors are for {vectors.encoder}, but only CLIP takes new tokens. {instead}",
            token=embedding.token,
        )
    widths = {
        component: info.shape[1]
        for component in identity.components
        if is_text_encoder(component.name) and component.naming == "hf clip"
        for name, _, info in checkpoint.tensors()
        if name.startswith(component.prefix) and name.endswith(_TOKEN_EMBEDDING) and len(info.shape) == 2
    }
    wanted = vectors.stored.as_rows[1]
    fitting = [which for which, width in widths.items() if width == wanted and slot in (None, which.name)]
    if len(fitting) != 1:
        has = ", ".join(f"{which.name} with {width}" for which, width in widths.items()) or "none that can take tokens"
        raise ShapeMismatch(
            f"{embedding.token}: vectors of {wanted} numbers{f' for {slot}' if slot else ''} fit "
            f"{'more than one' if fitting else 'no'} text encoder of the base (it has {has}). {instead}",
            token=embedding.token,
        )
    return fitting[0]


class _Vocabulary:
    """The words of one text encoder: those its tokenizer knows, and those that are added."""

    def __init__(self, checkpoint: Checkpoint, component: Component) -> None:
        """Read the tokenizer that belongs to `component`."""
        self.group = component.prefix
        self._folder = component.prefix.replace("text_encoder", "tokenizer")
        self._checkpoint = checkpoint
        self.tensor, rows = next(
            (name, info.shape[0])
            for name, _, info in checkpoint.tensors()
            if name.startswith(component.prefix) and name.endswith(_TOKEN_EMBEDDING)
        )
        try:
            self._words = _numbered(self._read("vocab.json") or _words_of(self._read("tokenizer.json")))
            self._known = {**self._words, **_numbered(self._added_before())}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{checkpoint.root}: the tokenizer in {self._folder} is malformed: {type(error).__name__} {error}",
                path=str(checkpoint.root),
            ) from None
        if not self._words:
            raise Unsupported(
                f"{checkpoint.root}: {self._folder or component.name} has no vocab.json and no tokenizer.json, "
                f"so no token can be added. Use --embeddings beside.",
                path=str(checkpoint.root),
            )
        if component.prefix not in checkpoint.configs:
            raise FolderError(f"{checkpoint.root}: {self.group}config.json is missing", path=str(checkpoint.root))
        count = len(set(self._known.values()))
        if set(self._known.values()) != set(range(rows)):
            raise FolderError(
                f"{checkpoint.root}: {self._folder} knows {count} tokens, {self.tensor} has {rows} rows: they do not "
                f"belong together, or there are rows without a token. Use --embeddings beside.",
                path=str(checkpoint.root),
            )
        self._next = rows
        self._meant = {word.lower() for word in self._known}  # tokenizers of CLIP do not tell case
        self._new: dict[str, int] = {}

    def _read(self, name: str) -> dict[str, Any]:
        path = self._checkpoint.root / self._folder / name
        return read_json_object(path) if path.is_file() else {}

    def _added_before(self) -> dict[str, Any]:
        """Tokens that were added to the base earlier, in any of the places where tokenizers keep them."""
        decoder = self._read("tokenizer_config.json").get("added_tokens_decoder", {})
        listed = self._read("tokenizer.json").get("added_tokens", [])
        return {
            **self._read("added_tokens.json"),
            **{str(entry["content"]): int(number) for number, entry in decoder.items()},
            **{str(entry["content"]): entry["id"] for entry in listed},
        }

    def add(self, token: str, count: int) -> tuple[str, ...]:
        """The tokens for `count` vectors. Raises UsageError if one of them means something already."""
        tokens = (token, *(f"{token}_{number}" for number in range(1, count)))
        for each in tokens:
            if each.lower() in {new.lower() for new in self._new}:
                raise UsageError(
                    f"the adapters carry more than one embedding for {each}; a model can know only one. Give one of "
                    f"them, or use --embeddings beside."
                )
            if {each.lower(), each.lower() + _END_OF_WORD} & self._meant:
                raise UsageError(
                    f"{each} is a word of the base's {self._folder.rstrip('/')} already; adding it would change what "
                    f"prompts mean. Use --embeddings beside."
                )
            self._new[each] = self._next
            self._next += 1
        return tokens

    def config(self) -> dict[str, Any]:
        """The text encoder's config.json with the size of the grown vocabulary.

        An eos_token_id of 2 makes transformers take the highest id for the end of the text, which an added
        token would then be: it is set right (transformers modeling_clip.py, CLIPTextTransformer).
        """
        config = {**self._checkpoint.configs[self.group], "vocab_size": self._next}
        end = self._words.get(_END_OF_TEXT)
        if config.get("eos_token_id") == _OLD_END and end is not None:
            config["eos_token_id"] = end
        return config

    def files(self) -> dict[str, str]:
        """The tokenizer's files that change, as they are to be, by relative path.

        Slow and fast tokenizers, old and new ones, look for added tokens in different files.
        """
        entries = {token: _entry(token) for token in self._new}
        files: dict[str, dict[str, Any]] = {"added_tokens.json": {**self._read("added_tokens.json"), **self._new}}
        settings = self._read("tokenizer_config.json")
        if "added_tokens_decoder" in settings:
            decoder = {str(number): entries[token] for token, number in self._new.items()}
            settings["added_tokens_decoder"] = {**settings["added_tokens_decoder"], **decoder}
            files["tokenizer_config.json"] = settings
        fast = self._read("tokenizer.json")
        if fast:
            listed = [{"id": number, **entries[token]} for token, number in self._new.items()]
            files["tokenizer.json"] = {**fast, "added_tokens": [*fast.get("added_tokens", []), *listed]}
        return {
            self._folder + name: json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            for name, content in files.items()
        }


def _words_of(fast: Mapping[str, Any]) -> dict[str, Any]:
    """The vocabulary in a tokenizer.json; nothing if it is of a kind that has no table of words."""
    words = fast.get("model", {}).get("vocab")
    return words if isinstance(words, dict) else {}


def _numbered(words: Mapping[str, Any]) -> dict[str, int]:
    """`words` with their numbers; raises TypeError for anything else."""
    for word, number in words.items():
        if type(number) is not int:
            raise TypeError(f"{word!r} has no number")
    return dict(words)


def _entry(token: str) -> dict[str, Any]:
    """An added token as `tokenizer.add_tokens(token)` makes it."""
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }
