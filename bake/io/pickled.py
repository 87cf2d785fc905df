"""PyTorch's pickled files (.pt, .bin, .ckpt), through torch's restricted loader: no code is ever run.

This is the one reader that needs torch. Storages of zip-format files are mapped, not read.
"""

from __future__ import annotations

import bisect
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bake.dtypes import DTYPES
from bake.errors import InputError, PickleRefused, Unsupported
from bake.io.announced import check_announced
from bake.io.header import TensorInfo
from bake.io.jsontext import shortened

if TYPE_CHECKING:
    import torch

_MAX_DEPTH = 8  # of containers inside containers; real files have two or three
_FEW_NAMES = 2**20  # characters that the names in a small file may take
_TAGS = {row.torch: row.tag for row in DTYPES.values() if row.torch is not None}


class PickledFile:
    """A pickled file shown as a file of named tensors.

    A state dict keeps its names; a dict around it (`state_dict`) is taken off; entries of a bare
    list are called "0", "1", ...; nested dicts give dotted names. Numbers and texts beside the
    tensors appear as metadata. Byte positions are those of the tensors laid end to end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        status = path.stat()
        self.size, self.modified = status.st_size, status.st_mtime_ns
        self.changed, self.inode = status.st_ctime_ns, status.st_ino
        content = _load(path, self.size)
        self.is_list = isinstance(content, (list, tuple))
        self.left_out: tuple[str, ...] = ()
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            self.left_out = tuple(str(key) for key in content if key != "state_dict")
            content = content["state_dict"]
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._values: list[torch.Tensor] = []
        self._begins: list[int] = []
        self._end = 0
        self._copied = 0  # bytes of tensors that had to be laid out anew
        self._named = 0  # characters of all names
        self._flatten("", content, 0)

    def _flatten(self, name: str, value: Any, depth: int) -> None:
        import torch

        self._named += len(name) + 1
        if self._named > _MAX_DEPTH * self.size + _FEW_NAMES:  # a container may be in others any number of times
            self._refuse("its containers hold each other too often")
        if isinstance(value, torch.Tensor):
            self._add(name, value)
        elif isinstance(value, (dict, list, tuple)):
            if depth == _MAX_DEPTH:
                self._refuse(f"containers in containers, more than {_MAX_DEPTH} deep, at {shortened(name)}")
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                self._flatten(f"{name}.{key}" if name else str(key), item, depth + 1)
        elif isinstance(value, (str, int, float, bool)):
            self.metadata[name] = str(value)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        import torch

        tag = _TAGS.get(str(tensor.dtype).removeprefix("torch."))
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if tag is None or not is_plain or tensor.is_quantized or tensor.is_neg() or tensor.device.type != "cpu":
            kind = tensor.dtype if is_plain else type(tensor).__name__
            raise Unsupported(f"{self.path}: {shortened(name)} is stored as {kind}, which bake does not read")
        if name in self.tensors or name == "__metadata__" or not _is_text(name):
            self._refuse(f"{shortened(name)} {'twice' if name in self.tensors else 'as the name of a tensor'}")
        nbytes = tensor.numel() * tensor.element_size()
        if not tensor.is_contiguous():
            self._copied += nbytes
            if self._copied > self.size:
                self._refuse(f"{shortened(name)} of shape {list(tensor.shape)} repeats the numbers it is made of")
        self.tensors[name] = TensorInfo(tag, tuple(tensor.shape), self._end, self._end + nbytes)
        self._values.append(tensor.detach().contiguous())
        self._begins.append(self._end)
        self._end += nbytes

    def _refuse(self, why: str) -> NoReturn:
        raise InputError(f"{self.path}: not a PyTorch file that bake reads: {why}", path=str(self.path))

    def read_into(self, begin: int, buffer: memoryview) -> None:
        import torch

        done = 0
        place = max(0, bisect.bisect_right(self._begins, begin) - 1)
        while done < len(buffer):
            tensor = self._values[place]
            raw = tensor.reshape(-1).view(torch.uint8).numpy()
            piece = raw[begin + done - self._begins[place] :][: len(buffer) - done]
            buffer[done : done + len(piece)] = piece.data
            done += len(piece)
            place += 1

    def prefetch(self, begin: int, end: int) -> None:
        pass  # mapped or in memory already

    def forget(self, begin: int, end: int) -> None:
        pass

    def kernel_span(self) -> None:
        return None

    def close(self) -> None:
        pass  # torch owns the mapping


def _load(path: Path, size: int) -> Any:
    is_zip = check_announced(path, size)
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read is refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:  # stricter than the check above
        raise PickleRefused(
            f"{path}: refused: PyTorch's restricted loader finds more in it than tensors, which could run code. "
            f"Ask its author for a .safetensors file.",
            path=str(path),
        ) from None
    except Exception as error:  # whatever the bytes made torch stumble over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable PyTorch file: {reason}", path=str(path)) from None


def _is_text(name: str) -> bool:
    """True unless the name holds half a character, which no header can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
