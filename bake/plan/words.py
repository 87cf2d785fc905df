"""One word, as people type it, into what it means: LORA:0.8:te=0.5:lbw=MIDD, and alpha=0.3:te=0.5 of merges."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from bake.errors import Unsupported, UsageError
from bake.plan.prompt import STEPS
from bake.plan.recipe import AdapterChoice
from bake.plan.selection import Selection

Typed: TypeAlias = "float | bool | str | Selection | list[float]"

WEIGHT_KEYS = ("te", "unet")
# What these words call it -> what Selection.parse does. lbwe= takes the rest of the word.
SELECTION_KEYS = {"lbw": "values", "blocks": "scheme", "names": "names", "gradient": "gradient", "lbwe": "rules"}
_RULES = ":lbwe="  # rules have colons of their own, so they come last
_ADAPTER_KEYS = (*WEIGHT_KEYS, "dyn", *SELECTION_KEYS)
_SWITCHES = {"true": True, "false": False}


def parse_adapter(word: str, folder: Path | None = None) -> AdapterChoice:
    """What LORA[:WEIGHT][:KEY=VALUE]... means, read from the right, so that ':' in paths does no harm.

    folder: what relative paths start from; None: the current folder. Raises UsageError, or Unsupported for what only
    sampling can do.
    """
    text = word
    weight: float | None = None
    named: dict[str, float] = {}
    selected: dict[str, str] = {}

    def is_file(text: str) -> bool:
        return os.path.exists(text if folder is None else folder / text)

    if not is_file(text):
        text, found, rules = text.partition(_RULES)
        selected = {"lbwe": rules} if found else {}
    while not is_file(text) and ":" in text:
        head, _, last = text.rpartition(":")
        key, equals, setting = last.partition("=")
        if equals:
            if key in STEPS:
                raise Unsupported(f"{word}: {key}= switches a LoRA during sampling; a checkpoint cannot do that")
            if key not in _ADAPTER_KEYS:
                known = ", ".join(f"{each}=" for each in _ADAPTER_KEYS)
                raise UsageError(f"{word}: unknown setting {key}=; known are {known}")
            if key in named or key in selected:
                raise UsageError(f"{word}: {key}= is given twice")
            if key in SELECTION_KEYS:
                selected[key] = setting
            else:
                named[key] = _finite(setting, word)
        elif is_number(last):
            if weight is not None:
                raise UsageError(f"{word}: two weights; use te= and unet= for different ones")
            weight = _finite(last, word)
        else:
            break
        text = head
    limit = named.pop("dyn", None)
    if limit is not None and (limit != int(limit) or limit < 1):
        raise UsageError(f"{word}: dyn= is a whole number of ranks")
    return AdapterChoice(
        Path(text) if folder is None else folder / text,
        1.0 if weight is None else weight,
        **named,
        rank_limit=None if limit is None else int(limit),
        selection=_adapter_selection(selected, word),
    )


def _adapter_selection(selected: Mapping[str, str], word: str) -> Selection | None:
    if not selected:
        return None
    for key, setting in selected.items():
        if not setting.strip():
            raise UsageError(f"{word}: nothing after {key}=")
    if "blocks" in selected and "lbw" not in selected:
        raise UsageError(f"{word}: blocks= says how lbw= is read, and there is no lbw=")
    try:
        return Selection.parse(**{SELECTION_KEYS[key]: setting for key, setting in selected.items()})
    except UsageError as error:
        raise UsageError(f"{word}: {error.message}") from None


def is_number(text: str) -> bool:
    """True for what Python reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _finite(text: str, word: str) -> float:
    if not is_number(text) or not math.isfinite(float(text)):
        raise UsageError(f"{word}: {text.strip()!r} is not a finite number")
    return float(text)


def parse_parameter(word: str) -> tuple[str, int | None, Typed]:
    """What NAME[@MODEL][=VALUE][:KEY=VALUE]... means: the name, the number of the model or None, and the setting.

    Raises UsageError.
    """
    text, has_rules, rules = word.partition(_RULES)
    first, *parts = text.split(":")
    name, equals, given = first.partition("=")
    name, at, model = name.partition("@")
    if not name or (at and not model.isdecimal()) or not (equals or parts or has_rules):
        raise UsageError(f"{word}: not NAME=VALUE, nor NAME@MODEL=VALUE")
    setting: Typed = _value(given, word) if equals else ""
    if parts or has_rules:
        if equals and isinstance(setting, (bool, str, list)):
            raise UsageError(f"{word}: {given!r} is not a number, so parts of the model cannot differ from it")
        number = float(setting) if isinstance(setting, float) else None
        setting = _parameter_selection(number, parts, {"rules": rules} if has_rules else {}, word)
    return name, int(model) if at else None, setting


def _value(text: str, word: str) -> Typed:
    if text.lower() in _SWITCHES:
        return _SWITCHES[text.lower()]
    if "," in text and all(is_number(part) for part in text.split(",")):
        return [_finite(part, word) for part in text.split(",")]
    return _finite(text, word) if is_number(text) else text


def _parameter_selection(number: float | None, parts: Sequence[str], texts: dict[str, str], word: str) -> Selection:
    """What `parts`, KEY=VALUE each, say about parts of the model. texts: what Selection.parse is given beside."""
    components: dict[str, float] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals or not text.strip():
            raise UsageError(f"{word}: {part!r} is not KEY=VALUE")
        place = SELECTION_KEYS.get(key)
        if key in components or (place is not None and place in texts):
            raise UsageError(f"{word}: {key}= is given twice")
        if place is not None:
            texts[place] = text
        elif is_number(text):
            components[key] = _finite(text, word)
        else:
            known = ", ".join(SELECTION_KEYS)
            raise UsageError(f"{word}: {key}={text}: neither a number for a component nor one of {known}")
    if "scheme" in texts and "values" not in texts:
        raise UsageError(f"{word}: blocks= says how lbw= is read, and there is no lbw=")
    try:
        chosen = Selection.parse(**texts)
    except UsageError as error:
        raise UsageError(f"{word}: {error.message}") from None
    return Selection(
        number=number,
        components=tuple(components.items()),
        values=chosen.values,
        preset=chosen.preset,
        scheme=chosen.scheme,
        gradients=chosen.gradients,
        rules=chosen.rules,
        names=chosen.names,
    )
