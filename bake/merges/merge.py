"""What the maths of every merge method looks like from outside: chunks in, passes first, values out.

For each tensor whoever runs a merge does this, with chunks of any height (rows of the matrix that `Merge.view` says),
in any order, on any number of threads:

    merge = method.load()(job)
    for survey in merge.passes():
        survey.add(chunk)               # for every chunk of the tensor
    merge.blend(chunk)                  # for every chunk: its new values

A call holds a few times what its chunk holds, so heights are divided by the number of models, and more models need no
more memory. With some 64 Ki elements of each model all of that stays in the cache, at half the time of a Mi. Only
methods of reach `global` need more calls: the passes of all tensors first, then `agree` on all their merges, then the
chunks; and merges that are `whole` take the tensor as one chunk.

The bits of the result depend on the models' values, the job and nothing else: sums are made in an order that follows
from the shape (`sums.py`), counts and extremes have no order (`ranks.py`), draws go by place (`chances.py`), and
everything else is one IEEE operation in float64 after the other. That is also why the maths of this folder avoids
operations that may be fused or depend on an element's place in a buffer: `lerp`, `addcmul`, `add(alpha=)`, `sum`,
`pow`.

Tensors of integers or bools, and those of one element or none (markers), are never merged: the planner copies them.
Values that leave one model as it is are found by `Method.alone`, so that its bytes are copied. Whoever reads the models
refuses NaN and infinity: a vote, say, would leave them out without a word.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from bake.merges.method import Values

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor that is to be merged by one method."""

    name: str  # of the tensor; random draws depend on it
    shape: tuple[int, ...]
    roles: tuple[str, ...]  # of the models, in the order of a chunk's, from `Method.roles_of`
    values: Values = field(default_factory=dict)  # of every parameter, from `Method.values`
    seed: int = 0

    def number(self, name: str) -> float:
        """The value of a parameter that is a number."""
        value = self.values[name]
        assert isinstance(value, (float, int))
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """The values of a parameter that each model of the last role has."""
        value = self.values[name]
        assert isinstance(value, tuple)
        return value


class Chunk(NamedTuple):
    """Contiguous rows of a tensor, of every model."""

    first: int  # row of the tensor, seen as the matrix `Merge.view`
    models: Sequence[Tensor]  # (rows, columns) each, float64, contiguous, on one device; nothing here changes them

    @property
    def flat(self) -> int:
        """The flat index in the tensor of the chunk's first element."""
        return self.first * self.models[0].shape[1]


class Survey(ABC):
    """One pass over a tensor."""

    @abstractmethod
    def add(self, chunk: Chunk) -> None:
        """Take in a chunk. Every row has to come once, in any order; may be called by several threads at once."""


class Merge(ABC):
    """One method on one tensor. Raises ValueError where the values of the models leave it undefined."""

    whole: ClassVar[bool] = False  # it takes the tensor as one chunk, and a few times that in memory
    # `blend` takes nothing but + - * / on the elements of one place and needs no pass. Then any run of elements will
    # do as a chunk of one row, and NumPy's arrays will do as tensors: most merges need no torch, whose import is slow.
    is_plain: bool = False

    def __init__(self, job: Job) -> None:
        self.job = job
        self.view = row_view(job.shape)  # (rows, columns) of the matrix that chunks are rows of

    def passes(self) -> Iterator[Survey]:
        """Surveys to be made before `blend`, each once the one before has seen all chunks."""
        return iter(())

    @abstractmethod
    def blend(self, chunk: Chunk) -> Tensor:
        """Return the new values of the chunk: (rows, columns), float64. May be called by several threads at once."""

    @classmethod  # noqa: B027 - most methods need nothing but their own tensor
    def agree(cls, merges: Sequence[Merge]) -> None:
        """For methods of reach `global`: settle what depends on all tensors, once each has had its passes."""

    @property
    def has_base(self) -> bool:
        """True if the first model is the base."""
        return self.job.roles[0] == "base"


def row_view(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) with one row for each index of the first axis; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def column_view(shape: tuple[int, ...]) -> tuple[int, int]:
    """The same, but a vector is one column."""
    return row_view(shape) if len(shape) > 1 else (math.prod(shape), 1)


def between(a: Tensor, b: Tensor, share: Tensor | float) -> Tensor:
    """A + share * (B - A): exactly A where both are equal."""
    total = b - a
    total *= share  # in memory that is in the cache already
    total += a
    return total


def differences(models: Sequence[Tensor]) -> list[Tensor]:
    """What every model but the first, the base, adds to it."""
    return [model - models[0] for model in models[1:]]
