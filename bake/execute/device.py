"""Where the arithmetic happens: CPU, CUDA, Intel and Apple GPUs behind one interface."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from bake.errors import UsageError
from bake.execute.chunk import CHUNK_ELEMENTS
from bake.io.payload import torch_dtype

_GPUS = ("cuda", "xpu", "mps")
_PAGE_LOCKED = ("cuda", "xpu")
_GPU_CHUNK_ELEMENTS = 4 * 1024 * 1024  # starting a kernel costs as much as these elements take

# Of one worker for each element of a chunk: stored values on the host and on the device, in and out, the other end
# of an interval, two float32 numbers, and half as much again for what is made on the way.
_BYTES_PER_ELEMENT = 48


class Device:
    """A compute device."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)

    @property
    def is_cpu(self) -> bool:
        return self.torch.type == "cpu"

    @property
    def has_float64(self) -> bool:
        if self.torch.type == "xpu":
            return bool(torch.xpu.get_device_properties(self.torch).has_fp64)
        return self.torch.type != "mps"

    def chunk_elements(self, budget: int) -> int | None:
        """How many elements to work on at a time where that changes no bit; budget: bytes for one worker.

        None: as many as where it does.
        """
        if self.is_cpu:
            return None
        return max(CHUNK_ELEMENTS, min(_GPU_CHUNK_ELEMENTS, budget // _BYTES_PER_ELEMENT))

    def workers(self, wanted: int, memory: int) -> int:
        """How many of the `wanted` workers `memory` bytes of buffers are enough for, at least one."""
        return max(1, min(wanted, memory // (CHUNK_ELEMENTS * _BYTES_PER_ELEMENT)))

    def upload(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device; other streams may use it after `wait`."""
        return tensor.to(self.torch)

    def open_lane(self) -> AbstractContextManager[Any]:
        """A block whose work on the device goes its own way beside that of other threads: a stream of its own."""
        module = _module(self.torch)
        if self.is_cpu or not hasattr(module, "Stream"):
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        stack.enter_context(module.device(self.torch))
        stack.enter_context(module.stream(module.Stream(device=self.torch)))
        return stack

    def wait(self) -> None:
        """Wait until everything that this thread has started on the device is done."""
        if self.is_cpu:
            return
        module = _module(self.torch)
        if hasattr(module, "current_stream"):
            module.current_stream(self.torch).synchronize()
        else:
            module.synchronize()

    def free_unused(self) -> None:
        """Give back memory that is kept for later, after there was too little."""
        if not self.is_cpu:
            _module(self.torch).empty_cache()


def _module(device: torch.device) -> Any:
    """torch.cuda, torch.xpu or torch.mps."""
    return getattr(torch, device.type)


class Desk:
    """The buffers of one worker: stored values on their way in and out, and what the arithmetic needs.

    They grow to the largest chunk that was worked on and are used again for each.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}
        # Every call of torch gives Python's lock away, and getting it back from another worker takes long.
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def on_host(self, name: str, tag: str, shape: tuple[int, ...]) -> Tensor:
        """The host's buffer `name` as values of the stored dtype `tag`."""
        return self._view(name, torch_dtype(tag), shape, on_host=True)

    def computed(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The buffer `name` on the device as numbers of `dtype`."""
        return self._view(name, dtype, shape, on_host=False)

    def _view(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], on_host: bool) -> Tensor:
        key = (name, dtype, tuple(shape))
        view = self._views.get(key)
        if view is None:
            count = math.prod(shape) * dtype.itemsize
            view = self._bytes(name, count, on_host)[:count].view(dtype).view(shape)
            self._views[key] = view
        return view

    def _bytes(self, name: str, count: int, on_host: bool) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            self._buffers.pop(name, None)
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
            locked = on_host and self.device.torch.type in _PAGE_LOCKED
            place = torch.device("cpu") if on_host else self.device.torch
            buffer = torch.empty(max(count, 8), dtype=torch.uint8, device=place, pin_memory=locked)
            self._buffers[name] = buffer
        return buffer

    def clear(self) -> None:
        """Drop the buffers; the next ones are as large as they have to be then."""
        self._buffers.clear()
        self._views.clear()


def choose_devices(name: str) -> list[Device]:
    """The devices called `name`: auto, cpu, mps, cuda or xpu for all of these, cuda:N or xpu:N for one.

    auto takes the GPUs if there are any. Raises UsageError if a device is not there.
    """
    counts = {kind: _count(kind) for kind in _GPUS}
    if name == "auto":
        name = next((kind for kind in _GPUS if counts[kind]), "cpu")
    kind, colon, number = name.partition(":")
    count = 1 if name == "cpu" else counts.get(kind)
    if count is None or (colon and (kind == "mps" or not number.isdecimal())):
        raise UsageError(f"--device {name}: unknown; it is auto, cpu, cuda, cuda:N, xpu, xpu:N or mps")
    if int(number or 0) >= count:
        raise UsageError(f"--device {name}: torch sees {count} such devices on this machine")
    if kind in ("cpu", "mps") or number:
        return [Device(name)]
    return [Device(f"{kind}:{place}") for place in range(count)]


def _count(kind: str) -> int:
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)  # torch.xpu came with torch 2.3
    return module.device_count() if module is not None else 0
