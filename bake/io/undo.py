"""What a bake replaced, kept in a file of its own: with the output it gives back the base, bit for bit.

An undo file is a safetensors file. Its metadata has a record of the files of the base and of the output, by size and
SHA-256. Its tensors hold what the output does not: "N" is the header of the base's file N, or all of a file that is no
weight file; "N:NAME" is a tensor of it. What is not there is in the output as it was.

Each is a sequence of frames, one for every MiB: 4 bytes of length (little-endian), then the packed difference (see
`differences`) to what the output has under that name in the same dtype, as far as it goes, and to zeros after that.
A frame of no length stands for no difference.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol, TypeVar

from bake.dtypes import DTYPES
from bake.errors import InputError
from bake.io.digest import digest_file, known_digest
from bake.io.files import read_bytes, read_into, reading, status_of, write_at
from bake.io.header import MAX_HEADER_BYTES, TensorInfo, build_header, header_length, parse_header
from bake.io.jsontext import parse_object, shortened
from bake.io.packing import PACKINGS, check_packing, packed, unpacked
from bake.io.tensorfile import SafetensorsFile

UNDO_KEY = "bake.undo"
UNDO_SCHEMA = 1
_SUFFIX = ".undo"
_PIECE = 1024 * 1024
_LENGTH = 4  # bytes that say how long a frame is
_LONGEST = 2 * _PIECE  # of a frame; no packing makes a piece that much longer
_AHEAD = 2  # pieces at work or waiting, for each thread

T = TypeVar("T")
Files = Callable[[str], Path]  # where the file of the output with that relative path is


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of the output."""

    name: str  # relative path with slashes; "" if it is all of the output
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class BaseFile:
    """A file of the base."""

    name: str  # relative path with slashes; "" if it is all of the base
    size: int  # bytes
    sha256: str
    like: str  # the file of the output that took its place
    header: int | None  # bytes before its tensors; None: it is no weight file


@dataclass(frozen=True, slots=True)
class UndoRecord:
    """What an undo file says about itself."""

    packing: str  # one of PACKINGS
    output: tuple[OutputFile, ...]
    base: tuple[BaseFile, ...]

    @property
    def is_folder(self) -> bool:
        """True if the base is more than one file."""
        return self.base[0].name != ""

    def to_text(self, version: str) -> str:
        """JSON, as it is stored."""
        return json.dumps({"schema": UNDO_SCHEMA, "version": version, **asdict(self)}, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the base that is to be kept."""

    name: str  # as in BaseFile
    path: Path
    like: str
    is_weights: bool


@dataclass(frozen=True, slots=True)
class _Raw:
    """An open file seen as bytes."""

    path: Path
    descriptor: int
    start: int  # bytes before the tensors; of other files, all
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class _Part:
    """Consecutive bytes of a base file."""

    key: str  # of what is kept of them
    begin: int  # byte of the base file
    end: int
    width: int  # bytes of a word
    like: tuple[int, int]  # [begin, end) bytes of the output's file that they are compared with

    @property
    def can_be_copied(self) -> bool:
        """True if they may be what the output has."""
        return self.end - self.begin == self.like[1] - self.like[0]

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(bytes before it, its bytes) of each."""
        size = self.end - self.begin
        return ((offset, min(_PIECE, size - offset)) for offset in range(0, size, _PIECE))

    def counterpart(self, like: _Raw, offset: int, count: int) -> bytes:
        """What the output has in the place of `count` bytes; zeros where it has nothing."""
        begin, end = self.like
        buffer = bytearray(count)
        there = max(0, min(count, end - begin - offset))
        read_into(like.descriptor, memoryview(buffer)[:there], begin + offset, like.path)
        return bytes(buffer)


def undo_place(output: Path) -> Path:
    """Where the undo file of `output` lies: out.undo beside out.safetensors, wherever links lead."""
    place = Path(os.path.realpath(output))
    return place.with_name(place.name.removesuffix(".safetensors") + _SUFFIX)


@contextmanager
def _raw(path: Path, is_weights: bool) -> Iterator[_Raw]:
    if not is_weights:
        with reading(path) as descriptor:
            yield _Raw(path, descriptor, status_of(descriptor, path).st_size, {})
        return
    file = SafetensorsFile(path)
    try:
        yield _Raw(path, *file.kernel_span(), file.tensors)
    finally:
        file.close()


def _whole(place: int, size: int, like: _Raw) -> _Part:
    """All of the base's file number `place`, which is no weight file, and `like` the one that took its place."""
    return _Part(str(place), 0, size, 1, (0, size) if size == like.start else (0, 0))


def _header(place: int, size: int) -> _Part:
    """What a weight file has before its tensors."""
    return _Part(str(place), 0, size, 1, (0, 0))


def _tensors(place: int, start: int, tensors: Mapping[str, TensorInfo], like: _Raw) -> Iterator[_Part]:
    """The tensors of a weight file, in the order of their bytes; start: of the first."""
    for name, info in tensors.items():
        found = like.tensors.get(name)
        is_like = found is not None and found.dtype == info.dtype
        span = (like.start + found.begin, like.start + found.end) if found is not None and is_like else (0, 0)
        width = max(1, DTYPES[info.dtype].bits // 8)
        yield _Part(f"{place}:{name}", start + info.begin, start + info.end, width, span)


def _in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """What the jobs return, in their order; at most `ahead` are at work or waiting."""
    waiting: deque[Future[T]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class UndoWriter:
    """Writes an undo file."""

    def __init__(self, descriptor: int, packing: str, threads: int, advance: Callable[[int], None]) -> None:
        """descriptor: of the empty file. advance: is told of every byte of the base that is done."""
        self._descriptor, self._packing, self._threads, self._advance = descriptor, packing, threads, advance
        self._blobs: dict[str, tuple[int, int]] = {}
        self._end = 0

    def write(self, sources: Sequence[Source], output: Files, version: str) -> None:
        """Keep of `sources` what the files of the finished `output` do not hold.

        Raises InputError and the disk's OSError.
        """
        likes = dict.fromkeys(source.like for source in sources)
        room = self._end = self._room(sources, likes, version)
        stop = threading.Event()
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                digests = {name: pool.submit(digest_file, output(name), stop) for name in likes}
                base = tuple(
                    self._keep(place, source, output(source.like), pool) for place, source in enumerate(sources)
                )
                written = tuple(
                    OutputFile(name, output(name).stat().st_size, digests[name].result().sha256) for name in likes
                )
            finally:
                stop.set()
        blobs = {
            key: TensorInfo("U8", (end - begin,), begin - room, end - room) for key, (begin, end) in self._blobs.items()
        }
        record = UndoRecord(self._packing, written, base)
        header = build_header(blobs, {UNDO_KEY: record.to_text(version)}, room)
        if len(header) != room:
            raise AssertionError("the header of the undo file outgrew its room")
        write_at(self._descriptor, memoryview(header), 0)
        os.ftruncate(self._descriptor, self._end)

    def _room(self, sources: Sequence[Source], likes: Iterable[str], version: str) -> int:
        """Bytes that the header takes at most."""
        keys: list[str] = []
        files: list[BaseFile] = []
        most = _LONGEST
        for place, source in enumerate(sources):
            with _raw(source.path, source.is_weights) as base:
                size = status_of(base.descriptor, source.path).st_size
                keys += [str(place), *(f"{place}:{name}" for name in base.tensors)]
            files.append(BaseFile(source.name, size, "0" * 64, source.like, base.start if source.is_weights else None))
            most += 2 * size
        written = tuple(OutputFile(name, most, "0" * 64) for name in likes)
        text = UndoRecord(self._packing, written, tuple(files)).to_text(version)
        return len(build_header(dict.fromkeys(keys, TensorInfo("U8", (most,), most, most)), {UNDO_KEY: text}))

    def _keep(self, place: int, source: Source, like: Path, pool: ThreadPoolExecutor) -> BaseFile:
        """Write what is to be kept of one file."""
        digest = hashlib.sha256()
        with _raw(source.path, source.is_weights) as base, _raw(like, source.is_weights) as other:
            header = base.start if source.is_weights else None
            parts = [_whole(place, base.start, other)]
            if header is not None:
                parts = [_header(place, header), *_tensors(place, header, base.tensors, other)]
            for part in parts:
                self._write_frames(part, self._frames(part, base, other, digest, pool))
            return BaseFile(source.name, parts[-1].end, digest.hexdigest(), source.like, header)

    def _write_frames(self, part: _Part, frames: Iterator[bytes]) -> None:
        begin = end = self._end
        is_other = not part.can_be_copied
        for frame in frames:
            write_at(self._descriptor, memoryview(len(frame).to_bytes(_LENGTH, "little") + frame), end)
            end += _LENGTH + len(frame)
            is_other = is_other or len(frame) > 0
        if is_other:
            self._blobs[part.key] = begin, end
            self._end = end

    def _frames(self, part: _Part, base: _Raw, like: _Raw, digest: _Hash, pool: ThreadPoolExecutor) -> Iterator[bytes]:
        def jobs() -> Iterator[Callable[[], bytes]]:
            for offset, count in part.pieces():
                begin = part.begin + offset
                stored = read_bytes(base.descriptor, begin, begin + count, base.path)
                digest.update(stored)
                self._advance(count)
                yield _Packing(stored, part.counterpart(like, offset, count), part.width, self._packing)

        return _in_order(pool, jobs(), _AHEAD * self._threads)


@dataclass(frozen=True, slots=True)
class _Packing:
    """Makes a frame."""

    stored: bytes
    like: bytes
    width: int
    packing: str

    def __call__(self) -> bytes:
        if self.stored == self.like:
            return b""
        from bake.io.differences import difference  # brings NumPy

        return packed(difference(self.stored, self.like, self.width), self.packing)


@dataclass(frozen=True, slots=True)
class _Unpacking:
    """Makes of a frame what it was made of."""

    frame: bytes
    like: bytes
    width: int
    packing: str

    def __call__(self) -> bytes:
        if not self.frame:
            return self.like
        from bake.io.differences import restored  # brings NumPy

        return restored(unpacked(self.frame, len(self.like), self.packing), self.like, self.width)


class UndoReader:
    """An undo file of anybody: what it says is checked, and its sizes are limits."""

    def __init__(self, path: Path) -> None:
        """Raises InputError if it is none, or malformed, and Unsupported if it cannot be unpacked here."""
        self.path = path
        self._file = SafetensorsFile(path)
        text = self._file.metadata.get(UNDO_KEY)
        if text is None:
            raise InputError(f"{path} is no undo file: it has no {UNDO_KEY}", path=str(path))
        self.record = _parse_record(text, path)
        check_packing(self.record.packing, path)

    def difference_to(self, root: Path) -> str | None:
        """The first file of the output at `root` that is not what the undo file belongs to, with what is wrong."""
        for file in self.record.output:
            path = root / file.name if file.name else root
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != file.size or known_digest(path).sha256 != file.sha256:
                return f"{path} is not the file that was written then (SHA-256 {file.sha256[:12]}...)"
        return None

    def pieces(self, place: int, output: Files, threads: int) -> Iterator[bytes]:
        """All bytes of the base's file number `place`, in order, from this and the files of the output.

        Raises InputError if what is kept is damaged; only their SHA-256 tells whether they are right.
        """
        file = self.record.base[place]
        with _raw(output(file.like), file.header is not None) as like, ThreadPoolExecutor(threads) as pool:
            if file.header is None:
                yield from self._restored(_whole(place, file.size, like), like, pool, threads)
                return
            header = b"".join(self._restored(_header(place, file.header), like, pool, threads))
            yield header
            for part in _tensors(place, file.header, self._parsed(file, header), like):
                yield from self._restored(part, like, pool, threads)

    def _parsed(self, file: BaseFile, header: bytes) -> dict[str, TensorInfo]:
        """What the kept header of a weight file says."""
        what = f"{self.path}: the header of {file.name or 'the base'}"
        if 8 + header_length(header[:8], file.size, what) != len(header):
            raise InputError(f"{what} has another length than was announced", path=str(self.path))
        return parse_header(header[8:], file.size, what).tensors

    def _restored(self, part: _Part, like: _Raw, pool: ThreadPoolExecutor, threads: int) -> Iterator[bytes]:
        kept = self._file.tensors.get(part.key)
        if kept is not None:
            yield from _in_order(pool, self._unpackings(part, kept, like), _AHEAD * threads)
            return
        if not part.can_be_copied:
            raise InputError(f"{self.path}: it should hold {shortened(part.key)}, and does not", path=str(self.path))
        for offset, count in part.pieces():
            yield part.counterpart(like, offset, count)

    def _unpackings(self, part: _Part, kept: TensorInfo, like: _Raw) -> Iterator[Callable[[], bytes]]:
        position = kept.begin
        for offset, count in part.pieces():
            length = int.from_bytes(self._read(part, position, _LENGTH, kept.end), "little")
            position += _LENGTH
            frame = self._read(part, position, length, kept.end)
            position += length
            yield self._named(
                part, _Unpacking(frame, part.counterpart(like, offset, count), part.width, self.record.packing)
            )
        if position != kept.end:
            raise self._damaged(part, "more follows than was due")

    def _named(self, part: _Part, unpacking: _Unpacking) -> Callable[[], bytes]:
        def unpack() -> bytes:
            try:
                return unpacking()
            except ValueError as error:
                raise self._damaged(part, str(error)) from None

        return unpack

    def _read(self, part: _Part, begin: int, count: int, end: int) -> bytes:
        if count > min(_LONGEST, end - begin):
            raise self._damaged(part, "a frame is longer than what there is")
        buffer = bytearray(count)
        self._file.read_into(begin, memoryview(buffer))
        return bytes(buffer)

    def _damaged(self, part: _Part, why: str) -> InputError:
        return InputError(f"{self.path}: what it keeps as {shortened(part.key)} is damaged: {why}", path=str(self.path))

    def close(self) -> None:
        self._file.close()


def _parse_record(text: str, path: Path) -> UndoRecord:
    """The record in an undo file's metadata; raises InputError for anything that bake did not write."""
    found = parse_object(text.encode("utf-8", "replace"), f"{path}: its {UNDO_KEY}", path=str(path))
    if found.get("schema") != UNDO_SCHEMA:
        raise InputError(
            f"{path}: undo data of schema {shortened(found.get('schema'))}, this bake reads {UNDO_SCHEMA}",
            path=str(path),
        )
    try:
        record = UndoRecord(
            packing=_one_of(PACKINGS, found["packing"]),
            output=tuple(
                OutputFile(_name(each["name"]), _size(each["size"]), _sha256(each["sha256"]))
                for each in found["output"]
            ),
            base=tuple(
                BaseFile(
                    name=_name(each["name"]),
                    size=_size(each["size"]),
                    sha256=_sha256(each["sha256"]),
                    like=_name(each["like"]),
                    header=None if each["header"] is None else _size(each["header"]),
                )
                for each in found["base"]
            ),
        )
        _check_names([file.name for file in record.output])
        _check_names([file.name for file in record.base])
        for file in record.base:
            _one_of([each.name for each in record.output], file.like)
            if file.header is not None and file.header > min(file.size, 8 + MAX_HEADER_BYTES):
                raise ValueError(f"a header of {file.header} bytes in {file.size}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: its {UNDO_KEY} is malformed: {type(error).__name__} {shortened(str(error))}", path=str(path)
        ) from None
    return record


def _one_of(known: Sequence[str], found: Any) -> str:
    if found not in known:
        raise ValueError(f"{shortened(found)} is unknown")
    return str(found)


def _size(found: Any) -> int:
    if type(found) is not int or not 0 <= found < 2**63:
        raise ValueError(f"{shortened(found)} is no size")
    return found


def _sha256(found: Any) -> str:
    if not isinstance(found, str) or len(found) != 64 or not set(found) <= set("0123456789abcdef"):
        raise ValueError(f"{shortened(found)} is no SHA-256")
    return found


def _name(found: Any) -> str:
    """The relative path of a file; raises ValueError for one that leads out of its folder, or is none."""
    if found != "" and not is_storable(found):
        raise ValueError(f"{shortened(found)} is not the name of a file in a folder")
    return str(found)


def is_storable(name: str) -> bool:
    """True for relative paths that mean the same on every system, and nothing outside their folder."""
    path = PureWindowsPath(name)  # knows both slashes, and C:
    is_plain = name == path.as_posix() and not path.root and not {":", "\0"} & set(name)
    is_text = name.encode("utf-8", "replace").decode() == name
    return is_plain and is_text and bool(path.parts) and ".." not in path.parts


def _check_names(names: Sequence[str]) -> None:
    """Raise ValueError unless these can be the files of one folder, or the one file that is all there is."""
    taken = set(names)
    if not names or len(taken) != len(names) or ("" in taken and len(names) > 1):
        raise ValueError("no list of different files")
    for name in names:
        for place, letter in enumerate(name):
            if letter == "/" and name[:place] in taken:
                raise ValueError(f"{shortened(name[:place])} is a file and a folder")
