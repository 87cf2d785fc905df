"""The buffers of a worker."""

from __future__ import annotations

import numpy as np

from bake.execute.plain.desk import Desk


def test_a_buffer_that_grows_takes_the_place_of_the_old_one() -> None:
    desk = Desk()
    desk.array("a", np.float32, (2,))
    large = desk.array("a", np.float32, (100,))
    assert np.shares_memory(desk.array("a", np.float32, (2,)), large)
    assert not np.shares_memory(desk.array("b", np.float32, (2,)), large)


def test_each_number_has_an_array_of_its_own() -> None:
    desk = Desk()
    for number in (2.0**-14, 2.0**-126, 2.0**-14):  # as in a checkpoint of both 16-bit dtypes
        assert (desk.filled(number, (3, 4)) == number).all()
