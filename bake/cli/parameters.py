"""NAME=VALUE of `bake merge -p`: numbers, words, and numbers for parts of a model, in the words of `-l`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import click

from bake.cli.options import SELECTION_KEYS, is_number
from bake.errors import UsageError
from bake.merges import METHODS
from bake.plan.selection import Selection

Setting: TypeAlias = "float | bool | str | Selection | list[float]"

_RULES = ":lbwe="  # rules have colons of their own, so they come last
_SWITCHES = {"true": True, "false": False}


class ParameterSetting(click.ParamType):
    """NAME[@MODEL][=VALUE][:KEY=VALUE]...; converts to (name, number of the model or None, setting)."""

    name = "parameter"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int | None, Setting]:
        if isinstance(value, tuple):
            return value
        text, has_rules, rules = str(value).partition(_RULES)
        first, *parts = text.split(":")
        name, equals, given = first.partition("=")
        name, at, model = name.partition("@")
        if not name or (at and not model.isdecimal()) or not (equals or parts or has_rules):
            self.fail(f"{value}: not NAME=VALUE, nor NAME@MODEL=VALUE", param, ctx)
        setting: Setting = _value(given) if equals else ""
        if parts or has_rules:
            if not (setting == "" and not equals) and (isinstance(setting, (bool, str, list))):
                self.fail(
                    f"{value}: {given!r} is not a number, so parts of the model cannot differ from it", param, ctx
                )
            number = float(setting) if isinstance(setting, float) else None
            try:
                setting = _selection(number, parts, rules, bool(has_rules))
            except UsageError as error:
                self.fail(f"{value}: {error.message}", param, ctx)
        return name, int(model) if at else None, setting


def _value(text: str) -> Setting:
    if text.lower() in _SWITCHES:
        return _SWITCHES[text.lower()]
    if "," in text and all(is_number(part) for part in text.split(",")):
        return [_finite(part) for part in text.split(",")]
    return _finite(text) if is_number(text) else text


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise UsageError(f"-p: {text.strip()} is not a finite number")
    return float(text)


def _selection(number: float | None, parts: Sequence[str], rules: str, has_rules: bool) -> Selection:
    """What `parts`, KEY=VALUE each, say about parts of the model."""
    texts: dict[str, str] = {"rules": rules} if has_rules else {}
    components: dict[str, float] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals or not text.strip():
            raise UsageError(f"{part!r} is not KEY=VALUE")
        place = SELECTION_KEYS.get(key)
        if key in components or (place is not None and place in texts):
            raise UsageError(f"{key}= is given twice")
        if place is not None:
            texts[place] = text
        elif is_number(text):
            components[key] = _finite(text)
        else:
            raise UsageError(f"{key}={text}: neither a number for a component nor one of {', '.join(SELECTION_KEYS)}")
    if "scheme" in texts and "values" not in texts:
        raise UsageError("blocks= says how lbw= is read, and there is no lbw=")
    chosen = Selection.parse(**texts)
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


def joined(method: str, settings: Sequence[tuple[str, int | None, Setting]], models: int) -> dict[str, Any]:
    """parameter -> its setting; those for one model become a list with one for each. Raises UsageError."""
    found: dict[str, Any] = {}
    apart: dict[str, dict[int, Setting]] = {}
    known = {each.name: each for each in METHODS[method].parameters} if method in METHODS else {}
    for name, model, setting in settings:
        if model is None:
            if name in found:
                raise UsageError(f"-p {name} is given twice")
            found[name] = setting
        elif name in known and not known[name].per_model:
            raise UsageError(f"-p {name}@{model}: {name} is the same for all models")
        elif not 1 <= model <= models:
            raise UsageError(f"-p {name}@{model}: there are {models} models, the base not counted")
        elif model in apart.setdefault(name, {}):
            raise UsageError(f"-p {name}@{model} is given twice")
        else:
            apart[name][model] = setting
    for name, own in apart.items():
        rest = found.get(name, known[name].default if name in known else None)
        each = rest if isinstance(rest, list) else [rest] * models
        if len(each) != models:
            raise UsageError(f"-p {name} has {len(each)} numbers for {models} models; give one, or one for each")
        found[name] = [own.get(number + 1, each[number]) for number in range(models)]
        if None in found[name]:
            raise UsageError(f"-p {name}@{found[name].index(None) + 1} is missing: {name} has no default")
    return found
