"""Textual-inversion files for the embeddings that adapters carry: each drafted beside its place, then renamed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from bake.errors import NonFinite, OutputRefused
from bake.interrupts import uninterrupted
from bake.io.draft import Draft
from bake.io.files import open_for_writing, write_at
from bake.io.fileset import Expected, FileSet
from bake.io.header import TensorInfo, build_header, lay_out
from bake.io.target import check_target, refusal_of
from bake.io.tensorfile import read_tensor_bytes
from bake.plan.model import EmbeddingPlan, Plan

TOKEN_KEY = "bake.token"


def embedding_sizes(plan: Plan) -> dict[str, int]:
    """Bytes of each textual-inversion file, by its name."""
    return {
        embedding.file: len(_header(embedding)) + sum(v.stored.span[1] - v.stored.span[0] for v in embedding.vectors)
        for embedding in plan.embeddings
        if embedding.file is not None
    }


def check_places(plan: Plan, folder: Path, overwrite: bool) -> None:
    """Raise the OutputRefused that writing the embeddings of `plan` into `folder` would meet."""
    sizes = embedding_sizes(plan)
    if sizes and os.path.lexists(folder):
        if not folder.is_dir():
            raise OutputRefused(f"{folder} is no folder; the embeddings of the output go there", path=str(folder))
        same = _written_before(plan, folder)
        for name, size in sizes.items():
            inputs = [source.path for source in plan.inputs]
            check_target(folder / name, inputs, False, overwrite or name in same, size)


def _written_before(plan: Plan, folder: Path) -> set[str]:
    """Files in `folder` that are what they would become: a run killed just before its output was there left them."""
    files = _inputs_of(plan)
    return {
        embedding.file
        for embedding in plan.embeddings
        if embedding.file is not None and _holds(folder / embedding.file, embedding, files)
    }


def _holds(path: Path, embedding: EmbeddingPlan, files: FileSet) -> bool:
    try:
        return path.is_file() and path.read_bytes() == _content(embedding, files)
    except OSError:
        return False


def _inputs_of(plan: Plan) -> FileSet:
    return FileSet([Expected(source.path, source.size, source.modified) for source in plan.inputs])


class EmbeddingFiles:
    """The textual-inversion files under construction; leaving the block removes what was not published."""

    def __init__(self, plan: Plan, folder: Path, overwrite: bool = False) -> None:
        self._plan, self._folder, self._overwrite = plan, folder, overwrite
        self._drafts: dict[str, Draft] = {}
        self._is_new = False  # the folder

    def __enter__(self) -> EmbeddingFiles:
        """Create the drafts, and the folder where it is missing. Raises OutputRefused and its kin."""
        try:
            sizes = embedding_sizes(self._plan)
            if sizes:
                self._make_folder()
            same = _written_before(self._plan, self._folder)
            for name, size in sizes.items():
                draft = Draft((self._folder / name).resolve(), {"": size}, self._overwrite or name in same)
                self._drafts[name] = draft
                draft.__enter__()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _make_folder(self) -> None:
        with uninterrupted():
            try:
                self._folder.mkdir()
            except FileExistsError:
                return
            except OSError as error:
                raise refusal_of(error, self._folder) from None
            self._is_new = True

    @property
    def leftover(self) -> bool:
        """True if drafts that a killed run had left were replaced."""
        return any(draft.leftover for draft in self._drafts.values())

    @property
    def paths(self) -> dict[str, Path]:
        """Where each file is under construction, by its name."""
        return {name: draft.path for name, draft in self._drafts.items()}

    def write(self) -> None:
        """Write every file. Raises NonFinite, InputChanged, and the disk's OSError."""
        files = _inputs_of(self._plan)
        for embedding in self._plan.embeddings:
            if embedding.file is not None:
                output = open_for_writing(self._drafts[embedding.file].path)
                try:
                    write_at(output, memoryview(_content(embedding, files)), 0)
                finally:
                    os.close(output)

    def seal(self) -> None:
        """Bring every file to the disk. Raises OutputRefused if the disk refuses."""
        for draft in self._drafts.values():
            draft.seal()

    def publish(self) -> None:
        """Put every file into its place. Raises OutputRefused if the system refuses."""
        for draft in self._drafts.values():
            try:
                draft.publish()
            except OutputRefused as error:
                if not draft.is_published:
                    raise
                raise OutputRefused(
                    f"{self._folder}: the system failed: {error.details['reason']}; the output was not written",
                    path=str(self._folder),
                ) from None

    def withdraw(self) -> None:
        """Remove the files that are where none was: the output that they belong to did not get into its place.

        Those that replaced older ones stay.
        """
        for draft in self._drafts.values():
            if draft.is_published and not draft.has_replaced:
                with suppress(OSError):  # what is raised already matters more
                    draft.place.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for draft in self._drafts.values():
            draft.__exit__(kind, error, traceback)
        if self._is_new:
            with suppress(OSError):  # it is not empty
                self._folder.rmdir()


def _layout(embedding: EmbeddingPlan) -> dict[str, TensorInfo]:
    return lay_out((vectors.key, vectors.stored.dtype, vectors.stored.as_rows) for vectors in embedding.vectors)


def _header(embedding: EmbeddingPlan) -> bytes:
    return build_header(_layout(embedding), {"format": "pt", TOKEN_KEY: embedding.token})


def _content(embedding: EmbeddingPlan, files: FileSet) -> bytes:
    """The whole file: a few vectors, as they are stored in the adapter. Raises NonFinite if one is no number."""
    from bake.io.payload import holds_numbers  # brings torch

    data = {}
    for vectors in embedding.vectors:
        with files.using(vectors.stored.input) as file:
            data[vectors.key] = read_tensor_bytes(file, vectors.stored.name)
            finite = holds_numbers(file, vectors.stored.span[0], vectors.stored.dtype, vectors.stored.shape)
        if not finite:
            raise NonFinite(f"{vectors.stored.name}: the embedding holds NaN or infinity", tensor=vectors.stored.name)
    return _header(embedding) + b"".join(data[name] for name in _layout(embedding))
