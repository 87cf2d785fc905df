"""What a PyTorch pickle announces, looked at before torch allocates any of it: no name in it is ever looked up.

torch's restricted loader runs no code, but it believes what the pickle says about sizes, and its releases differ in
how they treat archives other than the two usual kinds.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

from bake.errors import InputError, PickleRefused

_MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles that make up a file before torch 1.6
_TAR_BLOCK = 512
_WIDTHS = {  # bytes of an element, by the storage's name
    "ComplexDoubleStorage": 16,
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
}


def check_announced(path: Path, size: int) -> bool:
    """True if the file at `path`, of `size` bytes, is a zip archive, as torch writes them since 1.6.

    Raises PickleRefused for archives that would grow on reading, hold a program or are of the kind that could run
    code, InputError for what is damaged, or announces more numbers than it holds.
    """
    with path.open("rb") as file:
        try:
            if file.read(4) == b"PK\x03\x04":
                _check_zip(file, size, path)
                return True
            _check_legacy(file, size, path)
            return False
        except InputError:
            raise
        except Exception as error:  # whatever the bytes made Python's own readers stumble over
            raise InputError(f"{path}: not a readable PyTorch file: {error}", path=str(path)) from None


def _check_zip(file: IO[bytes], size: int, path: Path) -> None:
    """torch stores its records uncompressed, one of them the pickle, each of the others one storage."""
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: record for record in archive.infolist()}
        unpacked = sum(record.file_size for record in archive.infolist())
        if unpacked > size:
            raise PickleRefused(
                f"{path}: refused: its records unpack to {unpacked} bytes from a file of {size}; "
                f"PyTorch stores them uncompressed.",
                path=str(path),
            )
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
            raise PickleRefused(f"{path}: refused: it was packed again; PyTorch's records are not compressed")
        if len(records) != len(archive.infolist()):
            raise InputError(f"{path}: not a readable PyTorch file: it has two records of one name", path=str(path))
        if any(name.endswith("/constants.pkl") for name in records):
            raise PickleRefused(
                f"{path}: refused: a TorchScript program, not a state dict. Save the state_dict() of its module.",
                path=str(path),
            )
        pickles = [name for name in records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(f"{path}: not a readable PyTorch file: {len(pickles)} records called data.pkl")
        storages = _Announced(io.BytesIO(archive.read(pickles[0]))).storages()
    folder = pickles[0].removesuffix("data.pkl") + "data/"
    for key, announced in storages.items():
        record = records.get(folder + key)
        if record is None or announced > record.file_size:
            held = 0 if record is None else record.file_size
            raise InputError(f"{path}: truncated: storage {key!r} should take {announced} bytes, it has {held}")


def _check_legacy(file: IO[bytes], size: int, path: Path) -> None:
    """Four pickles: a magic number, the protocol, facts about the machine, and the object; then the storages."""
    file.seek(0)
    if _is_tar(file.read(_TAR_BLOCK)):
        raise PickleRefused(
            f"{path}: refused: a tar archive, as PyTorch wrote them before 0.2, which some releases of PyTorch load "
            f"without any restriction. Ask its author for a .safetensors file.",
            path=str(path),
        )
    file.seek(0)
    announced = _Announced(_Bounded(file, size))
    if announced.load() != _MAGIC:
        if announced.names:
            raise PickleRefused(
                f"{path}: refused: the pickle asks for {announced.names[0]}, which could run code. "
                f"Ask its author for a .safetensors file.",
                path=str(path),
                wanted=announced.names[0],
            )
        raise InputError(f"{path}: not a readable PyTorch file: a pickle, but not one of PyTorch's", path=str(path))
    announced.load()
    announced.load()
    total = sum(announced.storages().values())
    if total > size:
        raise InputError(f"{path}: truncated: its tensors should take {total} bytes, the file has {size}")


def _is_tar(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _Bounded:
    """A file of which nobody can ask for more than there is: reading allocates first."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self._size - self._file.tell())))

    def readline(self) -> bytes:
        return self._file.readline(self._size)


class _Stub:
    """Stands for everything that a pickle names: takes anything, does nothing."""

    def __new__(cls, *arguments: Any) -> _Stub:
        return super().__new__(cls)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


class _Tuple(tuple[Any, ...]):
    """A tuple that is no key if it holds others: hashing a million of them inside each other ends the process."""

    def __hash__(self) -> int:
        if any(isinstance(item, tuple) for item in self):
            raise TypeError("tuples of tuples as keys")
        return super().__hash__()


def _with_bounded_hash(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """The loader of an opcode that makes a tuple, with a `_Tuple` in its place."""

    def load_tuple(reader: Any) -> None:
        load(reader)
        reader.stack[-1] = _Tuple(reader.stack[-1])

    return load_tuple


class _Announced(pickle._Unpickler):
    """Goes through pickles with stubs in the place of all that they name, and notes the sizes of storages.

    Python's own reader, because that of C allocates by the numbers it finds.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **{
            opcode[0]: _with_bounded_hash(pickle._Unpickler.dispatch[opcode[0]])
            for opcode in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
        },
    }

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.names: list[str] = []
        self._sizes: dict[str, int] = {}

    def storages(self) -> dict[str, int]:
        """Key -> bytes of each storage that the next pickle mentions."""
        self.load()
        return self._sizes

    def find_class(self, module: str, name: str) -> type[_Stub]:
        self.names.append(f"{module}.{name}")
        return type(name, (_Stub,), {})

    def persistent_load(self, pid: Any) -> _Stub:
        mark, kind, key, _, count = pid[:5]
        if mark != "storage" or type(key) is not str or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"{mark!r} is not a storage")
        self._sizes[key] = max(self._sizes.get(key, 0), count * _WIDTHS.get(kind.__name__, 1))
        return _Stub()
