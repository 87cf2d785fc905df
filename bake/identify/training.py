"""What the trainer wrote down: trigger words, and the facts of the training worth a line.

Metadata is text that a stranger put into the file. Nothing here raises, and nothing is read without
a limit: what cannot be understood is listed as unread.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple

_LONGEST_TEXT = 200  # characters of a trigger, a tag or a fact
_LONGEST_JSON = 2 * 1024 * 1024  # characters; the tags of ten thousand captions take a tenth of it
_MOST_TRIGGERS = 20
_MOST_TAGS = 10
_ABSENT = {"", "none", "null", "{}", "[]"}  # how trainers write that something was not set

# Keys whose value is the trigger itself, or a JSON list of triggers.    written by
_TRIGGER_KEYS = (
    "modelspec.trigger_phrase",  #                                       ModelSpec: kohya, OneTrainer, SimpleTuner
    "trigger_phrase",
    "trigger_word",  #                                                   ai-toolkit's configuration
    "trigger_words",
    "ss_trigger_words",  #                                               model managers
    "ss_trigger_word",
    "activation text",  #                                                A1111's card of the adapter
    "instance_prompt",  #                                                diffusers' DreamBooth scripts
)
_REPEATED = re.compile(r"\d+_(.+)", re.DOTALL)  # kohya's image folders: "10_sks dog" is "sks dog", ten times


class Trigger(NamedTuple):
    """Words that call the adapter in a prompt."""

    text: str
    source: str  # the metadata key, with the folder where the words are a folder's name


class Fact(NamedTuple):
    """Where one fact of the training is written, by the tools that write it; the first present counts."""

    name: str
    keys: tuple[str, ...]  # "key/inner": a field of the JSON object under "key"


FACTS = (
    Fact("title", ("modelspec.title", "ss_output_name", "name")),
    Fact(
        "base_model",
        ("base_model_name_or_path", "modelspec.base_model", "ss_sd_model_name", "ot_config/base_model_name"),
    ),
    Fact("base_version", ("ss_base_model_version",)),
    Fact("architecture", ("modelspec.architecture",)),
    Fact("network", ("ss_network_module",)),
    Fact("network_dim", ("ss_network_dim", "ot_config/lora_rank")),
    Fact("network_alpha", ("ss_network_alpha", "ot_config/lora_alpha")),
    Fact("network_args", ("ss_network_args",)),
    Fact("resolution", ("modelspec.resolution", "ss_resolution", "ot_config/resolution")),
    Fact("steps", ("ss_steps", "training_info/step", "ss_max_train_steps")),
    Fact("epochs", ("ss_epoch", "training_info/epoch", "ss_num_epochs")),
    Fact("images", ("ss_num_train_images",)),
    Fact("prediction", ("modelspec.prediction_type",)),
    Fact("software", ("software/name", "software")),
    Fact("software_version", ("software/version", "ss_sd_scripts_commit_hash", "ot_revision")),
    Fact("date", ("modelspec.date", "ss_training_finished_at", "ss_training_started_at")),
    Fact("author", ("modelspec.author",)),
    Fact("license", ("modelspec.license",)),
    Fact("description", ("modelspec.description",)),
    Fact("comment", ("ss_training_comment",)),
)


@dataclass(frozen=True)
class Training:
    """What the metadata of an adapter says about its making."""

    triggers: tuple[Trigger, ...]
    tags: tuple[tuple[str, int], ...]  # the captions' most frequent tags with their counts
    facts: dict[str, str]  # name of a row of FACTS -> value
    unread: tuple[str, ...]  # metadata keys whose value is not what it should be, each with the reason

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {
            "triggers": [trigger._asdict() for trigger in self.triggers],
            "tags": [{"tag": tag, "count": count} for tag, count in self.tags],
            "facts": self.facts,
            "unread": list(self.unread),
        }


def training_of(metadata: Mapping[str, str]) -> Training:
    """The trigger words and training facts in an adapter's metadata. Never raises.

    metadata: of the file, texts of an adapter_config.json beside them.
    Source: kohya sd-scripts train_network.py (ss_*), Stability's ModelSpec 1.0, ai-toolkit
    jobs/process/BaseSDTrainProcess.py, OneTrainer's model savers (ot_*).
    """
    reader = _Reader(metadata)
    triggers: dict[str, Trigger] = {}
    for trigger in _triggers(reader):
        triggers.setdefault(trigger.text.casefold(), trigger)
    tags = _tags(reader)
    facts = {fact.name: text for fact in FACTS if (text := _fact(reader, fact)) is not None}
    return Training(tuple(triggers.values())[:_MOST_TRIGGERS], tags, facts, tuple(reader.unread.values()))


class _Reader:
    """Metadata, with each JSON value read once and under a limit."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.metadata = metadata
        self.unread: dict[str, str] = {}
        self._parsed: dict[str, Any] = {}

    def text(self, key: str) -> str | None:
        return _short(self.metadata.get(key))

    def json(self, key: str, kind: type) -> Any:
        """The JSON value under `key` if it is a `kind`, else an empty one."""
        if key not in self._parsed:
            self._parsed[key] = self._parse(key, kind)
        found = self._parsed[key]
        return found if isinstance(found, kind) else kind()

    def _parse(self, key: str, kind: type) -> Any:
        text = self.metadata.get(key, "")
        if not isinstance(text, str) or text.strip().casefold() in _ABSENT:
            return None
        if len(text) > _LONGEST_JSON:
            self.unread[key] = f"{key}: {len(text)} characters, more than any trainer writes"
            return None
        found = _loads(text)
        if not isinstance(found, kind):
            self.unread[key] = f"{key}: no JSON {'object' if kind is dict else 'list'}"
        return found


def _loads(text: str) -> Any:
    """The JSON value of `text`, or None."""
    try:
        # Reading a number of a million digits would take minutes, and no count has twenty.
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else 0)
    except (ValueError, RecursionError):
        return None


def _triggers(reader: _Reader) -> list[Trigger]:
    """Every trigger the metadata names, the most explicit first."""
    found = [Trigger(text, key) for key in _TRIGGER_KEYS for text in _words(reader.metadata.get(key))]
    for folder in reader.json("ss_tag_frequency", dict):
        found += _from_folder(folder, "ss_tag_frequency")
    for folder in reader.json("ss_dataset_dirs", dict):
        found += _from_folder(folder, "ss_dataset_dirs")
    for dataset in reader.json("ss_datasets", list):
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        for subset in subsets if isinstance(subsets, list) else ():
            text = _short(subset.get("class_tokens")) if isinstance(subset, dict) else None
            found += [Trigger(text, "ss_datasets: class_tokens")] if text is not None else []
    return found


def _words(value: Any) -> list[str]:
    """A trigger as it stands, or the texts of a JSON list. Commas stay: a phrase may hold some."""
    if isinstance(value, str) and value.lstrip().startswith("[") and len(value) <= _LONGEST_JSON:
        listed = _loads(value)
        if isinstance(listed, list):
            return [text for item in listed[:_MOST_TRIGGERS] if (text := _short(item)) is not None]
    text = _short(value)
    return [] if text is None else [text]


def _from_folder(folder: str, key: str) -> list[Trigger]:
    """The words in an image folder's name, where it follows kohya's pattern."""
    match = _REPEATED.fullmatch(folder)
    text = _short(match[1]) if match is not None else None
    return [] if text is None else [Trigger(text, f"{key}: {_short(folder)}")]


def _tags(reader: _Reader) -> tuple[tuple[str, int], ...]:
    counts: Counter[str] = Counter()
    for tags in reader.json("ss_tag_frequency", dict).values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            text = _short(tag)
            if text is not None and isinstance(count, int) and count > 0:
                counts[text] += count
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_TAGS])


def _fact(reader: _Reader, fact: Fact) -> str | None:
    for key in fact.keys:
        outer, inner, field = key.partition("/")
        if not inner:
            text = reader.text(outer)
        elif reader.metadata.get(outer, "").lstrip().startswith("{"):
            text = _short(reader.json(outer, dict).get(field))
        else:
            text = None
        if text is not None:
            return _as_date(text) if fact.name == "date" else text
    return None


def _as_date(text: str) -> str:
    """Seconds since 1970, as kohya writes them, as a date in UTC; other texts as they are."""
    try:
        return datetime.fromtimestamp(float(text), timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return text


def _short(value: Any) -> str | None:
    """A text or number in one line of bounded length; None for what says nothing or is neither."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    text = " ".join((value if isinstance(value, str) else str(value))[: 4 * _LONGEST_TEXT].split())
    if text.casefold() in _ABSENT:
        return None
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."
