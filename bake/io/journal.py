"""What is finished of a draft, in a file beside it, so that another run can go on from there.

The first line says what run it is of; every further one is a span of an output file that was written, with its
digest. Lines are only ever appended, by whoever finished the span. Nothing in it is believed: a span counts if the
draft still holds bytes of that digest, whatever a killed run, a power cut or anybody else made of either file.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bake.errors import InputError
from bake.io.files import read_bytes, read_into, reading, status_of
from bake.io.moves import remove

_SCHEMA = 1
_READ_BACK = 1024 * 1024  # bytes at a time
_MEASURED = 4  # numbers that an entry may carry
_KEPT, _REDONE = 1, 2  # what became of a span that was found; 0: nobody came to it yet

# Part of what a run is -> why another cannot go on with it if that differs.
_DIFFERENCES = {
    "schema": "it is of another version of bake",
    "version": "it is of another version of bake",
    "inputs": "the inputs are others",
    "plan": "something else was asked for",
    "numbers": "torch, NumPy, the device or the machine is another, and may compute other last bits",
    "draft": "its journal is that of another draft",
}


class Span(NamedTuple):
    """Bytes [begin, end) of an output file."""

    file: str  # its relative path
    begin: int
    end: int


class Digest(Protocol):
    """A digest of what is written, like those of hashlib."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Resumed:
    """What became of the work of an earlier run."""

    bytes: int  # that were there and right
    spans: int  # likewise
    redone: int  # spans that the journal names and the draft no longer held
    started_over: str | None  # why all of it was done again; None: it was not, or there was nothing


class _Entry(NamedTuple):
    sha256: str
    measured: tuple[float, ...]


class NoJournal:
    """The journal of a run that nobody is going to resume."""

    def recall(self, span: Span, output: int) -> tuple[float, ...] | None:
        return None

    def digest(self) -> Digest:
        return _NO_DIGEST

    def note(self, span: Span, digest: Digest, measured: Sequence[float] = ()) -> None:
        pass

    def note_copied(self, span: Span, output: int) -> None:
        pass


class _NoDigest:
    def update(self, data: memoryview, /) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


_NO_DIGEST = _NoDigest()


class Journal(NoJournal):
    """The journal of one run: what it finds finished, and what it finishes. Copies of this process share it."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """run: what has to be the same for one run to go on with what another did, as JSON data."""
        self._path = path
        self._run: dict[str, Any] = json.loads(json.dumps({"schema": _SCHEMA, **run}))  # as it is read back
        self._found: dict[Span, _Entry] = {}
        self._fates = _Fates(())

    def load(self, draft: int) -> str | None:
        """Take up what was finished of the draft with that inode number; returns why that cannot be, if so."""
        try:
            with reading(self._path) as fd:
                first, *lines = read_bytes(fd, 0, status_of(fd, self._path).st_size, self._path).split(b"\n")
        except InputError:
            return "it has no journal that can be read"
        found = _parse(first)
        if found is None:
            return "its journal is damaged"
        different = _difference(found, self._run | {"draft": draft})
        if different is None:
            self._take(lines)
        return different

    def _take(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            read = _read_entry(_parse(line) or {})
            if read is not None:
                self._found[read[0]] = read[1]  # the last word counts
        self._fates = _Fates(self._found)

    def start(self, draft: int) -> None:
        """Begin a new journal, of the draft with that inode number. Raises OSError."""
        remove(self._path)
        self._append(json.dumps(self._run | {"draft": draft}), os.O_CREAT | os.O_EXCL)

    @property
    def has_spans(self) -> bool:
        """True if there is something to go on from."""
        try:
            with reading(self._path) as fd:
                return b"\n" in read_bytes(fd, 0, status_of(fd, self._path).st_size, self._path)
        except InputError:
            return False

    def recall(self, span: Span, output: int) -> tuple[float, ...] | None:
        """What was measured of a span that is finished; None if it is to be made.

        output: descriptor of the draft of its file, from which it is read back.
        """
        entry = self._found.get(span)
        if entry is None:
            return None
        try:
            is_there = _digest_of(span, output).hexdigest() == entry.sha256
        except InputError:  # the disk lost it
            is_there = False
        self._fates.set(span, _KEPT if is_there else _REDONE)
        return entry.measured if is_there else None

    def digest(self) -> Digest:
        """A digest that is to be given every byte of a span, in order, when it has been written."""
        return hashlib.sha256()

    def note(self, span: Span, digest: Digest, measured: Sequence[float] = ()) -> None:
        """Note a span that was written, and up to four numbers that were measured on the way. Raises OSError."""
        entry = {**span._asdict(), "sha256": digest.hexdigest(), "measured": [float(each) for each in measured]}
        # The break comes first, so that the end of a torn line is never the beginning of the next.
        self._append("\n" + json.dumps(entry))

    def note_copied(self, span: Span, output: int) -> None:
        """Note a span that was copied by the system, with the digest of what the draft holds now."""
        self.note(span, _digest_of(span, output))

    def _append(self, text: str, flags: int = 0) -> None:
        flags |= os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(self._path, flags, 0o666)
        try:
            data = text.encode()
            while data:  # one write, unless the disk is full
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)

    def resumed(self, started_over: str | None) -> Resumed:
        """What became of all that was found; started_over: why none of it could be used, if so."""
        kept = self._fates.having(_KEPT)
        redone = len(self._fates.having(_REDONE))
        return Resumed(sum(span.end - span.begin for span in kept), len(kept), redone, started_over)

    def remove(self) -> None:
        """Remove the file, if it is there. Raises OSError."""
        remove(self._path)


class _Fates:
    """What became of each span that was found: one byte for each, in memory that copies of this process share.

    No lock is needed: a span is looked at by one worker alone.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self._places = {span: place for place, span in enumerate(spans)}
        self._bytes = mmap.mmap(-1, max(1, len(self._places)))

    def set(self, span: Span, fate: int) -> None:
        self._bytes[self._places[span]] = fate

    def having(self, fate: int) -> list[Span]:
        return [span for span, place in self._places.items() if self._bytes[place] == fate]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object in one line; None for what is none: a torn line, say."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _read_entry(found: Mapping[str, Any]) -> tuple[Span, _Entry] | None:
    """What a line tells; None if it makes no sense."""
    match found:
        case {
            "file": str(file),
            "begin": int(begin),
            "end": int(end),
            "sha256": str(sha256),
            "measured": list(numbers),
        }:
            if len(numbers) <= _MEASURED and all(isinstance(each, float) and math.isfinite(each) for each in numbers):
                return Span(file, begin, end), _Entry(sha256, tuple(numbers))
    return None


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Why a run that wants the one cannot go on with the other."""
    for key, reason in _DIFFERENCES.items():
        old, new = found.get(key), wanted[key]
        if old == new:
            continue
        if key == "inputs" and isinstance(old, dict) and old.keys() == new.keys():
            return f"{next(path for path in new if old[path] != new[path])} changed since"
        return reason
    return None


def _digest_of(span: Span, output: int) -> Digest:
    """The digest of a span of the file that is open as `output`. Raises InputError if it cannot be read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_READ_BACK, span.end - span.begin)))
    position = span.begin
    while position < span.end:
        piece = buffer[: span.end - position]
        read_into(output, piece, position, span.file)
        digest.update(piece)
        position += len(piece)
    return digest
