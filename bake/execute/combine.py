"""The updates of several adapters as one, module by module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.errors import NonFinite, ShapeMismatch, Unsupported
from bake.execute.adapter_file import NewAdapter
from bake.execute.extract import low_rank
from bake.execute.respelled import Factored, alpha_of, factored, said, suffix
from bake.factoring import factors, sums
from bake.factoring.ranks import kept
from bake.factoring.spectrum import of_product
from bake.io.payload import torch_dtype
from bake.io.tensorfile import TensorFile
from bake.keys.written import SUFFIXES, Scaled
from bake.plan.adapter import ADAPTER_DTYPES, Outcome
from bake.plan.combining import EXACT, CombinePlan
from bake.progress import Progress


@dataclass(frozen=True)
class _Weighted:
    """An update and what the user wants of it."""

    each: Factored
    weight: float
    adapter: int

    @property
    def factor(self) -> float:
        """What the product of the factors counts times."""
        return self.each.scale * self.weight


def run_combination(
    plan: CombinePlan,
    files: Sequence[TensorFile],
    sources: Sequence[str],
    new: NewAdapter,
    dtype: str,
    progress: Progress,
) -> tuple[list[Outcome], dict[str, tuple[str, Scaled]]]:
    """Keep every module in `new`; returns what became of them, and path -> (component, rank and alpha).

    files, sources: of the adapters and their names. dtype: of the factors, "keep" (the widest of a module's) or a key
    of ADAPTER_DTYPES. Raises Unsupported for what cannot be added, ShapeMismatch, NonFinite.
    """
    progress.start("combining", len(plan.together))
    outcomes: list[Outcome] = []
    scaled: dict[str, tuple[str, Scaled]] = {}
    for found in plan.together.values():
        parts = [
            _Weighted(each, plan.weights[place], place)
            for place, module in found
            for each in factored(module, files[place], sources[place])
        ]
        for parameter in dict.fromkeys(part.each.parameter for part in parts):
            same = [part for part in parts if part.each.parameter == parameter]
            outcomes.append(_combine(plan, same, sources, new, dtype, scaled))
        progress.advance(1)
    progress.finish()
    return outcomes, scaled


def _combine(
    plan: CombinePlan,
    parts: list[_Weighted],
    sources: Sequence[str],
    new: NewAdapter,
    dtype: str,
    scaled: dict[str, tuple[str, Scaled]],
) -> Outcome:
    first = parts[0].each
    for part in parts:
        if part.each.algorithm not in ("lora", "full") or part.each.algorithm != first.algorithm or part.each.embedding:
            raise Unsupported(
                f"{sources[part.adapter]}: {part.each.module.name!r} is {part.each.algorithm}, and only LoRAs with "
                f"LoRAs and stored differences with stored differences are combined. Fuse the adapters into their base "
                f"with 'bake fuse' and take the result out again with 'bake extract'.",
                module=part.each.module.name,
            )
    wanted = _widest(parts) if dtype == "keep" else torch_dtype(ADAPTER_DTYPES[dtype])
    if first.algorithm == "full":
        return _add_stored(parts, sources, new, wanted)
    shapes = {(part.each.shape, part.each.columns) for part in parts}
    if len({shape for shape, _ in shapes}) > 1:
        listed = " and ".join(f"{rows} x {columns}" for (rows, columns), _ in sorted(shapes))
        raise ShapeMismatch(f"{first.module.name}: {listed} in the adapters", module=first.module.name)
    if plan.combination.method == EXACT:
        left, right, scale = _side_by_side(parts, wanted, "alpha" in SUFFIXES[plan.names])
        true: factors.Product | factors.Dense = _product(parts)
    else:
        true, left, right = _one_update(plan, parts, sources)
        scale = 1.0
        left, right = (factors.stored(half, wanted, first.module.name) for half in (left, right))
    square = factors.squares(true)
    if not math.isfinite(square):
        raise NonFinite(f"{first.module.name}: its factors hold NaN or infinity", module=first.module.name)
    rank = left.shape[1]
    has_alpha = "alpha" in SUFFIXES[plan.names]
    alpha = alpha_of(scale, rank, wanted) if has_alpha else torch.tensor(scale * rank, dtype=torch.float64)
    residual = factors.residual(true, left.to(torch.float64) * (float(alpha) / max(1, rank)), right)
    shape = (left.shape[0], *first.columns)
    if rank:
        kernel = tuple(1 for _ in first.kernel)
        made = Factored(first.module, "weight", "lora", {}, rank, scale)
        new.add(f"{first.module.name}.{suffix('up', made, plan.names)}", left.reshape(shape[0], rank, *kernel))
        new.add(f"{first.module.name}.{suffix('down', made, plan.names)}", right.reshape(rank, *first.columns))
        if has_alpha:
            new.add(f"{first.module.name}.alpha", alpha)
        scaled[first.module.path] = first.module.component, Scaled(rank, scale * rank)
    where = (first.module.name, first.module.component, "weight")
    return Outcome(*where, "lora" if rank else "unchanged", shape, rank, math.sqrt(square), math.sqrt(residual))


def _widest(parts: Sequence[_Weighted]) -> torch.dtype:
    """The dtype that holds the factors of all parts."""
    found = next(iter(parts[0].each.tensors.values())).dtype
    for part in parts:
        for values in part.each.tensors.values():
            found = torch.promote_types(found, values.dtype)
    return found


def _product(parts: Sequence[_Weighted]) -> factors.Product:
    """The weighted sum of the updates, as one product over concatenated factors."""
    pairs = [(part.factor, *part.each.pair()) for part in parts]
    return factors.Product(
        torch.cat([left * factor for factor, left, _ in pairs], dim=1), torch.cat([right for _, _, right in pairs])
    )


def _side_by_side(parts: Sequence[_Weighted], dtype: torch.dtype, has_alpha: bool) -> tuple[Tensor, Tensor, float]:
    """(left, right, scale) with the ranks of all parts next to each other.

    What the first counts times becomes the scale, where the dialect can say it, and the others are brought to that:
    powers of two exactly, else by the root on both sides, so that 16-bit factors stay in their range.
    """
    common = (abs(parts[0].factor) if has_alpha else 1.0) or 1.0
    lefts, rights = [], []
    for part in parts:
        ratio = part.factor / common
        up, down = _halves(abs(ratio))
        left, right = part.each.pair()
        lefts.append(left * math.copysign(up, ratio))
        rights.append(right * down)
    name = parts[0].each.module.name
    return (
        factors.stored(torch.cat(lefts, dim=1), dtype, name),
        factors.stored(torch.cat(rights), dtype, name),
        common,
    )


def _halves(ratio: float) -> tuple[float, float]:
    """Two numbers of about equal size whose product is `ratio`; powers of two for a power of two."""
    fraction, exponent = math.frexp(ratio)
    if fraction == 0.5:
        return 2.0 ** ((exponent - 1) // 2), 2.0 ** (exponent - 1 - (exponent - 1) // 2)
    return math.sqrt(ratio), math.sqrt(ratio)


def _one_update(
    plan: CombinePlan, parts: Sequence[_Weighted], sources: Sequence[str]
) -> tuple[factors.Product | factors.Dense, Tensor, Tensor]:
    """(what is expressed, left, right) by a method that makes one update of all and factors it."""
    ranks, first = plan.ranks, parts[0].each
    shape = (first.shape[0], *first.columns)
    highest = max(part.each.rank or 1 for part in parts)
    if plan.combination.method in ("svd", "linear"):
        true = _product(parts)
        spectrum = of_product(true.left, true.right)
        limit = min(ranks.limit(shape) or highest, len(spectrum.values))
        count = kept(spectrum.values, ranks.rule, ranks.parameter, factors.squares(true), limit)
        left, right = spectrum.left[:, :count], spectrum.right[:count]
        return true, *(factors.clamped(left, right, ranks.clamp) if ranks.clamp is not None else (left, right))
    updates = []
    for part in parts:
        left, right = part.each.pair()
        updates.append(((left * part.each.scale) @ right).to(torch.float32))
    names = [f"{part.adapter}\0{part.each.module.name}" for part in parts]
    assert plan.combination.density is not None
    dense = factors.Dense(
        sums.combined(
            *(plan.combination.method, updates, [part.weight for part in parts]),
            *(plan.combination.density, plan.combination.seed, names),
        )
    )
    square = factors.squares(dense)
    return dense, *low_rank(dense, shape, ranks, first.module.name, square, highest)


def _add_stored(parts: Sequence[_Weighted], sources: Sequence[str], new: NewAdapter, dtype: torch.dtype) -> Outcome:
    """Stored differences are added, whatever the method."""
    first = parts[0].each
    values = [part.each.tensors["diff"].to(torch.float64) for part in parts]
    if len({each.shape for each in values}) > 1:
        raise ShapeMismatch(f"{first.module.name}: stored differences of several shapes", module=first.module.name)
    exact = sum((each * part.factor for each, part in zip(values, parts, strict=True)), torch.zeros_like(values[0]))
    stored = factors.stored(exact, dtype, first.module.name)
    made = Factored(first.module, first.parameter, "full", {"diff": stored}, None, 1.0, False, first.spelling)
    for factor, tensor in said(made, new.names, sources[parts[0].adapter]).items():
        new.add(f"{first.module.name}.{suffix(factor, made, new.names)}", tensor)
    norm, residual = float(exact.square().sum()), float((stored.to(torch.float64) - exact).square().sum())
    where = (first.module.name, first.module.component, first.parameter)
    return Outcome(*where, "full", tuple(exact.shape), None, math.sqrt(norm), math.sqrt(residual))
