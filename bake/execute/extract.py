"""The differences of two models, module by module: read in blocks of rows, factored, kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from bake.errors import NonFinite
from bake.execute.adapter_file import NewAdapter
from bake.factoring import factors
from bake.factoring.ranks import kept
from bake.factoring.spectrum import spectrum_of
from bake.io.fileset import Expected, FileSet
from bake.io.payload import read_rows, read_tensor, torch_dtype
from bake.keys.written import SUFFIXES
from bake.plan.adapter import ADAPTER_DTYPES, DEFAULT_RANK, Outcome, Ranks
from bake.plan.extraction import DifferencePlan, ExtractionPlan, Stretch
from bake.progress import Progress

_BLOCK_ELEMENTS = 4 * 1024 * 1024
_VAE = "vae"


class Rows:
    """The rows of one parameter of one model, assembled from where they are stored."""

    def __init__(self, files: FileSet, stretches: tuple[Stretch, ...]) -> None:
        self._files, self._stretches = files, stretches
        self._turned: dict[Stretch, Tensor] = {}

    def read(self, wanted: range) -> Tensor:
        """These rows as a float32 matrix, float64 where they are stored so."""
        pieces = []
        first = 0
        for stretch in self._stretches:
            height = stretch.rows[1] - stretch.rows[0]
            begin, end = max(wanted.start, first), min(wanted.stop, first + height)
            if begin < end:
                offset = stretch.rows[0] - first
                pieces.append(self._rows(stretch, range(begin + offset, end + offset)))
            first += height
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _rows(self, stretch: Stretch, rows: range) -> Tensor:
        stored = stretch.stored
        dtype = torch.float64 if stored.dtype == "F64" else torch.float32
        if stretch.transposed:
            if stretch not in self._turned:
                with self._files.using(stored.input) as file:
                    self._turned[stretch] = read_tensor(file, stored.span[0], stored.dtype, stored.shape, dtype).T
            return self._turned[stretch][rows.start : rows.stop].flatten(1)
        with self._files.using(stored.input) as file:
            return read_rows(file, stored.span[0], stored.dtype, stretch.columns, rows, dtype)


class Difference:
    """tuned - base of one parameter, as a matrix; held where it is smaller than `memory` bytes, else read again."""

    def __init__(self, plan: DifferencePlan, files: FileSet, memory: int) -> None:
        self.shape = plan.matrix
        self.tuned, self.base = Rows(files, plan.tuned), Rows(files, plan.base)
        self._held: list[tuple[range, Tensor]] | None = None
        self._holds = 4 * math.prod(self.shape) <= memory

    def blocks(self) -> Iterator[tuple[range, Tensor]]:
        if self._held is not None:
            yield from self._held
            return
        held = []
        for rows in self.ranges():
            block = (self.tuned.read(rows) - self.base.read(rows)).to(torch.float32)
            if self._holds:
                held.append((rows, block))
            yield rows, block
        self._held = held if self._holds else None

    def ranges(self) -> Iterator[range]:
        """The rows, some at a time."""
        step = max(1, _BLOCK_ELEMENTS // max(1, self.shape[1]))
        for first in range(0, self.shape[0], step):
            yield range(first, min(first + step, self.shape[0]))


class _DoraResidual:
    """tuned - the weight that a DoRA makes of the base, as a matrix."""

    def __init__(self, difference: Difference, left: Tensor, right: Tensor, magnitude: Tensor) -> None:
        self._difference = difference
        self._left, self._right = left.to(torch.float64), right.to(torch.float64)
        self._magnitude = magnitude.to(torch.float64)

    def square(self) -> float:
        total = 0.0
        for rows in self._difference.ranges():
            part = slice(rows.start, rows.stop)
            updated = self._difference.base.read(rows).to(torch.float64) + self._left[part] @ self._right
            norms = torch.linalg.vector_norm(updated, dim=1)
            gain = torch.where(norms > 0, self._magnitude[part] / norms.where(norms > 0, torch.ones_like(norms)), 1.0)
            made = updated * gain.unsqueeze(1)
            total += float((self._difference.tuned.read(rows).to(torch.float64) - made).square_().sum())
        return total


def run_extraction(plan: ExtractionPlan, new: NewAdapter, dtype: str, memory: int, progress: Progress) -> list[Outcome]:
    """Compute every module of `plan` and keep its tensors in `new`. memory: bytes of a difference that is held.

    Raises NonFinite for NaN and infinity in either model and for factors that `dtype` cannot hold, InputChanged.
    """
    files = FileSet([Expected(source.path, source.size, source.modified) for source in plan.inputs])
    progress.start("comparing", plan.data_bytes)
    outcomes = []
    with ExitStack() as opened:
        for number in range(len(plan.inputs)):
            opened.enter_context(files.using(number))
        for each in plan.differences:
            outcomes.append(_Extraction(plan, each, files, new, dtype, memory).run())
            progress.advance(each.nbytes)
        files.check_unchanged()
    progress.finish()
    return outcomes


class _Extraction:
    """One parameter of one module."""

    def __init__(
        self, plan: ExtractionPlan, each: DifferencePlan, files: FileSet, new: NewAdapter, dtype: str, memory: int
    ) -> None:
        self.plan, self.each, self.new = plan, each, new
        self.difference = Difference(each, files, memory)
        self.dtype = torch_dtype(ADAPTER_DTYPES[dtype])

    def run(self) -> Outcome:
        square = factors.squares(self.difference)
        if not math.isfinite(square):
            raise NonFinite(
                f"{self.each.module}: its {self.each.parameter} holds NaN or infinity in one of the two models",
                module=self.each.module,
            )
        if square == 0:
            return self._outcome("unchanged", 0.0, 0.0)
        if self.each.low_rank:
            return self._lora(square)
        if self.plan.request.rest and self.each.component != _VAE:
            return self._full(square)
        return self._outcome("left-out", square, square)

    def _outcome(self, kind: str, square: float, residual: float, rank: int | None = None) -> Outcome:
        each = self.each
        return Outcome(
            *(each.module, each.component, each.parameter, kind, each.shape, rank),
            *(math.sqrt(square), math.sqrt(residual)),
        )

    def _lora(self, square: float) -> Outcome:
        each, ranks = self.each, self.plan.request.ranks
        left, right = low_rank(self.difference, each.shape, ranks, each.module, square, DEFAULT_RANK)
        left, right = (factors.stored(half, self.dtype, each.module) for half in (left, right))
        rank = left.shape[1]
        kernel = each.shape[2:]
        suffixes = SUFFIXES[self.new.names]
        self.new.add(f"{each.module}.{suffixes['up']}", left.reshape(each.shape[0], rank, *(1 for _ in kernel)))
        self.new.add(f"{each.module}.{suffixes['down']}", right.reshape(rank, *each.shape[1:]))
        if "alpha" in suffixes:
            self.new.add(f"{each.module}.{suffixes['alpha']}", torch.tensor(float(rank)))
        if not self.plan.request.dora:
            return self._outcome("lora", square, factors.residual(self.difference, left, right), rank)
        magnitude = self._row_norms()
        self.new.add(f"{each.module}.{suffixes['magnitude']}", magnitude.reshape(self._magnitude_shape()))
        residual = _DoraResidual(self.difference, left, right, magnitude).square()
        return self._outcome("lora", square, residual, rank)

    def _row_norms(self) -> Tensor:
        """The length of each row of the tuned weight, in float32: 16 bits would change the weight more than a LoRA."""
        lengths = [
            torch.linalg.vector_norm(self.difference.tuned.read(rows).to(torch.float64), dim=1)
            for rows in self.difference.ranges()
        ]
        return torch.cat(lengths).to(torch.float32)

    def _magnitude_shape(self) -> tuple[int, ...]:
        ones = tuple(1 for _ in self.each.shape[2:])
        if self.new.names == "kohya":
            return (self.each.shape[0], 1, *ones)
        return (1, self.each.shape[0], *ones) if ones else (self.each.shape[0],)

    def _full(self, square: float) -> Outcome:
        """Store the difference itself, or, as PEFT does, the new value."""
        each = self.each
        if self.new.names == "peft":
            values = torch.cat([self.difference.tuned.read(rows) for rows in self.difference.ranges()])
            level = ".base_layer" if each.parameter == "bias" and self._has_lora() else ""
            stored = values.to(torch_dtype(each.tuned[0].stored.dtype))
            self.new.add(f"{each.module}{level}.{each.parameter}", stored.reshape(each.shape))
            return self._outcome("full", square, 0.0)
        dense = torch.cat([block.clone() for _, block in self.difference.blocks()])
        stored = factors.stored(dense, self.dtype, each.module)
        self.new.add(f"{each.module}.{SUFFIXES[self.new.names][self._full_name()]}", stored.reshape(each.shape))
        return self._outcome("full", square, float((dense.to(torch.float64) - stored).square().sum()))

    def _has_lora(self) -> bool:
        return any(other.module == self.each.module and other.low_rank for other in self.plan.differences)

    def _full_name(self) -> str:
        """Norms have names of their own, which web UIs look for."""
        weight = next(
            (o for o in self.plan.differences if o.module == self.each.module and o.parameter == "weight"), None
        )
        is_norm = weight is not None and len(weight.shape) == 1
        return {"weight": "norm" if is_norm else "diff", "bias": "norm_bias" if is_norm else "bias"}[
            self.each.parameter
        ]


def low_rank(
    matrix: Difference | factors.Dense,
    shape: tuple[int, ...],
    ranks: Ranks,
    module: str,
    square: float,
    default: int | None,
) -> tuple[Tensor, Tensor]:
    """Two factors of `matrix` with the rank that `ranks` gives it, in float64. shape: of the weight.

    square: |matrix|^2. default: the largest rank where `ranks` names none.
    """
    limit = min(ranks.limit(shape) or default or min(matrix.shape), *matrix.shape)
    spectrum = spectrum_of(matrix, limit, ranks.method, ranks.seed, module)
    count = kept(spectrum.values, ranks.rule, ranks.parameter, square, limit)
    left, right = spectrum.left[:, :count], spectrum.right[:count]
    return factors.clamped(left, right, ranks.clamp) if ranks.clamp is not None else (left, right)
