"""What the workers share out among them: tensors to compute, very large ones by rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bake.dtypes import DTYPES
from bake.io.fileset import FileSet
from bake.io.journal import Span
from bake.keys.factors import as_matrix
from bake.plan.model import Plan, TensorPlan

_PART_ELEMENTS = 16 * 1024 * 1024  # tensors with more are worked on by several workers


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one tensor that one worker takes care of."""

    tensor: TensorPlan
    relative: str  # output file it belongs to
    rows: range

    def span(self, data_start: int) -> Span:
        """Where these rows lie in the output file, whose data section begins at byte `data_start`."""
        row = as_matrix(self.tensor.view)[1] * DTYPES[self.tensor.dtype].bits // 8  # bytes
        begin = data_start + self.tensor.span[0]
        return Span(self.relative, begin + self.rows.start * row, begin + self.rows.stop * row)

    def prefetch(self, files: FileSet) -> None:
        """Ask the system to have what is needed for it in memory soon."""
        tensor, source = self.tensor, self.tensor.source
        height = max(1, tensor.source_size[0])
        row = (source.span[1] - source.span[0]) // height  # bytes
        begin, end = (source.span[0] + min(place, height) * row for place in (self.rows.start, self.rows.stop))
        wanted = [(source.input, begin, end)]
        if self.rows.start == 0:
            factors = (stored for term in tensor.terms for stored in term.factors.values())
            wanted += [(stored.input, *stored.span) for stored in factors]
        for place, begin, end in wanted:
            with files.using(place) as file:
                file.prefetch(begin, end)


def parts_of(plan: Plan) -> Iterator[Part]:
    """All parts of all tensors that are computed, in the order of the files."""
    for file, tensor in plan.tensors():
        if tensor.is_computed:
            height, width = as_matrix(tensor.view)
            rows = max(1, _PART_ELEMENTS // max(1, width))
            for first in range(0, height, rows):
                yield Part(tensor, file.relative, range(first, min(height, first + rows)))
