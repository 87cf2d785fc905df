"""Sums over all elements of a tensor that come out the same to the last bit for any chunks, threads and device.

Each row is summed by halves; the rows are the leaves of one binary tree, in which every node is the sum of its two
halves. A chunk is a run of rows, so it consists of a few whole subtrees, whatever its height. Only additions of
two numbers are made, in an order that follows from the tensor's shape. The error grows with the logarithm of
the number of elements. (Pairwise summation: Higham, Accuracy and Stability of Numerical Algorithms, section 4.2)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bake.merges.merge import Chunk, Survey


class Sums(Survey):
    """Sums of rows of numbers: what a function makes of every row of the tensor, added up."""

    def __init__(self, rows: int, numbers: Callable[[Chunk], Tensor]) -> None:
        """rows: of the tensor. numbers: chunk -> (rows of the chunk, k), float64, k numbers for each row."""
        self._rows = rows
        self._numbers = numbers
        self._nodes: dict[tuple[int, int], Tensor] = {}  # (level, place): rows [place, place + 1) * 2^level
        self._lock = threading.Lock()

    def add(self, chunk: Chunk) -> None:
        nodes = [(level, place, node.cpu()) for level, place, node in _subtrees(chunk.first, self._numbers(chunk))]
        with self._lock:
            for level, place, node in nodes:
                self._insert(level, place, node)

    def _insert(self, level: int, place: int, node: Tensor) -> None:
        """Add a subtree, joined with its other half as long as that is there."""
        while 1 << level < self._rows:
            has_other = (place ^ 1) << level < self._rows  # the last ones may have none
            if has_other:
                other = self._nodes.pop((level, place ^ 1), None)
                if other is None:
                    break
                node = node + other
            level, place = level + 1, place // 2
        self._nodes[level, place] = node

    @property
    def total(self) -> Tensor:
        """The k sums, on the CPU, once every row was there."""
        ((place, total),) = self._nodes.items()
        assert place[1] == 0
        return total


def _subtrees(first: int, rows: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(level, place, sum) of the largest subtrees that lie within these rows. rows: (n, k), from row `first` on."""
    level = 0
    while len(rows):
        if first % 2:
            yield level, first, rows[0]
            first, rows = first + 1, rows[1:]
        if len(rows) % 2:
            yield level, first + len(rows) - 1, rows[-1]
            rows = rows[:-1]
        rows = rows[0::2] + rows[1::2]
        first, level = first // 2, level + 1


def row_sums(values: Tensor) -> Tensor:
    """The sum of each row: (rows,). values: (rows, columns), used up.

    The second half is added to the first, whose length is a power of two, until one column is left.
    """
    count = values.shape[1]
    while count > 1:
        half = 1 << (count - 1).bit_length() - 1
        values[:, : count - half] += values[:, half:count]
        count = half
    return values[:, 0]


def products(vectors: Sequence[Tensor]) -> Tensor:
    """The inner products of each row of every two vectors: (rows, n * (n + 1) / 2), see `place_of`.

    vectors: n tensors (rows, columns).
    """
    pairs = [(i, j) for j in range(len(vectors)) for i in range(j + 1)]
    return torch.stack([row_sums(vectors[i] * vectors[j]) for i, j in pairs], dim=1)


def place_of(i: int, j: int) -> int:
    """Where `products` has the product of vectors i and j."""
    low, high = sorted((i, j))
    return high * (high + 1) // 2 + low


def gram(products: Sequence[float], count: int) -> list[list[float]]:
    """The matrix of the inner products of `count` vectors."""
    return [[products[place_of(i, j)] for j in range(count)] for i in range(count)]
