"""An adapter in the names of another dialect: the same factors, byte for byte where the dialects cut alike."""

from __future__ import annotations

import math

import torch

from bake.errors import NonFinite
from bake.execute.adapter_file import NewAdapter
from bake.execute.respelled import Factored, alpha_of, factored, said, suffix
from bake.factoring import factors
from bake.io.payload import torch_dtype
from bake.io.tensorfile import TensorFile
from bake.keys.spoken import Names
from bake.keys.written import Scaled
from bake.plan.adapter import ADAPTER_DTYPES, Outcome
from bake.plan.respelling import Respelled
from bake.progress import Progress


def run_conversion(
    plan: Respelled, file: TensorFile, source: str, new: NewAdapter, dtype: str, fold: bool, progress: Progress
) -> tuple[list[Outcome], dict[str, tuple[str, Scaled]]]:
    """Keep every module of `plan` in `new`; returns what became of them, and path -> (component, rank and alpha).

    source: the adapter's name. dtype: "keep" or a key of ADAPTER_DTYPES. fold: put alpha / rank into the factors.
    """
    progress.start("converting", len(plan.modules))
    outcomes: list[Outcome] = []
    scaled: dict[str, tuple[str, Scaled]] = {}
    for module in plan.modules:
        for each in factored(module, file, source):
            outcomes.append(_keep(each, plan.names, source, new, dtype, fold, scaled))
        progress.advance(1)
    progress.finish()
    return outcomes, scaled


def _keep(
    each: Factored,
    names: Names,
    source: str,
    new: NewAdapter,
    dtype: str,
    fold: bool,
    scaled: dict[str, tuple[str, Scaled]],
) -> Outcome:
    """Keep one update and say how far the stored factors are from the input's."""
    before = each
    if fold and each.algorithm == "lora":
        each = folded(each)
    tensors = said(each, names, source)
    if dtype != "keep":
        wanted = torch_dtype(ADAPTER_DTYPES[dtype])
        tensors = {
            # a magnitude in 16 bits would change the weight more than the LoRA does
            factor: values if factor == "magnitude" else factors.stored(values, wanted, each.module.name)
            for factor, values in tensors.items()
        }
    for factor, values in tensors.items():
        new.add(f"{each.module.name}.{suffix(factor, each, names)}", values)
    if each.rank is not None:
        if names == "kohya":
            like = next(iter(tensors.values())).dtype
            new.add(f"{each.module.name}.alpha", alpha_of(each.scale, each.rank, like))
        scaled[each.module.path] = each.module.component, Scaled(each.rank, each.scale * each.rank)
    return _outcome(before, each, tensors)


def folded(each: Factored) -> Factored:
    """The same update at scale 1. A power of two moves exactly, in halves to both factors."""
    root = math.sqrt(abs(each.scale))
    up = math.copysign(2.0 ** math.floor(math.log2(root)) if root else 0.0, each.scale)
    down = abs(each.scale / up) if up else 1.0
    dtype = each.tensors["up"].dtype
    scaled = {"up": each.tensors["up"].to(torch.float64) * up, "down": each.tensors["down"].to(torch.float64) * down}
    kept = {factor: factors.stored(values, dtype, each.module.name) for factor, values in scaled.items()}
    return Factored(
        *(each.module, each.parameter, each.algorithm, {**each.tensors, **kept}, each.rank, 1.0),
        *(each.embedding, each.spelling),
    )


def _outcome(before: Factored, after: Factored, tensors: dict[str, torch.Tensor]) -> Outcome:
    where = (after.module.name, after.module.component, after.parameter)
    if before.algorithm != "lora":
        shape = tuple(next(iter(tensors.values())).shape)
        norm = math.sqrt(sum(float(values.to(torch.float64).square().sum()) for values in tensors.values()))
        return Outcome(*where, "kept", shape, after.rank, norm, 0.0)
    left, right = before.pair()
    true = factors.Product(left * before.scale, right)
    up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
    if "mid" in tensors:
        down = Factored(after.module, "weight", "lora", tensors, after.rank, 1.0).pair()[1]
    square = factors.squares(true)
    if not math.isfinite(square):
        raise NonFinite(f"{before.module.name}: its factors hold NaN or infinity", module=before.module.name)
    residual = factors.residual(true, up.to(torch.float64) * after.scale, down)
    shape = (before.tensors["up"].shape[0], *before.columns)
    return Outcome(*where, "lora", shape, after.rank, math.sqrt(square), math.sqrt(residual))
