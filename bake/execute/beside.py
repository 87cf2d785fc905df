"""Textual-inversion files for the embeddings that adapters carry: each drafted beside its place, then renamed."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from bake.io.draft import Draft, check_target, refusal_of
from bake.io.fileset import Expected, FileSet
from bake.io.header import TensorInfo, build_header, lay_out
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
    if os.path.isdir(folder):
        for name, size in embedding_sizes(plan).items():
            check_target(folder / name, [source.path for source in plan.inputs], False, overwrite, size)


class EmbeddingFiles:
    """The textual-inversion files under construction; leaving the block removes what was not published."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self._drafts: dict[str, Draft] = {}
        self._is_new = False  # the folder

    def __enter__(self) -> EmbeddingFiles:
        """Create the drafts, and the folder where it is missing. Raises OutputRefused and its kin."""
        with ExitStack() as undo:
            undo.push(self)
            sizes = embedding_sizes(self._plan)
            if sizes and not os.path.exists(self._folder):
                try:
                    self._folder.mkdir()
                except OSError as error:
                    raise refusal_of(error, self._folder) from None
                self._is_new = True
            for name, size in sizes.items():
                self._drafts[name] = Draft((self._folder / name).resolve(), {"": size})
            undo.pop_all()
        return self

    @property
    def paths(self) -> dict[str, Path]:
        """Where each file is under construction, by its name."""
        return {name: draft.path for name, draft in self._drafts.items()}

    def write(self) -> None:
        """Write every file. Raises InputChanged, and the disk's OSError."""
        files = FileSet([Expected(source.path, source.size, source.modified) for source in self._plan.inputs])
        for embedding in self._plan.embeddings:
            if embedding.file is not None:
                self._drafts[embedding.file].path.write_bytes(_content(embedding, files))

    def publish(self) -> None:
        """Put every file into its place. Raises OutputRefused if the system refuses."""
        self._is_new = False
        for draft in self._drafts.values():
            draft.publish()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for draft in self._drafts.values():
            draft.discard()
        if self._is_new and not any(self._folder.iterdir()):
            self._folder.rmdir()


def _layout(embedding: EmbeddingPlan) -> dict[str, TensorInfo]:
    return lay_out((vectors.key, vectors.stored.dtype, vectors.stored.as_rows) for vectors in embedding.vectors)


def _header(embedding: EmbeddingPlan) -> bytes:
    return build_header(_layout(embedding), {"format": "pt", TOKEN_KEY: embedding.token})


def _content(embedding: EmbeddingPlan, files: FileSet) -> bytes:
    """The whole file: a few vectors, as they are stored in the adapter."""
    data = {}
    for vectors in embedding.vectors:
        with files.using(vectors.stored.input) as file:
            data[vectors.key] = read_tensor_bytes(file, vectors.stored.name)
    return _header(embedding) + b"".join(data[name] for name in _layout(embedding))
