"""What a merge method is, for those who plan, check and document one: no maths, no torch."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from bake.merges.merge import Merge

# How much has to be known before an element can be computed. `element`: the same element of every model; `row`: its
# row of the tensor; `two-pass`: numbers that one or more passes over the tensor collect; `whole`: the tensor at
# once, in memory; `global`: numbers that a pass over every tensor of the models collects.
Reach = Literal["element", "row", "two-pass", "whole", "global"]

Value: TypeAlias = "float | bool | str | tuple[float, ...]"
Values: TypeAlias = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Role:
    """What a model is in a method."""

    name: str
    optional: bool = False
    at_least: int | None = None  # for a role that several models have: the smallest number of them; None: one model
    at_most: int | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number, switch or word that a method takes."""

    name: str
    default: float | bool | str | None  # None: it has to be given
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # `low` itself is not allowed
    whole: bool = False  # whole numbers only
    choices: tuple[str, ...] = ()  # for words
    per_model: bool = False  # one number for all models of the last role, or one for each

    @property
    def span(self) -> str:
        """What may be given, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if isinstance(self.default, bool):
            return "true, false"
        if math.isinf(self.low) and math.isinf(self.high):
            return "any number"
        over = f"{'above' if self.above else 'from'} {self.low:g}"
        return over if math.isinf(self.high) else f"{over} to {self.high:g}"

    def check(self, value: object) -> float | bool | str:
        """Return one given value. Raises ValueError if it is none that may be given."""
        if self.choices:
            fits = value in self.choices
        elif isinstance(self.default, bool):
            fits = isinstance(value, bool)
        else:
            fits = self._is_number_allowed(value)
        if not fits:
            raise ValueError(f"{self.name} is {value!r}; it can be: {self.span}")
        assert isinstance(value, (float, int, str))
        return value

    def _is_number_allowed(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        if self.whole and value != int(value):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)


def never(values: Values, count: int) -> int | None:
    """No values leave one of the models as it is."""
    return None


def fine(values: Values) -> None:
    """All values go together."""


@dataclass(frozen=True, slots=True)
class Method:
    """One line of `bake.merges.METHODS`: a merge method, ready to be planned."""

    name: str
    meaning: str
    formula: str  # in the letters of the docs: A, B, C are models, W0 the base, d = W - W0
    reach: Reach
    roles: tuple[Role, ...]  # in the order in which the models are given; the last one may be several models'
    maths: str  # "module.Class" in this folder
    parameters: tuple[Parameter, ...] = ()
    fixed: Values = field(default_factory=dict)  # further values, which tell apart methods that share their maths
    symmetric: bool = False  # in the models of the last role, each with its own parameters
    # (values, number of models) -> the place of the one model whose bytes are the result, None if there is none
    alone: Callable[[Values, int], int | None] = never
    rule: Callable[[Values], None] = fine  # raises ValueError for values that do not go together
    peers: str = ""  # what other tools call it

    @property
    def least(self) -> int:
        """The smallest number of models."""
        return sum(role.at_least or 1 for role in self.roles if not role.optional)

    @property
    def most(self) -> int | None:
        """The largest number of models; None: there is none."""
        if any(role.at_least is not None and role.at_most is None for role in self.roles):
            return None
        return sum(role.at_most or 1 for role in self.roles)

    def roles_of(self, count: int, with_optional: bool = False) -> tuple[str, ...]:
        """The role of each of `count` models, in their order. Raises ValueError if the method cannot take so many.

        with_optional: the model of the optional role is among them.
        """
        taken = [role for role in self.roles if with_optional or not role.optional]
        many = next((role for role in taken if role.at_least is not None), None)
        extra = count - len(taken)
        if many is None:
            fits = extra == 0
        else:
            fits = extra + 1 >= (many.at_least or 0) and (many.at_most is None or extra + 1 <= many.at_most)
        if not fits:
            raise ValueError(f"{self.name} takes {self.models}, and here are {count}")
        names: list[str] = []
        for role in taken:
            names += [role.name] * (extra + 1 if role is many else 1)
        return tuple(names)

    @property
    def models(self) -> str:
        """The models it takes, in words."""
        return ", ".join(_in_words(role) for role in self.roles)

    def values(self, given: Mapping[str, object], roles: Sequence[str]) -> dict[str, Value]:
        """Every value that the maths reads, from what was `given` for the models of these `roles`.

        Numbers per model become a tuple of one for each model of the last role. Raises ValueError for an
        unknown name, a number out of range, a missing one, a wrong number of them, or values that do not agree.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in given:
            if name not in known:
                raise ValueError(f"{self.name} has no parameter {name}; it has: {', '.join(known) or 'none'}")
        count = sum(role == self.roles[-1].name for role in roles)
        found: dict[str, Value] = dict(self.fixed)
        for name, parameter in known.items():
            value = given.get(name, parameter.default)
            if value is None:
                raise ValueError(f"{self.name} needs {name}: {parameter.meaning} ({parameter.span})")
            found[name] = _for_each(parameter, value, count) if parameter.per_model else parameter.check(value)
        self.rule(found)
        return found

    def order(self, digests: Sequence[str], values: Values, roles: Sequence[str]) -> tuple[int, ...]:
        """The places of the models in the order in which they are to be merged, so that another order of typing
        changes no bit: as given, or for a symmetric method those of the last role by digest and values.

        digests: of the models' contents. Values per model go along: see `ordered`.
        """
        first = roles.index(self.roles[-1].name)
        places = list(range(len(roles)))
        if self.symmetric:
            per_model = [value for value in values.values() if isinstance(value, tuple)]
            places[first:] = sorted(
                places[first:], key=lambda place: (digests[place], [value[place - first] for value in per_model])
            )
        return tuple(places)

    def ordered(self, values: Values, order: Sequence[int]) -> dict[str, Value]:
        """The values with those of every model in the `order` of the models."""
        return {name: _permuted(value, order) if isinstance(value, tuple) else value for name, value in values.items()}

    def load(self) -> type[Merge]:
        """The class with the maths. This imports torch."""
        module, name = self.maths.split(".")
        found: type[Merge] = getattr(importlib.import_module(f"bake.merges.{module}"), name)
        return found


def _for_each(parameter: Parameter, given: object, count: int) -> tuple[float, ...]:
    values = list(given) if isinstance(given, (list, tuple)) else [given] * count
    if len(values) != count:
        raise ValueError(f"{parameter.name} has {len(values)} numbers for {count} models; give one, or one for each")
    return tuple(float(parameter.check(value)) for value in values)


def _permuted(value: tuple[float, ...], order: Sequence[int]) -> tuple[float, ...]:
    first = len(order) - len(value)
    return tuple(value[place - first] for place in order[first:])


def _in_words(role: Role) -> str:
    if role.at_least is None:
        return f"[{role.name}]" if role.optional else role.name
    if role.at_least == role.at_most:
        return f"{role.at_least} models"
    return f"{role.at_least} or more models"
