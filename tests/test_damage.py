"""Every golden case, damaged: whatever is wrong with an adapter, bake says so, in one line, and writes nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
from numpy.typing import NDArray
from support import bake, drafts

Stored = dict[str, "NDArray[Any]"]
Damage = tuple[str, Stored, "dict[str, Any] | None"]  # what was done, tensors, adapter_config.json

# Exit codes, as bake.errors documents them.
MALFORMED, UNMATCHED, MISFIT, NOT_FINITE = 3, 4, 5, 7

_MODULE = re.compile(
    r"(?P<module>.+?)\.(?P<factor>"
    r"lora_(?:up|down)(?:\.\d)?\.weight|lora_mid\.weight|lora_[ABE](?:\.weight|\.bias)?|lora_embedding_[AB]|lora_[ab]"
    r"|lora(?:_linear_layer)?\.(?:up|down)\.weight|(?:up|down)\.weight|lora_magnitude_vector|dora_scale|alpha"
    r"|hada_\w+|lokr_\w+|[ab][12m]\.weight|oft_blocks(?:\.\d)?|oft_R\.\w+|rescale|boft_[Rs]|hra_u|vera_\w+|ia3_l|on_input"
    r"|diff(?:_[bm])?|[wb]_norm|set_weight|bias_(?:indices|values|size)"
    r"|(?:token_adapter\.)?trainable_tokens_delta|(?:ln_tuning_layers|base_layer)\.\w+|weight)"
)
# Without one of these a file is whole: it says less, or the module is gone altogether.
_CAN_BE_MISSING = re.compile(
    r"alpha|dora_scale|rescale|diff(_[bm])?|[wb]_norm|set_weight|oft_blocks|oft_R\.\w+|hra_u|ia3_l|lora_B\.bias"
    r"|(token_adapter\.)?trainable_tokens_delta|(ln_tuning_layers|base_layer)\.\w+|weight"
)
# Axes that nothing else depends on: stages of a rotation, a number of reflections, the width of the widest layer.
_MAY_GROW = {"boft_R": {0}, "hra_u": {1}, "vera_A": {1}, "vera_B": {0}}


def split(key: str) -> tuple[str, str]:
    """(module, factor) of a key."""
    found = _MODULE.fullmatch(key)
    assert found is not None, key
    return found["module"], found["factor"]


def one_of_each(arrays: Stored) -> Iterator[tuple[str, str]]:
    """(key, factor) of the first tensor of every kind."""
    seen = set()
    for key in sorted(arrays):
        factor = split(key)[1]
        if factor not in seen:
            seen.add(factor)
            yield key, factor


def renamed(arrays: Stored, config: Any) -> Iterator[Damage]:
    """One module is called what no module of the base is called."""
    module = max(module for module, factor in map(split, arrays) if factor not in ("vera_A", "vera_B"))
    yield (
        module,
        {key.replace(module + ".", module + "_of_nowhere.", 1): array for key, array in arrays.items()},
        config,
    )


def incomplete(arrays: Stored, config: Any) -> Iterator[Damage]:
    """One tensor is missing that goes with others."""
    of_ia3 = any(key.endswith(".on_input") for key in arrays)
    for key in sorted(arrays):
        factor = split(key)[1]
        if (of_ia3 and factor == "weight") or not _CAN_BE_MISSING.fullmatch(factor):
            yield key, {other: array for other, array in arrays.items() if other != key}, config


def not_a_number(arrays: Stored, config: Any) -> Iterator[Damage]:
    """One number is none."""
    for key, factor in one_of_each(arrays):
        if factor != "alpha" and arrays[key].dtype.kind == "f":
            changed = arrays[key].copy()
            changed.flat[-1] = np.nan
            yield key, {**arrays, key: changed}, config


def misshapen(arrays: Stored, config: Any) -> Iterator[Damage]:
    """One tensor has one row or column too many."""
    for key, factor in one_of_each(arrays):
        for axis in {*range(arrays[key].ndim)} - _MAY_GROW.get(factor, set()):
            more = arrays[key].take([0], axis)
            yield f"{key}, axis {axis}", {**arrays, key: np.concatenate([arrays[key], more], axis)}, config


def without_alpha(arrays: Stored, config: Any) -> Iterator[Damage]:
    """The alpha is none, in the file or in its configuration."""
    for key, array in arrays.items():
        if split(key)[1] == "alpha" and array.dtype.kind == "f":
            yield key, {**arrays, key: np.full_like(array, np.nan)}, config
            break
    for name in ("alpha", "lora_alpha"):
        if config is not None and name in config:
            yield name, arrays, {**config, name: float("nan")}


DAMAGES: tuple[tuple[Callable[[Stored, Any], Iterator[Damage]], set[int]], ...] = (
    (renamed, {UNMATCHED, MALFORMED}),  # malformed: the configuration numbers the rows of one embedding only
    (incomplete, {MALFORMED, MISFIT, UNMATCHED}),  # unmatched: a fused projection of fewer parts
    (not_a_number, {NOT_FINITE}),
    (misshapen, {MALFORMED, MISFIT}),
    (without_alpha, {MALFORMED, NOT_FINITE}),
)


@pytest.mark.parametrize("name", golden.NAMES)
@pytest.mark.parametrize(("damage", "codes"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_damaged_adapter_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, damage: Callable[[Stored, Any], Iterator[Damage]], codes: set[int]
) -> None:
    case = golden.read(name)
    base = case.write_base(tmp_path)
    output = golden.output_of(tmp_path, base)
    for number, (what, arrays, config) in enumerate(damage(golden.stored(case.adapter)[0], copy.deepcopy(case.config))):
        adapter = case.write_adapter(tmp_path / str(number), arrays, config)
        done = bake("fuse", base, "-l", adapter, "-o", output, "--json")
        assert done.code in codes, (what, done)
        assert done.json["error"]["exit"] == done.code
        assert "Traceback" not in done.out + done.err
        assert not output.exists()
        assert not drafts(tmp_path)
