"""Whether two language models mean the same words by the same rows of their embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bake.errors import Mismatch
from bake.io.checkpoint import read_json_object
from bake.plan.counterparts import Opened


def check_vocabularies(first: Opened, other: Opened) -> None:
    """Raise Mismatch if both are folders with a vocabulary and one means another word by a number than the other."""
    if not (first.identity.language_model and other.identity.language_model):
        return
    one, two = _vocabulary(first.checkpoint.root), _vocabulary(other.checkpoint.root)
    if not one or not two or one == two:
        return
    word = next(iter(sorted(one.keys() ^ two.keys()) or sorted(word for word in one if one[word] != two[word])))
    raise Mismatch(
        f"{first.name} and {other.name} have different vocabularies: {word!r} is "
        f"{' and '.join(_number(words.get(word)) for words in (one, two))}. Their embeddings cannot be merged.",
        word=word,
        models=[first.name, other.name],
    )


def _number(found: int | None) -> str:
    return "no word" if found is None else f"number {found}"


def _vocabulary(folder: Path) -> dict[str, int]:
    """word -> number, without what was added later; {} if the folder does not tell in JSON."""
    if (folder / "tokenizer.json").is_file():
        return _listed(read_json_object(folder / "tokenizer.json").get("model"))
    if (folder / "vocab.json").is_file():
        return _numbered(read_json_object(folder / "vocab.json"))
    return {}


def _listed(model: Any) -> dict[str, int]:
    """The vocabulary of a tokenizer.json: an object, or a list of words with their likelihoods."""
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, list):
        return {str(entry[0]): place for place, entry in enumerate(words) if isinstance(entry, list) and entry}
    return _numbered(words) if isinstance(words, dict) else {}


def _numbered(words: dict[str, Any]) -> dict[str, int]:
    return {word: number for word, number in words.items() if isinstance(number, int)}
