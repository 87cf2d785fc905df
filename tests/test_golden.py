"""Every golden case: an adapter as its trainer writes it, and the weights that the trainer's own code makes of it."""

from __future__ import annotations

from pathlib import Path

import golden
import numpy as np
import pytest
from support import Arrays, rounded

import bake

# Of the float16 results, the share that need not be the reference rounded once: the reference, which is kept in
# float32, lies in the middle between two numbers of float16 as nearly as float32 can tell.
UNDECIDED = 0.001


def fused(case: golden.Golden, base: Path, weight: float, folder: Path) -> Arrays:
    """The tensors that bake makes, verified; every module applied."""
    adapter = case.write_adapter(folder)
    output = golden.output_of(folder, base)
    result = bake.fuse(base, [(adapter, weight)], output, verify="full")
    found = result.plan.components.values()
    assert result.report is not None
    assert result.report.ok
    assert sum(component.matched for component in found) == sum(component.total for component in found) == case.modules
    return golden.tensors(output)


def assert_untouched(found: Arrays, before: Arrays, touched: Arrays) -> None:
    assert found.keys() == before.keys()
    for name in before.keys() - touched.keys():
        np.testing.assert_array_equal(found[name], before[name], err_msg=name)


def test_there_are_cases_for_every_trainer() -> None:
    trainers = {name.split("-")[0] for name in golden.NAMES}
    assert trainers == {"comfy", "diffusers", "kohya", "lycoris", "mlx", "onetrainer", "peft", "xlabs"}


@pytest.mark.parametrize("name", golden.NAMES)
def test_a_float32_base_gives_the_trainers_weights(tmp_path: Path, name: str) -> None:
    case = golden.read(name)
    base = case.write_base(tmp_path, np.float32)
    for weight in case.weights:
        found, expected = fused(case, base, weight, tmp_path / str(weight)), case.expected(weight)
        for tensor, values in expected.items():
            np.testing.assert_allclose(found[tensor], values, rtol=0, atol=case.tolerance, err_msg=tensor)
        assert_untouched(found, golden.base_arrays(case.base), expected)


@pytest.mark.parametrize("name", golden.NAMES)
def test_a_float16_base_gives_them_rounded_once(tmp_path: Path, name: str) -> None:
    case = golden.read(name)
    base = case.write_base(tmp_path, np.float16)
    total = equal = 0
    for weight in case.weights:
        found, expected = fused(case, base, weight, tmp_path / str(weight)), case.expected(weight)
        for tensor, values in expected.items():
            low, high = (rounded(values + error, np.float16) for error in (-case.tolerance, case.tolerance))
            assert ((low <= found[tensor]) & (found[tensor] <= high)).all(), tensor
            total, equal = total + values.size, equal + np.sum(found[tensor] == rounded(values, np.float16))
        assert_untouched(found, golden.base_arrays(case.base), expected)
    assert total - equal <= max(1, UNDECIDED * total)
