"""Devices that are there, and those that are not."""

from __future__ import annotations

import pytest
import torch

from bake.errors import UsageError
from bake.execute.device import choose_device


def test_auto_takes_what_there_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").torch.type == expected


def test_the_cpu_is_always_there() -> None:
    assert choose_device("cpu").is_cpu


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cpu:1", "cuda:x", ""])
def test_a_device_that_is_not_there_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        choose_device(name)
