"""Which rows of an update go where, and what does not fit."""

from __future__ import annotations

import pytest

from bake.identify.updates import Update
from bake.keys.places import Place
from bake.plan.regions import Misfit, Region, check_parts, fit

HALVES = (Place("q", part=(0, 4)), Place("k", part=(4, 8)))


def update(*extent: int | None, **more: object) -> Update:
    return Update("weight", "lora", {}, extent, **more)


def test_the_parts_of_a_fused_module_have_to_take_all_its_rows() -> None:
    check_parts(update(8, 5), HALVES)
    with pytest.raises(Misfit, match="12 rows, q and k together 8"):
        check_parts(update(12, 5), HALVES)


def test_a_part_goes_to_its_own_tensor() -> None:
    assert fit(update(8, 5), HALVES[1], (4, 5), False, ()) == [Region((0, 4), (0, 5), (4, 8), 8, False)]


@pytest.mark.parametrize("more", [{"channels": 4}, {"column_block": 4}])
def test_numbers_for_other_channels_do_not_fit(more: dict[str, int]) -> None:
    place = Place("w")
    assert fit(update(None, None, **more), place, (6, 4), False, ())
    with pytest.raises(Misfit, match="w is"):
        fit(update(None, None, **more), place, (6, 5), False, ())
