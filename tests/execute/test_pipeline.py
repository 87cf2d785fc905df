"""Scheduling: devices and their memory, parts of large tensors, many threads; on a device that only pretends."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from models import kohya_lora, peft_lora, sd1_pair
from names import small
from support import random, save
from torch import Tensor

from bake.api import fuse
from bake.errors import UsageError
from bake.execute import chunk, parts, pipeline
from bake.execute.chunk import Chunk
from bake.execute.device import Desk, Device
from bake.execute.plain import pipeline as plain_pipeline
from bake.execute.plain.sums import Sum as PlainSum
from bake.execute.sums import Sum
from bake.execute.survival import Survival
from bake.io.tensorfile import SafetensorsFile


class Pretended(Device):
    """A device with memory and streams of its own, as far as the rest of bake can see; its tensors are the CPU's."""

    def __init__(self, largest: int = 10**9) -> None:
        super().__init__("cpu")
        self.largest = largest  # elements of a chunk that fit
        self.lanes: list[str] = []
        self.uploads = self.waits = self.freed = 0

    @property
    def is_cpu(self) -> bool:
        return False

    def upload(self, tensor: Tensor) -> Tensor:
        self.uploads += 1
        return tensor.clone()

    @contextlib.contextmanager
    def open_lane(self) -> Iterator[None]:
        self.lanes.append(threading.current_thread().name)
        yield

    def wait(self) -> None:
        self.waits += 1

    def free_unused(self) -> None:
        self.freed += 1


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[Pretended]:
    """Two pretended devices, which `fuse` takes for any but the processor."""
    devices = [Pretended(), Pretended()]
    monkeypatch.setattr(pipeline, "choose_devices", lambda name: devices)
    original = Sum.fuse

    def limited(self: Sum, raw: Tensor, out: Tensor, part: Chunk, desk: Desk) -> Survival:
        assert isinstance(self.device, Pretended)
        if part.elements > self.device.largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, raw, out, part, desk)

    monkeypatch.setattr(Sum, "fuse", limited)
    return devices


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_all_devices_work_and_give_the_cpu_s_bytes(tmp_path: Path, pretended: list[Pretended]) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    fuse(base, [lora], tmp_path / "out.safetensors", threads=4, device="pretended")
    fuse(base, [lora], tmp_path / "cpu.safetensors", device="cpu")
    assert sha256(tmp_path / "out.safetensors") == sha256(tmp_path / "cpu.safetensors")
    for device in pretended:
        assert len(device.lanes) == 2  # of four workers
    assert sum(device.waits for device in pretended) > 0


def test_a_factor_is_uploaded_once_for_all_chunks_of_a_tensor(
    tmp_path: Path, pretended: list[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "chunk_elements", lambda self, budget: 40)
    base = save(tmp_path / "base.safetensors", {"a.weight": random(0, 50, 20).astype(np.float16)})
    lora = save(tmp_path / "lora.safetensors", peft_lora({"a.weight": (50, 20)}, ["a.weight"]))
    fuse(base, [lora], tmp_path / "out.safetensors", threads=1, device="pretended")
    assert pretended[0].waits >= 25  # one for each chunk at least
    assert pretended[0].uploads == 2


def test_too_little_device_memory_halves_the_chunks(tmp_path: Path, pretended: list[Pretended]) -> None:
    shapes = {"a.weight": (64, 20), "b.weight": (64, 20)}
    base = save(tmp_path / "base.safetensors", {name: random(0, 64, 20).astype(np.float16) for name in shapes})
    lora = save(tmp_path / "lora.safetensors", peft_lora(shapes, list(shapes)))
    whole = fuse(base, [lora], tmp_path / "whole.safetensors", threads=1, device="pretended")
    pretended[0].largest = 8 * 20
    result = fuse(base, [lora], tmp_path / "out.safetensors", threads=1, device="pretended")
    assert sha256(tmp_path / "out.safetensors") == sha256(tmp_path / "whole.safetensors")
    assert pretended[0].freed == 3  # 64 rows, 32, 16; then 8 at a time, in both tensors
    assert list(result.survival.values()) == pytest.approx(list(whole.survival.values()), rel=1e-2)


def test_a_device_without_room_for_one_row_is_a_clear_error(tmp_path: Path, pretended: list[Pretended]) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    for device in pretended:
        device.largest = 0
    with pytest.raises(UsageError, match="--device cpu"):
        fuse(base, [lora], tmp_path / "out.safetensors", device="pretended")
    assert set(tmp_path.iterdir()) == {base, lora}


def test_a_device_without_room_for_the_factors_is_a_clear_error(
    tmp_path: Path, pretended: list[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Pretended, tensor: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    base, lora, _ = sd1_pair(tmp_path)
    monkeypatch.setattr(Pretended, "upload", full)
    with pytest.raises(UsageError, match=r"factors of .*--device cpu"):
        fuse(base, [lora], tmp_path / "out.safetensors", device="pretended")


@pytest.mark.usefixtures("lane")
def test_each_part_of_a_large_tensor_is_read_ahead_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PART_ELEMENTS", 200)
    base = save(tmp_path / "base.safetensors", {"a.weight": random(0, 97, 20).astype(np.float16)})
    lora = save(tmp_path / "lora.safetensors", peft_lora({"a.weight": (97, 20)}, ["a.weight"]))
    asked: list[tuple[str, int, int]] = []

    def prefetch(self: SafetensorsFile, begin: int, end: int) -> None:
        asked.append((self.path.name, begin, end))

    monkeypatch.setattr(SafetensorsFile, "prefetch", prefetch)
    fuse(base, [lora], tmp_path / "out.safetensors", threads=1)
    spans = [(begin, end) for name, begin, end in asked if name == base.name]
    assert spans == [(first * 40, min(97, first + 10) * 40) for first in range(0, 97, 10)]
    assert sum(name == lora.name for name, _, _ in asked) == 2


def test_a_large_tensor_is_shared_by_the_workers(tmp_path: Path, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PART_ELEMENTS", 200)
    monkeypatch.setattr(chunk, "CHUNK_ELEMENTS", 60)
    monkeypatch.setattr(plain_pipeline, "_SMALLEST_BLOCK", 60)
    made: list[str] = []
    kind = PlainSum if lane == "numpy" else Sum
    original = kind.__init__

    def counted(self: Sum, plan: object, *rest: object) -> None:
        made.append(threading.current_thread().name)
        original(self, plan, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "__init__", counted)
    base = save(tmp_path / "base.safetensors", {"a.weight": random(0, 97, 20).astype(np.float16)})
    lora = save(tmp_path / "lora.safetensors", peft_lora({"a.weight": (97, 20)}, ["a.weight"]))
    fuse(base, [lora], tmp_path / "out.safetensors", threads=3, verify="full")
    if lane == "numpy":  # processes share nothing: each loads the factors, once for all of its parts
        assert 1 <= len(made) == len(set(made)) <= 3
    else:
        assert len(made) == 1


@pytest.mark.usefixtures("lane")
def test_more_threads_than_memory_for_their_buffers(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    arrays, _ = kohya_lora(small("sd1"), rank=3, seed=500)
    other = save(tmp_path / "other.safetensors", arrays)
    outputs = []
    for number, (threads, memory) in enumerate([(64, 1), (64, 2**40), (1, 2**20)]):
        outputs.append(tmp_path / f"{number}.safetensors")
        fuse(base, [lora, other], outputs[-1], threads=threads, memory=memory)
    assert len({sha256(output) for output in outputs}) == 1


def test_as_many_workers_as_memory_allows() -> None:
    device = Device("cpu")
    assert device.workers(8, 0) == 1
    assert device.workers(8, 2**40) == 8
    assert 1 <= device.workers(8, 2**26) < 8
