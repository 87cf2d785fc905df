"""PyTorch's pickled files (.pt, .bin, .ckpt), through torch's restricted loader: no code is ever run.

This is the one reader that needs torch. Storages of zip-format files are mapped, not read.
"""

from __future__ import annotations

import bisect
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.dtypes import DTYPES
from bake.errors import InputError, PickleRefused, Unsupported
from bake.io.header import TensorInfo

if TYPE_CHECKING:
    import torch

_MAX_DEPTH = 8  # of containers inside containers; real files have two or three


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
        content = _load(path, self.size)
        self.is_list = isinstance(content, (list, tuple))
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        values: dict[str, torch.Tensor] = {}
        self.metadata: dict[str, str] = {}
        self._flatten("", content, values, 0)
        self.tensors: dict[str, TensorInfo] = {}
        self._values = list(values.values())
        self._begins: list[int] = []
        tags = {row.torch: row.tag for row in DTYPES.values() if row.torch is not None}
        begin = 0
        for name, tensor in values.items():
            tag = tags.get(str(tensor.dtype).removeprefix("torch."))
            if tag is None or tensor.is_quantized or tensor.is_sparse:
                raise Unsupported(f"{path}: {name!r} is stored as {tensor.dtype}, which bake does not read")
            end = begin + tensor.numel() * tensor.element_size()
            self.tensors[name] = TensorInfo(tag, tuple(tensor.shape), begin, end)
            self._begins.append(begin)
            begin = end

    def _flatten(self, name: str, value: Any, into: dict[str, torch.Tensor], depth: int) -> None:
        import torch

        if isinstance(value, torch.Tensor):
            into[name] = value.detach().contiguous()
        elif isinstance(value, (dict, list, tuple)) and depth < _MAX_DEPTH:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                self._flatten(f"{name}.{key}" if name else str(key), item, into, depth + 1)
        elif isinstance(value, (str, int, float, bool)):
            self.metadata[name] = str(value)

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
    import torch

    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_zip(path, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read is refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|class|type) ([\w.]+\.[\w.]+)", str(error))
        raise PickleRefused(
            f"{path}: refused: the pickle asks for {wanted[1] if wanted else 'something other than tensors'}, "
            f"which could run code. Ask its author for a .safetensors file.",
            path=str(path),
            wanted=wanted[1] if wanted else None,
        ) from None
    except Exception as error:  # whatever the bytes made torch stumble over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable PyTorch file: {reason}", path=str(path)) from None


def _check_zip(path: Path, size: int) -> None:
    """torch stores its records uncompressed; anything that would grow on reading is refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path}: a damaged zip file: {error}", path=str(path)) from None
    if unpacked > size:
        raise PickleRefused(
            f"{path}: refused: its records unpack to {unpacked} bytes from a file of {size}; "
            f"PyTorch stores them uncompressed.",
            path=str(path),
        )
