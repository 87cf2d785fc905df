"""The whole check of an output against its plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from bake.io.fileset import Expected, FileSet
from bake.io.tensorfile import TensorFile, open_tensors
from bake.plan.model import Plan, TensorPlan
from bake.progress import Progress
from bake.verify.embeddings import check_embedding_files
from bake.verify.report import Report
from bake.verify.structure import check_content, check_structure, check_untouched


def check_files(
    plan: Plan, paths: Mapping[str, Path], full: bool, progress: Progress, embeddings: Mapping[str, Path]
) -> Report:
    """What is wrong with the output files at `paths` (by relative path), measured against `plan`.

    embeddings: where the textual-inversion files are, by name. full: every byte and element; else
    structure, some bytes of each untouched tensor and some rows of a sample of the touched ones.
    Raises InputError for files that cannot be read at all.
    """
    report = Report("full" if full else "sample")
    files = FileSet([Expected(source.path, source.size, source.modified) for source in plan.inputs])
    progress.start("verifying", plan.data_bytes if full else 0)
    for file in plan.files:
        output = open_tensors(paths[file.relative])
        try:
            if not check_structure(file, output, report):
                continue
            for tensor in file.tensors:
                if tensor.content is not None:
                    check_content(tensor, output, report)
                    progress.advance(tensor.span[1] - tensor.span[0] if full else 0)
                elif tensor.is_copy:
                    check_untouched(tensor, output, files, full, report)
                    progress.advance(tensor.span[1] - tensor.span[0] if full else 0)
            touched = [tensor for tensor in file.tensors if tensor.is_computed]
            if touched:
                for tensor, found in _checked(plan, touched, full, output, files):
                    report.include(found)
                    progress.advance(tensor.span[1] - tensor.span[0] if full else 0)
            for tensor in file.tensors:
                if tensor.appended:
                    from bake.verify.numeric import check_appended  # brings NumPy

                    check_appended(tensor, output, files, report)
        finally:
            output.close()
    check_embedding_files(plan, embeddings, report)
    progress.finish()
    return report


def _checked(
    plan: Plan, tensors: list[TensorPlan], full: bool, output: TensorFile, files: FileSet
) -> Iterator[tuple[TensorPlan, Report]]:
    """Each computed tensor that is looked at, with what was found."""
    merged = [tensor for tensor in tensors if tensor.merge is not None]
    fused = [tensor for tensor in tensors if tensor.merge is None]
    if merged:
        from bake.verify.merges import check_merged  # brings NumPy, and torch with the maths of most methods

        yield from check_merged(plan, merged, full, output, files)
    if fused:
        from bake.verify.numeric import check_tensors  # brings NumPy

        yield from check_tensors(plan, fused, full, output, files)
