"""Where the arithmetic happens: CPU, CUDA and Apple GPUs behind one interface."""

from __future__ import annotations

import torch
from torch import Tensor

from bake.errors import UsageError


class Device:
    """A compute device. On a GPU, host buffers are page-locked so that copies run beside the arithmetic."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)

    @property
    def is_cpu(self) -> bool:
        return self.torch.type == "cpu"

    @property
    def has_float64(self) -> bool:
        return self.torch.type != "mps"

    def staging(self, nbytes: int) -> Tensor:
        """A host buffer of bytes that this device can exchange quickly."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.torch.type == "cuda")

    def scratch(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Working memory on the device."""
        return torch.empty(elements, dtype=dtype, device=self.torch)

    def upload(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device."""
        return tensor.to(self.torch)


def choose_device(name: str) -> Device:
    """The device called `name`: auto, cpu, cuda, cuda:N or mps; auto takes a GPU if there is one.

    Raises UsageError if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind)
    if count is None or (number and not number.isdigit()):
        raise UsageError(f"--device {name}: unknown; it is auto, cpu, cuda, cuda:N or mps")
    if int(number or 0) >= count:
        raise UsageError(f"--device {name}: torch sees {count} such devices on this machine")
    return Device(name)
