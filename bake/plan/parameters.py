"""What the parameters of a merge method are for each tensor: one number, or several by component, block and name."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from bake.errors import UsageError
from bake.identify.checkpoint import BaseIdentity
from bake.merges import Method, Parameter
from bake.merges.method import Value
from bake.plan.ratios import Ratios
from bake.plan.selection import Selection, Setting

T = TypeVar("T")


class Parameters:
    """The values of a method's parameters, tensor by tensor."""

    def __init__(
        self,
        method: Method,
        roles: Sequence[str],
        given: Mapping[str, Setting],
        identity: BaseIdentity,
        names: Collection[str],
    ) -> None:
        """names: of all tensors of the first model, whose identity is `identity`.

        Raises UsageError for parameters that the method does not have, values it cannot have, and selections that
        do not fit the model, as `bake.plan.ratios`.
        """
        self._method, self._roles = method, tuple(roles)
        self._given = {name: _with_defaults(method, name, setting) for name, setting in given.items()}
        self._ratios: dict[Selection, Ratios] = {}
        self._known: dict[str, dict[str, Value]] = {}  # what was asked for -> what it means
        for name, setting in self._given.items():
            for each in _each(setting):
                if isinstance(each, Selection) and each not in self._ratios:
                    self._ratios[each] = Ratios(each, identity, names, f"-p {name}")
        if not self._ratios:
            self.of("")

    def of(self, tensor: str) -> dict[str, Value]:
        """Every value that counts for a tensor, by its full name. Raises UsageError if the method cannot have one."""
        given = {name: self._settled(setting, tensor) for name, setting in self._given.items()}
        key = repr(given)
        if key not in self._known:
            try:
                self._known[key] = self._method.values(given, self._roles)
            except ValueError as error:
                where = f" (for {tensor})" if self._ratios else ""
                raise UsageError(f"{error}{where}", method=self._method.name) from None
        return self._known[key]

    def _settled(self, setting: Setting, tensor: str) -> Any:
        if isinstance(setting, (list, tuple)):
            return [self._settled(each, tensor) for each in setting]
        return self._ratios[setting].ratio(tensor) if isinstance(setting, Selection) else setting


def _with_defaults(method: Method, name: str, setting: Setting) -> Setting:
    """The setting with the parameter's own default where a selection says nothing."""
    parameter = next((each for each in method.parameters if each.name == name), None)
    if parameter is None:
        return setting  # refused with the others
    if isinstance(setting, (list, tuple)):
        return [_with_default(parameter, each) for each in setting]
    return _with_default(parameter, setting)


def _with_default(parameter: Parameter, setting: T) -> T | Selection:
    if not isinstance(setting, Selection):
        return setting
    if parameter.choices or isinstance(parameter.default, bool):
        raise UsageError(f"-p {parameter.name} is one of {parameter.span}, the same for all tensors")
    if setting.number is not None or setting.values:
        return setting
    if parameter.default is None:
        raise UsageError(f"-p {parameter.name}: say what counts elsewhere, as in -p {parameter.name}=0.5:te=0.3")
    return dataclasses.replace(setting, number=float(parameter.default))


def _number_from_json(data: Any) -> float | Selection:
    """One of the numbers for each model."""
    return Selection.from_json(data) if isinstance(data, dict) else float(data)


def _each(setting: Setting) -> Sequence[Any]:
    return setting if isinstance(setting, (list, tuple)) else [setting]


def permuted(setting: Setting, order: Sequence[int]) -> Setting:
    """A setting with one value for each model, these in the `order` of the models. A wrong number stays as it is."""
    if not isinstance(setting, (list, tuple)) or len(setting) != len(order):
        return setting
    return [setting[place] for place in order]


def setting_to_json(setting: Setting) -> Any:
    """The setting as plain JSON data."""
    if isinstance(setting, (list, tuple)):
        return [setting_to_json(each) for each in setting]
    return setting.to_json() if isinstance(setting, Selection) else setting


def setting_from_json(data: Any) -> Setting:
    """The setting that `setting_to_json` gave."""
    if isinstance(data, list):
        return [_number_from_json(each) for each in data]
    if isinstance(data, dict):
        return Selection.from_json(data)
    if not isinstance(data, (bool, int, float, str)):
        raise ValueError(f"{data!r} is no value of a parameter")
    return data
