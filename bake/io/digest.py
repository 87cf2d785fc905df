"""Digests of whole files: the ones people look models up by, computed beside other work."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from bake.io.files import read_bytes, read_into, reading, status_of
from bake.io.known import Digest, Known
from bake.io.tensorfile import open_tensors

# Large, because every piece waits for Python's lock, which others hold for long while torch is imported.
_PIECE = 16 * 1024 * 1024

_LEGACY_BEGIN, _LEGACY_BYTES = 0x100000, 0x10000


def digest_file(path: Path, stop: threading.Event | None = None) -> Digest:
    """The digests of `path` in one pass; given up (with an empty sha256) once `stop` is set."""
    whole = hashlib.sha256()
    with reading(path) as fd:
        size = status_of(fd, path).st_size
        for piece in _pieces(fd, 0, size, path):
            whole.update(piece)
            if stop is not None and stop.is_set():
                return Digest("", "")
        return Digest(whole.hexdigest(), legacy_hash(fd, size, path))


def known_digests(paths: Iterable[Path], stop: threading.Event | None = None) -> Iterator[Digest]:
    """As `digest_file` of each, but without reading files again that were digested before and did not change since."""
    known = Known()
    try:
        for path in paths:
            with reading(path) as fd:
                status = status_of(fd, path)
            digest = known.recall(path, status)
            if digest is None:
                digest = digest_file(path, stop)
                if digest.sha256:
                    known.note(path, status, digest)
            yield digest
    finally:
        known.save()


def known_digest(path: Path) -> Digest:
    """The same of one file."""
    (digest,) = known_digests([path])
    return digest


def data_sha256(path: Path) -> str | None:
    """SHA-256 of what follows a safetensors header; None for other files.

    Its first 12 digits are AutoV3; ModelSpec's hash_sha256 and kohya's model hash are made alike.
    """
    file = open_tensors(path)
    span = file.kernel_span()
    if span is None:
        return None
    data = hashlib.sha256()
    for piece in _pieces(span[0], span[1], file.size, path):
        data.update(piece)
    file.close()
    return data.hexdigest()


def legacy_hash(fd: int, size: int, path: Path) -> str:
    """The first 8 digits of SHA-256 over 64 KiB at 1 MiB (less where the file ends)."""
    end = min(size, _LEGACY_BEGIN + _LEGACY_BYTES)
    return hashlib.sha256(read_bytes(fd, min(_LEGACY_BEGIN, end), end, path)).hexdigest()[:8]


def _pieces(fd: int, begin: int, end: int, path: Path) -> Iterator[memoryview]:
    """The bytes [begin, end), in pieces that share one buffer: each is valid until the next is taken."""
    buffer = memoryview(bytearray(min(_PIECE, max(0, end - begin))))
    position = begin
    while position < end:
        piece = buffer[: end - position]
        read_into(fd, piece, position, path)
        yield piece
        position += len(piece)


class BackgroundDigests:
    """Digests of several files, computed in a thread while the main work runs; leaving the block ends it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._digests: list[Digest] = []
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bake digests", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._digests += known_digests(self._paths, self._stop)
        except BaseException as error:
            self._error = error

    def result(self) -> list[Digest]:
        """Wait for all digests; raises what reading raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digests

    def __enter__(self) -> BackgroundDigests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
