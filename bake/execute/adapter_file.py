"""An adapter under construction: tensors in any order, names and sizes known one by one, then the file in one go."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from bake.errors import VerificationFailed
from bake.io.draft import Draft
from bake.io.files import copy_range, open_for_writing, read_bytes, write_at
from bake.io.header import TensorInfo, build_header, lay_out
from bake.io.payload import as_bytes
from bake.io.target import refusal_of
from bake.io.tensorfile import SafetensorsFile
from bake.keys.spoken import Names
from bake.keys.written import PEFT_FILES

_TAGS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_PIECE = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Kept:
    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte of the spool
    end: int


class NewAdapter:
    """The output of one command; leaving the block without `publish` leaves its place as it was."""

    def __init__(self, place: Path, names: Names, overwrite: bool) -> None:
        """place: as `check_target` gave it. Nothing is created before the block is entered."""
        self.names = names
        self._weights = PEFT_FILES[0] if names == "peft" else ""
        self._draft = Draft(place, {self._weights: 0}, overwrite)
        self._tensors: dict[str, _Kept] = {}
        self._end = 0

    @property
    def leftover(self) -> bool:
        """True if something that a killed run had left was replaced."""
        return self._draft.leftover

    def add(self, name: str, values: Tensor) -> None:
        """Keep a tensor, in its own dtype and shape."""
        tag = _TAGS[str(values.dtype).removeprefix("torch.")]
        self.add_bytes(name, tag, tuple(values.shape), as_bytes(values.detach().contiguous().reshape(-1)))

    def add_bytes(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview | bytes) -> None:
        """Keep a tensor as it is stored. Raises OutputRefused if the disk does."""
        assert name not in self._tensors, name
        try:
            write_at(self._spool.fileno(), memoryview(data), self._end)
        except OSError as error:
            raise refusal_of(error, self._draft.place) from None
        self._tensors[name] = _Kept(dtype, shape, self._end, self._end + len(data))
        self._end += len(data)

    @property
    def is_empty(self) -> bool:
        return not self._tensors

    def publish(self, metadata: Mapping[str, str], config: Mapping[str, Any] | None) -> int:
        """Write the file, read it back, put it in its place; returns its bytes with what lies beside it.

        config: of a PEFT adapter. Raises OutputRefused and its kin, VerificationFailed.
        """
        placed = lay_out((name, self._tensors[name].dtype, self._tensors[name].shape) for name in sorted(self._tensors))
        header = build_header(placed, metadata)
        path = self._draft.file(self._weights)
        try:
            size = self._write(path, placed, header)
            if config is not None:
                text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
                self._draft.file(PEFT_FILES[1]).write_text(text, encoding="utf-8")
                size += len(text.encode())
        except OSError as error:
            raise refusal_of(error, self._draft.place) from None
        self._verify(path, placed)
        self._draft.publish()
        return size

    def _write(self, path: Path, placed: Mapping[str, TensorInfo], header: bytes) -> int:
        descriptor = open_for_writing(path)
        try:
            os.ftruncate(descriptor, len(header) + self._end)
            write_at(descriptor, memoryview(header), 0)
            for name, info in placed.items():
                kept = self._tensors[name]
                where = len(header) + info.begin
                copy_range(
                    self._spool.fileno(), kept.begin, kept.end, descriptor, where, "the spool", lambda count: None
                )
        finally:
            os.close(descriptor)
        return len(header) + self._end

    def _verify(self, path: Path, placed: Mapping[str, TensorInfo]) -> None:
        """Raise VerificationFailed if the finished draft does not hold what was kept."""
        file = SafetensorsFile(path)
        wrong = sorted(set(file.tensors) ^ set(placed))
        for name, info in placed.items() if not wrong else ():
            kept = self._tensors[name]
            for offset in range(0, info.nbytes, _PIECE):
                buffer = bytearray(min(_PIECE, info.nbytes - offset))
                file.read_into(file.tensors[name].begin + offset, memoryview(buffer))
                begin = kept.begin + offset
                if buffer != read_bytes(self._spool.fileno(), begin, begin + len(buffer), "the spool"):
                    wrong.append(name)
        file.close()
        if wrong:
            raise VerificationFailed(
                f"{self._draft.place} was not written: {len(wrong)} tensors of the draft are not what was computed, "
                f"e.g. {wrong[0]}",
                tensors=wrong,
            )

    def __enter__(self) -> NewAdapter:
        """Create the draft. Raises OutputBusy, OutputExists and OutputRefused."""
        with ExitStack() as undo:
            undo.enter_context(self._draft)
            try:
                # The sizes are only known when the last tensor is: until then all lie in a file without a name.
                self._spool = undo.enter_context(tempfile.TemporaryFile(dir=self._draft.place.parent, buffering=0))
            except OSError as error:
                raise refusal_of(error, self._draft.place) from None
            self._opened = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, traceback)
