"""What a plan does to every tensor, counted: each row of a matrix once, or not at all."""

from __future__ import annotations

import math
from collections import defaultdict

from bake.plan.model import Plan

Rectangle = tuple[tuple[int, int], tuple[int, int]]


def touched(plan: Plan) -> set[str]:
    """The tensors that the plan updates, "folder/" before the names of a folder's files.

    Checks that the updates of each cover all of it, all columns of every row exactly once.
    """
    regions: dict[str, list[Rectangle]] = defaultdict(list)
    matrix: dict[str, tuple[int, int]] = {}
    for file, tensor in plan.tensors():
        name = f"{file.relative.rpartition('/')[0]}/{tensor.name}".removeprefix("/")
        matrix[name] = ((*tensor.view, 1)[0], math.prod(tensor.view[1:]))
        for term in tensor.terms:
            assert term.part[1] - term.part[0] == term.rows[1] - term.rows[0], (name, term.module)
            regions[name].append((term.rows, term.columns))
    for name, covered in regions.items():
        height, width = matrix[name]
        edge = 0
        for (first, last), columns in sorted(covered):
            assert first == edge, (name, covered)
            assert columns == (0, width), (name, covered)
            edge = last
        assert edge == height, (name, covered)
    return set(regions)
