"""NAME=VALUE of `bake merge -p`: numbers, words, and numbers for parts of a model, in the words of `-l`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from bake.errors import UsageError
from bake.merges import METHODS
from bake.plan.words import Typed, parse_parameter


class ParameterSetting(click.ParamType):
    """NAME[@MODEL][=VALUE][:KEY=VALUE]...; converts to (name, number of the model or None, setting)."""

    name = "parameter"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int | None, Typed]:
        if isinstance(value, tuple):
            return value
        try:
            return parse_parameter(str(value))
        except UsageError as error:
            self.fail(error.message, param, ctx)


def joined(method: str, settings: Sequence[tuple[str, int | None, Typed]], models: int) -> dict[str, Any]:
    """parameter -> its setting; those for one model become a list with one for each. Raises UsageError."""
    found: dict[str, Any] = {}
    apart: dict[str, dict[int, Typed]] = {}
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
