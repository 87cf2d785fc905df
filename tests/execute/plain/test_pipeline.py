"""Bakes without torch: the same bytes from processes, threads and torch; what is special is left to torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import SD1_MODULES, kohya_lora, peft_lora, random_arrays, save_base, sd1_pair
from names import small
from support import ROOT, Done, drafts, load, random, rounded, save

from bake.api import build_plan, fuse
from bake.errors import NonFinite
from bake.execute import parts, pipeline
from bake.execute.plain import pipeline as plain
from bake.execute.plain.pipeline import suits
from bake.plan.model import Plan
from bake.progress import Silent

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are only copied on Linux")

NO_TORCH = "import sys; sys.modules['torch'] = None\n"  # importing it is an error
NO_THREADS = "from bake.execute.plain import crew; crew.Threads = None\n"
NO_PROCESSES = "from bake.execute.plain import crew; crew.can_fork = lambda: False\n"
NO_NUMPY = "from bake.execute.plain import pipeline; pipeline.suits = lambda plan, device: False\n"


def changed_bake(changes: str, *words: object, **environment: str) -> Done:
    """Run the program `bake` in a fresh process, with something replaced in it."""
    finished = subprocess.run(
        [sys.executable, "-c", f"{changes}import sys\nfrom bake.cli import run\nrun()", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(finished.returncode, finished.stdout, finished.stderr)


@linux
def test_a_fuse_on_the_processor_needs_no_torch_and_gives_its_bytes(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    arrays, _ = kohya_lora(small("sd1"), rank=3, seed=500)
    words = ("fuse", base, "-l", f"{lora}:0.7", "-l", f"{save(tmp_path / 'other.safetensors', arrays)}:-0.4", "-o")
    runs: list[tuple[str, tuple[str, ...], dict[str, str]]] = [
        (NO_TORCH + NO_THREADS, ("--device", "cpu"), {}),
        (NO_TORCH + NO_THREADS, ("--threads", "1"), {"BAKE_FUSE_DEVICE": "cpu"}),
        (NO_TORCH + NO_THREADS, ("--device", "cpu", "--threads", "5", "--verify", "full", "--memory", "1MB"), {}),
        (NO_TORCH + NO_PROCESSES, ("--device", "cpu", "--threads", "3"), {}),
        (NO_NUMPY, ("--device", "cpu"), {}),
    ]
    outputs = []
    for number, (changes, options, environment) in enumerate(runs):
        output = tmp_path / f"{number}.safetensors"
        done = changed_bake(changes, *words, output, *options, **environment)
        assert done.code == 0, done.err
        outputs.append(output.read_bytes())
    assert len(set(outputs)) == 1
    verified = changed_bake(NO_TORCH, "verify", tmp_path / "0.safetensors", "--full", "--json")
    assert verified.code == 0, verified.err
    assert verified.json["equal"] == verified.json["elements"] > 0
    assert not drafts(tmp_path)


def test_bfloat16_from_float32_too(tmp_path: Path, lane: str) -> None:
    base = save(tmp_path / "base.safetensors", random_arrays(small("sd1"), np.float32))
    arrays, _ = kohya_lora(small("sd1"))
    lora = save(tmp_path / "lora.safetensors", arrays)
    words = ("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors", "--dtype", "bf16", "--device", "cpu")
    assert changed_bake(NO_TORCH, *words).code == 0
    fuse(base, [lora], tmp_path / "here.safetensors", dtype="bf16", device="cpu", verify="full")
    assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def chained_adapters(folder: Path) -> list[Path]:
    """DoRA by rows around a LoHa and by columns around a LoKr; and a LoRA for the same and other modules."""
    (one, other), shapes = list(SD1_MODULES.items())[:2], small("sd1")
    (height, width), (tall, wide) = shapes[one[1]], shapes[other[1]]
    factors = {
        f"{one[0]}.hada_w1_a": (height, 2),
        f"{one[0]}.hada_w1_b": (2, width),
        f"{one[0]}.hada_w2_a": (height, 2),
        f"{one[0]}.hada_w2_b": (2, width),
        f"{one[0]}.dora_scale": (height, 1),
        f"{other[0]}.lokr_w1": (2, 2),
        f"{other[0]}.lokr_w2": (tall // 2, wide // 2),
        f"{other[0]}.dora_scale": (1, wide),
    }
    arrays = {name: random(seed, *shape, spread=0.3) for seed, (name, shape) in enumerate(factors.items())}
    return [
        save(folder / "chained.safetensors", {name: array.astype(np.float16) for name, array in arrays.items()}),
        save(folder / "lora.safetensors", kohya_lora(shapes)[0]),
    ]


@linux
def test_chains_need_no_torch_and_give_its_bytes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base.safetensors")
    words = ["fuse", base, "--device", "cpu"]
    for adapter in chained_adapters(tmp_path):
        words += ["-l", f"{adapter}:0.7"]
    few_elements = "from bake.execute.plain import chains, pipeline; chains._TILE_ELEMENTS = 640\n"
    in_parts = few_elements + "from bake.execute import parts; parts._PART_ELEMENTS = 900\n"
    small_blocks = (
        few_elements + "pipeline._FIRST_BLOCK = 1; pipeline._SMALLEST_BLOCK = pipeline._BLOCK_ELEMENTS = 1000\n"
    )
    runs = [
        (NO_TORCH + NO_THREADS, ()),
        (NO_TORCH + NO_THREADS + in_parts, ("--threads", "3", "--verify", "full")),
        (NO_TORCH + NO_THREADS + small_blocks, ("--threads", "1", "--memory", "1MB")),
        (NO_NUMPY, ()),
    ]
    outputs = []
    for number, (changes, options) in enumerate(runs):
        output = tmp_path / f"{number}.safetensors"
        done = changed_bake(changes, *words, "-o", output, *options, OPENBLAS_NUM_THREADS="1")
        assert done.code == 0, done.err
        outputs.append(output.read_bytes())
    assert len(set(outputs)) == 1
    verified = changed_bake(NO_TORCH, "verify", tmp_path / "0.safetensors", "--full", "--json")
    assert verified.code == 0, verified.err
    assert verified.json["equal"] == verified.json["elements"] > 0


@pytest.mark.parametrize("place", ["base", "factor"])
def test_a_chain_with_what_is_no_number_is_refused_in_the_usual_words(
    tmp_path: Path, given_to_torch: list[Any], place: str
) -> None:
    """By columns every part of the tensor meets it, also those that do not hold it."""
    module, name = list(SD1_MODULES.items())[1]
    height, width = small("sd1")[name]
    base, up = random_arrays(small("sd1")), random(1, height, 2).astype(np.float16)
    (base[name] if place == "base" else up)[-1, 0] = np.inf
    arrays = {"lora_up.weight": up, "lora_down.weight": random(2, 2, width), "dora_scale": np.ones((1, width))}
    factors = {f"{module}.{name}": array.astype(np.float16) for name, array in arrays.items()}
    words = (save(tmp_path / "base.safetensors", base), [save(tmp_path / "dora.safetensors", factors)])
    with pytest.raises(NonFinite, match="the base holds NaN" if place == "base" else "an adapter holds NaN") as caught:
        fuse(*words, tmp_path / "out.safetensors", device="cpu")
    assert given_to_torch == [{("", name)}]
    assert name in caught.value.message
    assert not drafts(tmp_path)


@pytest.fixture
def given_to_torch(monkeypatch: pytest.MonkeyPatch) -> list[set[tuple[str, str]] | None]:
    """What each run leaves to torch: tensors; None for all."""
    given: list[set[tuple[str, str]] | None] = []
    original = pipeline.Pipeline.__init__

    def noted(self: pipeline.Pipeline, task: Any, only: Any = None) -> None:
        given.append(only)
        original(self, task, only)

    monkeypatch.setattr(pipeline.Pipeline, "__init__", noted)
    return given


class Counted(Silent):
    total = done = 0

    def start(self, task: str, total: int) -> None:
        self.total += total

    def advance(self, count: int) -> None:
        self.done += count


class TestNumbersThatMayNotFit:
    NAME = next(iter(SD1_MODULES.values()))

    def base(self, folder: Path, value: float, place: tuple[int, int] = (0, 0)) -> Path:
        arrays = random_arrays(small("sd1"))
        arrays[self.NAME][place] = value
        return save(folder / "base.safetensors", arrays)

    @pytest.mark.parametrize("rows", [1, 1000], ids=["in parts", "whole"])
    @pytest.mark.parametrize("value", [32768.0, -40000.0, 65504.0])
    def test_their_tensor_is_made_with_torch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_to_torch: list[Any], value: float, rows: int
    ) -> None:
        _, lora, deltas = sd1_pair(tmp_path)
        width = small("sd1")[self.NAME][1]
        base = self.base(tmp_path, value, (-1, 3))
        monkeypatch.setattr(parts, "_PART_ELEMENTS", rows * width)
        result = fuse(base, [lora], tmp_path / "out.safetensors", device="cpu", verify="full")
        assert given_to_torch == [{("", self.NAME)}]
        before, after = load(base), load(tmp_path / "out.safetensors")
        for name, delta in deltas.items():
            np.testing.assert_array_equal(after[name], rounded(before[name] + delta, np.float16))
        monkeypatch.setattr(plain, "suits", lambda plan, device: False)
        other = fuse(base, [lora], tmp_path / "torch.safetensors", device="cpu")
        assert (tmp_path / "torch.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
        if rows > 1:  # torch measures every 16th row of a part, not of the tensor
            assert result.survival == pytest.approx(other.survival, rel=1e-3)

    def test_others_are_not(self, tmp_path: Path, given_to_torch: list[Any]) -> None:
        _, lora, _ = sd1_pair(tmp_path)
        progress = Counted()
        base = self.base(tmp_path, 32752.0)
        result = fuse(base, [lora], tmp_path / "out.safetensors", device="cpu", progress=progress)
        assert given_to_torch == []
        assert progress.done == progress.total == result.plan.data_bytes

    def test_bfloat16(self, tmp_path: Path, given_to_torch: list[Any]) -> None:
        arrays = {"a.weight": random(0, 30, 20).astype(np.float32), "b.weight": random(1, 30, 20).astype(np.float32)}
        arrays["b.weight"][3, 4] = 2e30
        base = save(tmp_path / "base.safetensors", arrays)
        lora = save(tmp_path / "lora.safetensors", peft_lora(dict.fromkeys(arrays, (30, 20)), arrays))
        fuse(base, [lora], tmp_path / "out.safetensors", dtype="bf16", device="cpu", verify="full")
        assert given_to_torch == [{("", "b.weight")}]

    @linux
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_no_number_is_refused_in_the_usual_words(self, tmp_path: Path, value: float) -> None:
        _, lora, _ = sd1_pair(tmp_path)
        words = ("fuse", self.base(tmp_path, value), "-l", lora, "-o", tmp_path / "out.safetensors", "--device", "cpu")
        with pytest.raises(NonFinite) as caught:
            fuse(words[1], [lora], tmp_path / "out.safetensors", device="cpu")
        for changes in (NO_THREADS, NO_NUMPY):
            done = changed_bake(changes, *words)
            assert (done.code, done.out) == (7, "")
            assert done.err == f"bake: {caught.value.message}\n"
            assert self.NAME in done.err
        assert not (tmp_path / "out.safetensors").exists()
        assert not drafts(tmp_path)

    @linux
    def test_an_overflow_in_a_process_is_refused_in_the_usual_words(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        words = ("fuse", base, "-l", f"{lora}:1e7", "-o", tmp_path / "out.safetensors", "--device", "cpu")
        done = changed_bake(NO_THREADS, *words)
        assert done.code == 7
        assert "F16 ends at 65504" in done.err


@pytest.mark.parametrize(
    ("memory", "threads", "workers"), [(1, 4, 1), (3 << 20, 4, 2), (1 << 30, 4, 4), (1 << 30, 9, 6), (24 << 20, 2, 2)]
)
def test_the_workers_share_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, threads: int, workers: int
) -> None:
    seen: list[int] = []

    def counted(count: int, *rest: Any) -> Any:
        seen.append(count)
        return start_crew(count, *rest)

    start_crew, blocks = plain.start_crew, []
    init = plain._Worker.__init__

    def noted(self: Any, task: Any, shift: Any, elements: int, output: Any) -> None:
        blocks.append(elements)
        init(self, task, shift, elements, output)

    monkeypatch.setattr(plain, "start_crew", counted)
    monkeypatch.setattr(plain._Worker, "__init__", noted)
    monkeypatch.setattr("bake.execute.plain.crew.can_fork", lambda: False)
    base, lora, _ = sd1_pair(tmp_path)  # six tensors
    fuse(base, [lora], tmp_path / "out.safetensors", device="cpu", memory=memory, threads=threads)
    assert seen == [workers]
    least = plain._SMALLEST_BLOCK * plain._BYTES_PER_ELEMENT
    assert workers * max(blocks) * plain._BYTES_PER_ELEMENT <= max(memory, least)
    assert min(blocks) == min(plain._BLOCK_ELEMENTS, max(least, memory // workers) // plain._BYTES_PER_ELEMENT)


class TestWhatIsDoneWithoutTorch:
    @pytest.fixture
    def plan(self, tmp_path: Path) -> Plan:
        base, lora, _ = sd1_pair(tmp_path)
        return build_plan(base, [lora])

    def test_on_the_processor(self, plan: Plan) -> None:
        assert suits(plan, "cpu")
        for device in ("cuda", "cuda:1", "mps", "xpu", "pretended"):
            assert not suits(plan, device)

    def test_auto_where_there_can_be_no_gpu(self, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        present: set[str] = set()
        monkeypatch.setattr(plain.os.path, "exists", lambda path: path in present)
        monkeypatch.setattr(plain.os.path, "isdir", lambda path: path in present)
        assert not suits(plan, "auto")  # no Linux
        present.add("/proc/self")
        assert suits(plan, "auto")
        for device in ("/dev/nvidia0", "/dev/dxg", "/dev/kfd"):
            present.add(device)
            assert not suits(plan, "auto")
            present.remove(device)

    @pytest.mark.parametrize(
        ("options", "is_suited"),
        [
            ({"dtype": "bf16"}, True),
            ({"rounding": "fast"}, True),
            ({"dtype": "fp32"}, False),
            ({"dtype": "fp8_e4m3fn"}, False),
            ({"dtype": "fp8_e4m3fn_scaled"}, False),
            ({"rounding": "stochastic"}, False),
        ],
        ids=str,
    )
    def test_to_16_bits_to_nearest(self, tmp_path: Path, options: dict[str, str], is_suited: bool) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        assert suits(build_plan(base, [lora], **options), "cpu") == is_suited

    def test_from_float64_it_is_not(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base.safetensors", dtype=np.float64)
        lora = save(tmp_path / "lora.safetensors", kohya_lora(small("sd1"))[0])
        assert not suits(build_plan(base, [lora], dtype="fp16"), "cpu")
        fuse(base, [lora], tmp_path / "out.safetensors", dtype="fp16", device="cpu", verify="full")

    @pytest.mark.parametrize("added", ["diff", "lora_mid.weight", "dora_scale", "lora_up.weight", "reshape_weight"])
    def test_sums_of_loras_and_dora(self, tmp_path: Path, added: str) -> None:
        base = save_base(tmp_path / "base.safetensors")
        arrays, _ = kohya_lora(small("sd1"))
        module = "lora_unet_down_blocks_0_resnets_0_conv1"
        up, down = arrays[f"{module}.lora_up.weight"], arrays[f"{module}.lora_down.weight"]
        if added == "lora_mid.weight":
            arrays[f"{module}.lora_down.weight"] = down[:, :, :1, :1]
            arrays[f"{module}.{added}"] = np.ones((len(down), len(down), *down.shape[2:]), np.float16)
        elif added == "dora_scale":
            arrays[f"{module}.{added}"] = np.ones((len(up), 1, 1, 1), np.float16)
        elif added == "reshape_weight":  # the base's tensor is the corner of a larger one
            wide = np.concatenate([down, down], axis=1)
            arrays |= {f"{module}.lora_down.weight": wide, f"{module}.{added}": np.array([len(up), *wide.shape[1:]])}
        elif added == "diff":
            arrays = {f"{module}.{added}": np.ones((len(up), *down.shape[1:]), np.float16)}
        else:
            arrays[f"{module}.{added}"] = up.astype(np.float64)
        lora = save(tmp_path / "lora.safetensors", arrays)
        plan = build_plan(base, [lora])
        assert suits(plan, "cpu") == (added == "dora_scale")
        fuse(base, [lora], tmp_path / "out.safetensors", device="cpu", verify="full")


@linux
@pytest.mark.parametrize(
    ("devices", "version", "may_have"),
    [
        ((), "2.13.0", False),
        (("dri",), "2.13.0+cpu", False),
        (("dri",), "2.13.0", False),
        (("dri",), "2.13.0+xpu", True),
        (("dri",), None, True),
        (("nvidia0", "dri"), "2.13.0+cpu", True),
        (("kfd",), "2.13.0+rocm7", True),
    ],
)
def test_torch_is_asked_for_gpus_only_where_there_may_be_one(
    monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], version: str | None, may_have: bool
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(os.path, "exists", lambda path: path.removeprefix("/dev/") in devices)
    monkeypatch.setattr(metadata, "version", installed)
    assert plain._may_have_gpu() is may_have


DIES = "from bake.execute.plain.sums import Sum; import os; Sum.fuse = lambda *rest: os.kill(os.getpid(), 9)\n"
STARVES = "from bake.execute.plain.sums import Sum; Sum.fuse = lambda *rest: bytearray(1 << 60)\n"


@linux
@pytest.mark.parametrize(("what", "says"), [(DIES, "a worker was killed (signal 9)"), (STARVES, "memory")])
def test_a_worker_that_the_system_kills_or_starves_costs_nothing(tmp_path: Path, what: str, says: str) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    words = ("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors", "--device", "cpu", "--threads", "3")
    done = changed_bake(NO_TORCH + NO_THREADS + what, *words, OPENBLAS_NUM_THREADS="1")
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert "--memory" in done.err
    assert done.err.count("\n") == 1
    assert set(tmp_path.iterdir()) == {base, lora}


def test_a_thread_looks_between_two_blocks_whether_the_run_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[int] = []

    def failing(self: Any, tensor: Any, work: Any, first: int, *rest: Any) -> Any:
        blocks.append(first)
        self._task.team.stop(NonFinite("elsewhere"))
        return plain.NOTHING

    monkeypatch.setattr(plain, "_SMALLEST_BLOCK", 1)
    monkeypatch.setattr(plain._Worker, "_pass", failing)
    monkeypatch.setattr("bake.execute.plain.crew.can_fork", lambda: False)
    base, lora, _ = sd1_pair(tmp_path)
    with pytest.raises(NonFinite, match="elsewhere"):
        fuse(base, [lora], tmp_path / "out.safetensors", device="cpu", threads=1)
    assert blocks == [0]
