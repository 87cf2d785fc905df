"""What follows from the values of a method's parameters alone: whose bytes are the result, and what cannot be meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bake.merges.method import Value, Values

Alone = Callable[[Values, int], "int | None"]

_ENDS: dict[float, int] = {0.0: 0, 1.0: 1}


def ends(values: Values, count: int) -> int | None:
    """A at alpha 0, B at alpha 1."""
    return _ENDS.get(_number(values["alpha"]))


def unless(*names: str) -> Alone:
    """A where one of these numbers is 0."""

    def alone(values: Values, count: int) -> int | None:
        return 0 if any(values[name] == 0 for name in names) else None

    return alone


def sum_twice(values: Values, count: int) -> int | None:
    """C at beta 1; at beta 0 as in a weighted sum."""
    found: dict[float, int | None] = {0.0: ends(values, count), 1.0: 2}
    return found.get(_number(values["beta"]))


def triple_sum(values: Values, count: int) -> int | None:
    """The model that has all of the weight."""
    owners: dict[tuple[float, float], int] = {(0.0, 0.0): 0, (1.0, 0.0): 1, (0.0, 1.0): 2}
    return owners.get((_number(values["alpha"]), _number(values["beta"])))


def multiply_difference(values: Values, count: int) -> int | None:
    """A or B where size and sign are the same model's."""
    return ends(values, count) if values["alpha"] == values["beta"] else None


def passthrough(values: Values, count: int) -> int | None:
    """A at scale 1."""
    return 0 if values["scale"] == 1 else None


def region(values: Values, count: int) -> int | None:
    """A without a region, B where it is everything."""
    return _ENDS.get(abs(_number(values["width"])))


def no_region(values: Values, count: int) -> int | None:
    """A without a region."""
    return 0 if values["width"] == 0 else None


def rotate(values: Values, count: int) -> int | None:
    """A if nothing of B is wanted, B if all is."""
    return ends(values, count) if values["alpha"] == values["alignment"] else None


def distribution_crossover(values: Values, count: int) -> int | None:
    """B or A where the cut is at an end and sharp."""
    return _ENDS.get(1 - _number(values["cut"])) if values["slope"] == 0 else None


def one_weight(values: Values, count: int) -> int | None:
    """The model with the only weight that is not 0, if that weight is as good as 1."""
    weights = _numbers(values["weight"])
    place = _only(weights)
    if place is None or (weights[place] != 1 and not values.get("normalize", True)):
        return None
    return count - len(weights) + place


def task_vectors(values: Values, count: int) -> int | None:
    """The base without weights, or the one model whose whole difference counts once."""
    weights = _numbers(values["weight"])
    if not any(weights) or values["lambda"] == 0:
        return 0
    place = _only(weights)
    if place is None or _numbers(values.get("density", (1.0,) * len(weights)))[place] != 1:
        return None
    share = 1 if values["normalize"] else weights[place]
    return 1 + place if share * _number(values["lambda"]) == 1 else None


def weights_add_up(values: Values) -> None:
    """What is divided by the sum of the weights needs one."""
    if values.get("normalize", True) and not values.get("consensus", False):
        total = 0.0
        for weight in _numbers(values["weight"]):
            total += weight
        if total == 0:
            raise ValueError("the weights add up to 0, so nothing can be divided by their sum")


def chances(values: Values) -> None:
    """DELLA's chances lie between 0 and 1."""
    weights_add_up(values)
    for density, epsilon in zip(_numbers(values["density"]), _numbers(values["epsilon"]), strict=True):
        if density < 1 and not epsilon < density < 1 - epsilon:
            raise ValueError(
                f"density {density:g} and epsilon {epsilon:g} give chances from {density - epsilon:g} to "
                f"{density + epsilon:g}; they have to lie between 0 and 1, or density has to be 1"
            )


def something_left(values: Values) -> None:
    """Of a model that is subtracted from itself nothing is left."""
    if _number(values["alpha"]) * _number(values["beta"]) == 1:
        raise ValueError("alpha * beta is 1: then all of A was B, and nothing else can be found in it")


def _only(weights: Sequence[float]) -> int | None:
    """The place of the one weight that is not 0."""
    places = [place for place, weight in enumerate(weights) if weight]
    return places[0] if len(places) == 1 else None


def _number(value: Value) -> float:
    assert isinstance(value, (float, int))
    return float(value)


def _numbers(value: Value) -> tuple[float, ...]:
    assert isinstance(value, tuple)
    return value
