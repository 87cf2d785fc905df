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
