"""Merges without torch: the same bytes and refusals from processes, threads and torch, for every such method."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import GIVEN
from models import llama, random_arrays
from names import small
from support import ROOT, Arrays, Done, drafts, random, save, save_torch

from bake import build_merge_plan, merge
from bake.errors import NonFinite
from bake.execute.merging import arrays, plain
from bake.merges import METHODS
from bake.plan.model import Plan

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are only copied on Linux")

NO_TORCH = "import sys; sys.modules['torch'] = None\n"  # importing it is an error
NO_THREADS = "from bake.execute.plain import crew; crew.Threads = None\n"
NO_PROCESSES = "from bake.execute.plain import crew; crew.can_fork = lambda: False\n"
NO_NUMPY = "from bake.execute.merging import plain; plain.suits = lambda plan, device: False\n"

# (method, number of models besides the base, whether there is one)
PLAIN = [
    ("weighted_sum", 2, False),
    ("weighted_subtraction", 2, False),
    ("add_difference", 3, False),
    ("sum_twice", 3, False),
    ("triple_sum", 3, False),
    ("passthrough", 1, False),
    ("linear", 3, False),
    ("task_arithmetic", 3, True),
]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
UP, HEAD = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"


def changed_bake(changes: str, *words: object) -> Done:
    """Run the program `bake` in a fresh process, with something replaced in it."""
    finished = subprocess.run(
        [sys.executable, "-c", f"{changes}import sys\nfrom bake.cli import run\nrun()", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(finished.returncode, finished.stdout, finished.stderr)


def model(path: Path, seed: int, dtype: str, **changed: Any) -> Path:
    """A small language model; changed: tensors by name."""
    tensors = {
        name: torch.from_numpy(values.astype(np.float32) + random(seed + place, *values.shape, spread=0.01)).float()
        for place, (name, values) in enumerate(random_arrays(llama()).items())
    }
    return save_torch(path, {name: values.to(DTYPES[dtype]) for name, values in tensors.items()} | changed)


def models(folder: Path, count: int, *dtypes: str) -> list[Path]:
    return [
        model(folder / f"m{number}.safetensors", 1000 * number, dtypes[number % len(dtypes)]) for number in range(count)
    ]


@linux
def test_a_merge_on_the_processor_needs_no_torch_and_gives_its_bytes(tmp_path: Path) -> None:
    inputs = models(tmp_path, 2, "fp16")
    words = ("merge", "weighted_sum", *inputs, "-o")
    runs: list[tuple[str, tuple[str, ...]]] = [
        (NO_TORCH + NO_THREADS, ("--device", "cpu")),
        (NO_TORCH + NO_THREADS, ("--device", "cpu", "--threads", "5", "--verify", "full", "--memory", "1MB")),
        (NO_TORCH + NO_PROCESSES, ("--device", "cpu", "--threads", "3")),
        (NO_NUMPY, ("--device", "cpu")),
    ]
    outputs = []
    for number, (changes, options) in enumerate(runs):
        output = tmp_path / f"out{number}.safetensors"
        done = changed_bake(changes, *words, output, *options)
        assert done.code == 0, done.err
        outputs.append(output.read_bytes())
    assert len(set(outputs)) == 1
    verified = changed_bake(NO_TORCH, "verify", tmp_path / "out0.safetensors", "--full", "--json")
    assert verified.code == 0, verified.err
    assert verified.json["equal"] == verified.json["elements"] > 0
    assert not drafts(tmp_path)


@pytest.mark.parametrize(("name", "count", "has_base"), PLAIN)
@pytest.mark.parametrize("dtypes", [("fp16",), ("bf16",), ("fp32", "fp16", "bf16")], ids="-".join)
def test_torch_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int, has_base: bool, dtypes: tuple[str, ...]
) -> None:
    inputs = models(tmp_path, count + has_base, *dtypes)
    base = inputs.pop(0) if has_base else None
    for dtype in ("keep", "fp16", "bf16", "fp32"):
        written = []
        for lane in ("numpy", "torch"):
            with monkeypatch.context() as patch:
                if lane == "torch":
                    patch.setattr(plain, "suits", lambda plan, device: False)
                out = tmp_path / f"{lane}.safetensors"
                merge(name, inputs, out, base=base, parameters=GIVEN[name], dtype=dtype, overwrite=True, device="cpu")
                written.append(out.read_bytes())
        assert written[0] == written[1], dtype


def test_halves_of_sums_lie_on_ties_and_go_to_the_even_number(tmp_path: Path, merge_lane: str) -> None:
    values = [1.0, 1 + 2**-10, 1 + 2**-9, -1.0, 2**-24, 3 * 2**-24, 65504.0, 0.0, -0.0]
    one, other = (torch.tensor(values, dtype=torch.float16).repeat(n, 1) for n in (1, 9))
    inputs = [
        model(tmp_path / "a.safetensors", 0, "fp16", **{HEAD: one.repeat_interleave(9, 0).reshape(9, 9)}),
        model(tmp_path / "b.safetensors", 0, "fp16", **{HEAD: other.t().contiguous()}),
    ]
    result = merge("weighted_sum", inputs, tmp_path / "out.safetensors", verify="full", device="cpu")
    assert result.report is not None
    assert result.report.equal_share == 1


@pytest.mark.parametrize(
    ("change", "parameters", "words"),
    [
        ({"at": (1, np.nan)}, {}, f"{UP}: m1.safetensors holds NaN or infinity, which cannot be merged"),
        ({"at": (0, -np.inf)}, {}, f"{UP}: m0.safetensors holds NaN or infinity, which cannot be merged"),
        ({"at": (0, np.inf), "too": (1, np.inf)}, {}, f"{UP}: m0.safetensors holds NaN or infinity"),
        ({"at": (1, 60000.0)}, {"alpha": -2.0}, f"{UP}: the result reaches 1"),
        ({"at": (1, 60000.0)}, {"alpha": 1e306}, f"{UP}: the result is not finite: the parameters are far too large"),
    ],
    ids=["nan", "infinity", "in both", "overflow", "no number"],
)
def test_what_is_not_finite_is_refused_in_the_same_words(
    tmp_path: Path, merge_lane: str, change: dict[str, Any], parameters: dict[str, float], words: str
) -> None:
    arrays = random_arrays(llama())
    inputs = []
    for number in range(2):
        values = arrays[UP].copy()
        for place, worst in change.values():
            if place == number:
                values[3, 5] = worst
        inputs.append(save(tmp_path / f"m{number}.safetensors", {**arrays, UP: values}))
    with pytest.raises(NonFinite, match=words.replace("(", r"\(")) as found:
        merge("weighted_sum", inputs, tmp_path / "out.safetensors", parameters=parameters, device="cpu")
    assert found.value.details["tensor"] == UP
    assert not drafts(tmp_path)
    assert not (tmp_path / "out.safetensors").exists()


def inpainting(arrays: Arrays, spread: float) -> Arrays:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    shape = arrays[name].shape
    wide = random(5, shape[0], 9, *shape[2:], spread=spread).astype(np.float16)
    return {**arrays, name: wide}


@pytest.mark.parametrize("number", [0, 1])
def test_nan_is_found_where_a_model_has_fewer_channels(tmp_path: Path, merge_lane: str, number: int) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    arrays = random_arrays(small("sd1"))
    both = [inpainting(arrays, 0.05), {**arrays, name: arrays[name].copy()}]
    both[number][name][-1, 3, -1, -1] = np.nan
    inputs = [save(tmp_path / f"m{place}.safetensors", each) for place, each in enumerate(both)]
    with pytest.raises(NonFinite, match=f"m{number}.safetensors holds NaN") as found:
        merge("weighted_sum", inputs, tmp_path / "out.safetensors", device="cpu")
    assert found.value.details["tensor"] == name


def test_runs_are_bounded_whatever_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More models, smaller runs."""
    seen = []
    original = arrays.ArrayReader.elements

    def noted(self: arrays.ArrayReader, begin: int, end: int, desk: Any) -> Any:
        seen.append(end - begin)
        return original(self, begin, end, desk)

    monkeypatch.setattr(arrays.ArrayReader, "elements", noted)
    inputs = [save(tmp_path / f"{n}.safetensors", {"w": random(n, 300, 500)}, {"n": str(n)}) for n in range(9)]
    outputs = []
    for memory in (2**20, 2**24):
        out = tmp_path / f"{memory}.safetensors"
        merge("linear", inputs, out, memory=memory, threads=2, device="cpu", verify="none")
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]
    assert max(seen) == 32 * 1024
    assert min(seen) < 8 * 1024


class TestWhichMergesItMakes:
    @staticmethod
    def plan(folder: Path, method: str = "weighted_sum", **more: Any) -> Plan:
        count = METHODS[method].least
        return build_merge_plan(method, models(folder, count, "fp16"), **more)

    def test_the_processor_has_to_be_meant(self, tmp_path: Path) -> None:
        plan = self.plan(tmp_path)
        assert plain.suits(plan, "cpu")
        assert not any(plain.suits(plan, device) for device in ("cuda", "cuda:1", "mps", "xpu", "nonsense"))

    def test_stochastic_rounding_is_left_to_torch(self, tmp_path: Path) -> None:
        assert not plain.suits(self.plan(tmp_path, rounding="stochastic"), "cpu")

    @pytest.mark.parametrize(
        ("method", "parameters"),
        [("slerp", {"alpha": 0.3}), ("add_difference", {"clip": True}), ("nearswap", {"t": 1})],
    )
    def test_what_is_more_than_operators_is_left_to_torch(
        self, tmp_path: Path, method: str, parameters: dict[str, Any]
    ) -> None:
        assert not plain.suits(self.plan(tmp_path, method, parameters=parameters), "cpu")
