"""Files for the embeddings that travelled in adapters, against what was stored there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bake.errors import InputError
from bake.io.fileset import Expected, FileSet
from bake.io.tensorfile import open_tensors, read_tensor_bytes
from bake.plan.model import EmbeddingPlan, Plan
from bake.verify.report import Report


def check_embedding_files(plan: Plan, paths: Mapping[str, Path], report: Report) -> None:
    """Compare the textual-inversion files at `paths` (by name) with the adapters' tensors, byte by byte.

    A file that is not there was moved to where it is used, perhaps: it is named in the report, not a finding.
    """
    files = FileSet([Expected(source.path, source.size, source.modified) for source in plan.inputs])
    for embedding in plan.embeddings:
        if embedding.file is None:
            continue
        path = paths[embedding.file]
        if not path.exists():
            report.embeddings_not_found.append(str(path))
            continue
        report.embeddings += 1
        wrong = _difference(embedding, path, files)
        if wrong is not None:
            report.add(f"{path}: {wrong}")


def _difference(embedding: EmbeddingPlan, path: Path, files: FileSet) -> str | None:
    try:
        found = open_tensors(path)
    except InputError as error:
        return error.message
    try:
        if found.tensors.keys() != {vectors.key for vectors in embedding.vectors}:
            return f"it holds {', '.join(found.tensors)}, not the embedding of {embedding.token}"
        for vectors in embedding.vectors:
            info = found.tensors[vectors.key]
            with files.using(vectors.stored.input) as source:
                stored = read_tensor_bytes(source, vectors.stored.name)
            if (info.dtype, info.shape) != (vectors.stored.dtype, vectors.stored.as_rows):
                return f"{vectors.key} is {info.dtype} {list(info.shape)}, not as in the adapter"
            if read_tensor_bytes(found, vectors.key) != stored:
                return f"{vectors.key} is not the adapter's embedding of {embedding.token}"
        return None
    finally:
        found.close()
