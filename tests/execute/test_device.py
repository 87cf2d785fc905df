"""Devices that are there, and those that are not."""

from __future__ import annotations

import pytest
import torch

from bake.errors import UsageError
from bake.execute.device import choose_devices


def test_auto_takes_what_there_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert {device.torch.type for device in choose_devices("auto")} == {expected}


def test_the_cpu_is_always_there() -> None:
    assert [device.is_cpu for device in choose_devices("cpu")] == [True]


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cpu:1", "cuda:x", ""])
def test_a_device_that_is_not_there_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        choose_devices(name)
