"""What a PyTorch pickle announces, looked at before torch is let near it: no name in it is looked up here.

torch's restricted loader runs no code, but it believes what a pickle says about sizes, makes what its allow-list
names as often as it is asked to, and its releases differ in how they treat archives other than the two usual kinds.
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

from bake.errors import InputError, PickleRefused
from bake.io.jsontext import shortened

_MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles that make up a file before torch 1.6
_TAR_BLOCK = 512
_CALLED = frozenset(  # what builds tensors and the containers around them, all of it on torch's own list
    {
        *("collections.OrderedDict", "collections.Counter", "builtins.set", "_codecs.encode"),
        *("torch.Size", "torch.device", "torch.serialization._get_layout", "torch.nn.parameter.Parameter"),
        *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"),
        *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
        *("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor"),
        *("torch._utils._rebuild_meta_tensor_no_storage", "torch._tensor._rebuild_from_type_v2"),
    }
)
# What is mentioned beside them: storages, which could be made at any size if they were called, and dtypes.
_MENTIONED = re.compile(r"torch(\.cuda|\.storage)?\.\w+Storage|torch\.(Tensor|bool|per_\w+|[a-z]+\d\w*)")
_WIDTHS = {  # bytes of an element, by the storage's name; 1 for all others
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
        except _Wanted as wanted:
            raise PickleRefused(
                f"{path}: refused: the pickle asks for {shortened(wanted.name)}, which could run code. "
                f"Ask its author for a .safetensors file.",
                path=str(path),
                wanted=wanted.name,
            ) from None
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
        folder = pickles[0].removesuffix("data.pkl")
        outside = next((name for name in records if not name.startswith(folder) or ".." in name.split("/")), None)
        if outside is not None:
            raise InputError(f"{path}: not a readable PyTorch file: a record called {shortened(outside)}")
        storages = _Announced(io.BytesIO(archive.read(pickles[0])), size).storages()
    for key, announced in storages.items():
        record = records.get(f"{folder}data/{key}")
        if record is None or announced > record.file_size:
            held = 0 if record is None else record.file_size
            raise InputError(
                f"{path}: truncated: storage {shortened(key)} should take {announced} bytes, it has {held}"
            )


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
    announced = _Announced(_Bounded(file, size), size)
    if announced.load() != _MAGIC:
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


class _Wanted(Exception):
    """The pickle names what is on no list."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Stub:
    """Stands for everything that a pickle names: takes anything, does nothing."""

    reader: ClassVar[_Announced]
    full_name: ClassVar[str]

    def __new__(cls, *arguments: Any) -> _Stub:
        cls.reader.note_call(cls.full_name, arguments)
        return super().__new__(cls)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
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

    def __init__(self, file: Any, size: int) -> None:
        """size: bytes of the whole file."""
        super().__init__(file)
        self._size = size
        self._passed = 0  # elements of all containers and texts that are passed to calls, which may copy them
        self._storages: dict[str, int] = {}

    def storages(self) -> dict[str, int]:
        """Key -> bytes of each storage that the next pickle mentions."""
        self.load()
        return self._storages

    def find_class(self, module: str, name: str) -> type[_Stub]:
        full = f"{module}.{name}"
        if full not in _CALLED and not _MENTIONED.fullmatch(full):
            raise _Wanted(full)
        return type(name, (_Stub,), {"reader": self, "full_name": full})

    def note_call(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Raise UnpicklingError for a call that could allocate more than the file holds."""
        if name not in _CALLED:
            raise _Wanted(name)
        self._passed += sum(len(each) for each in arguments if isinstance(each, (str, bytes, tuple, list, dict)))
        if self._passed > self._size:
            raise pickle.UnpicklingError(f"{name} is asked to copy more than there is")

    def persistent_load(self, pid: Any) -> None:
        mark, kind, key, _, count = pid[:5]
        if mark != "storage" or type(key) is not str or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"{shortened(str(mark))} is not a storage")
        self._storages[key] = max(self._storages.get(key, 0), count * _WIDTHS.get(kind.__name__, 1))
