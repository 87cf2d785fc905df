"""The LoRAs of an adapter at other ranks; everything else in the file is copied as it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bake.errors import NonFinite
from bake.execute.adapter_file import NewAdapter
from bake.execute.respelled import alpha_of
from bake.factoring import factors
from bake.factoring.ranks import kept
from bake.factoring.spectrum import of_product
from bake.io.payload import read_tensor, torch_dtype
from bake.io.tensorfile import TensorFile, read_tensor_bytes
from bake.keys.written import Scaled
from bake.plan.adapter import ADAPTER_DTYPES, Outcome, Ranks
from bake.plan.resizing import Resizable, ResizePlan
from bake.progress import Progress


def run_resizing(
    plan: ResizePlan, file: TensorFile, new: NewAdapter, dtype: str, progress: Progress
) -> tuple[list[Outcome], dict[str, Scaled]]:
    """Keep the whole adapter in `new`; returns what became of its LoRAs, and path -> rank and alpha of each.

    dtype: of the new factors, "keep" or a key of ADAPTER_DTYPES. Raises NonFinite for factors that hold NaN or
    infinity, or are too large for `dtype`.
    """
    progress.start("resizing", len(plan.modules))
    outcomes: list[Outcome] = []
    scaled: dict[str, Scaled] = {}
    replaced: set[str] = set()
    for module in plan.modules:
        outcome = _resize(module, file, new, plan.ranks, dtype)
        replaced.update(module.tensors if outcome.kind == "lora" else ())
        outcomes.append(outcome)
        scaled[module.path] = Scaled(outcome.rank or 0, module.scale * (outcome.rank or 0))
        progress.advance(1)
    for name, info in file.tensors.items():
        if name not in replaced:
            new.add_bytes(name, info.dtype, info.shape, read_tensor_bytes(file, name))
    progress.finish()
    return outcomes, scaled


def _resize(module: Resizable, file: TensorFile, new: NewAdapter, ranks: Ranks, dtype: str) -> Outcome:
    """Keep the new factors of one module, unless they are the old ones."""
    up, down, mid = (_load(file, name) for name in (module.up, module.down, module.mid))
    assert up is not None
    assert down is not None
    left, right = up.flatten(1).to(torch.float64), _flat(down, mid)
    shape = (up.shape[0], *module.columns)
    product = factors.Product(left, right)
    square = factors.squares(product)
    if not math.isfinite(square):
        raise NonFinite(f"{module.name}: its factors hold NaN or infinity", module=module.name)
    norm = math.sqrt(square) * abs(module.scale)
    spectrum = of_product(left, right)
    rank = up.shape[1]
    limit = min(ranks.limit(shape) or rank, rank)
    # A rank of 0 would be no LoRA at all: one that changes nothing keeps a rank of 1.
    count = max(1, kept(spectrum.values, ranks.rule, ranks.parameter, square, limit)) if rank else 0
    if count == rank and ranks.clamp is None and dtype == "keep":  # nothing left out, cut off or rounded
        return Outcome(module.name, module.component, "weight", "kept", shape, rank, norm, 0.0)
    left, right = spectrum.left[:, :count], spectrum.right[:count]
    if ranks.clamp is not None:
        left, right = factors.clamped(left, right, ranks.clamp)
    wanted = up.dtype if dtype == "keep" else torch_dtype(ADAPTER_DTYPES[dtype])
    left, right = (factors.stored(half, wanted, module.name) for half in (left, right))
    new.add(module.up, left.reshape(up.shape[0], count, *up.shape[2:]))
    new.add(module.down, right.reshape(count, *module.columns))
    gain = 1.0  # what the rounding of alpha itself adds
    if module.alpha is not None:
        alpha = alpha_of(module.scale, count, wanted)
        new.add(module.alpha, alpha.reshape(file.tensors[module.alpha].shape))
        gain = float(alpha) / count / module.scale if module.scale else 1.0
    residual = math.sqrt(factors.residual(product, left.to(torch.float64) * gain, right)) * abs(module.scale)
    return Outcome(module.name, module.component, "weight", "lora", shape, count, norm, residual)


def _load(file: TensorFile, name: str | None) -> Tensor | None:
    if name is None:
        return None
    info = file.tensors[name]
    return read_tensor(file, info.begin, info.dtype, info.shape, torch_dtype(info.dtype))


def _flat(down: Tensor, mid: Tensor | None) -> Tensor:
    """The right factor as a matrix, in float64; mid: a Tucker core."""
    if mid is None:
        return down.flatten(1).to(torch.float64)
    core, thin = mid.flatten(2).to(torch.float64), down.flatten(1).to(torch.float64)
    return torch.einsum("abk,bi->aik", core, thin).flatten(1)
