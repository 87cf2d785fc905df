"""How large an adapter's updates are, module by module: the one part of inspecting that reads weights."""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from bake.adapters import DELTAS, LOW_RANK
from bake.adapters import Update as Delta
from bake.identify.adapter import Adapter
from bake.identify.parts import block_of, component_of, in_order
from bake.identify.updates import Update
from bake.io.payload import read_tensor
from bake.io.tensorfile import TensorFile

_ROWS = 64  # of an update that is made row by row
_PIECE = 1024 * 1024  # elements of a stored difference held at a time


def measure_norms(adapter: Adapter) -> dict[str, Any]:
    """The Frobenius norm of every module's update at weight 1, as plain JSON data.

    Keys: modules {name: norm}, components {name: {norm, modules, blocks {name: norm}}}; the norm of a
    block or component is that of all its updates together. unmeasured: [{module, reason}], modules
    that are in none of the sums. Computed in float64; no update is ever formed whole, memory is the
    factors of one module and some rows.
    """
    modules: dict[str, float] = {}
    unmeasured: list[dict[str, str]] = []
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with closing(adapter.source.file) as file:
        for module in adapter.modules:
            squares = [_squared_norm(update, file) for update in module.updates]
            known = [value for value in squares if value is not None]
            if len(known) < len(squares) or not squares:
                reason = "its algorithm changes the weight itself, or bake does not fuse it"
                unmeasured.append({"module": module.name, "reason": reason})
            elif not math.isfinite(sum(known)):
                unmeasured.append({"module": module.name, "reason": "its factors hold NaN or infinity"})
            else:
                modules[module.name] = math.sqrt(sum(known))
                sums[component_of(module, adapter)][block_of(module)].append(sum(known))
    return {
        "modules": modules,
        "components": {
            name: {
                "norm": math.sqrt(math.fsum(value for values in blocks.values() for value in values)),
                "modules": sum(map(len, blocks.values())),
                "blocks": {block: math.sqrt(math.fsum(blocks[block])) for block in sorted(blocks, key=in_order)},
            }
            for name, blocks in sorted(sums.items(), key=lambda item: in_order(item[0]))
        },
        "unmeasured": unmeasured,
    }


def _squared_norm(update: Update, file: TensorFile) -> float | None:
    """|update|^2 at weight 1; None where the update depends on the weight it changes."""
    if "magnitude" in update.factors:
        return None
    if set(update.factors) == {"diff"}:
        return _squared_norm_of_stored(file, update.factors["diff"]) * update.scale**2
    if update.algorithm in LOW_RANK:
        factors = {name: _load(file, tensor) for name, tensor in update.factors.items()}
        left, right = LOW_RANK[update.algorithm](**factors, scale=update.scale, **update.settings)
        # |L R|^2 = trace((L^T L) (R R^T)): two small squares of the rank's size instead of the product
        square = float(((left.T @ left) * (right @ right.T)).sum())
        return 0.0 if square < 0 else square  # rounding around zero; NaN stays
    height, width = update.extent
    if update.algorithm in DELTAS and height is not None and width is not None:
        factors = {name: _load(file, tensor) for name, tensor in update.factors.items()}
        pieces = (range(first, min(first + _ROWS, height)) for first in range(0, height, _ROWS))
        delta = DELTAS[update.algorithm](**factors, scale=update.scale, **update.settings)
        return sum(_squared_norm_of_rows(delta, rows, width) for rows in pieces)
    return None


def _squared_norm_of_rows(delta: Delta, rows: range, width: int) -> float:
    values = torch.zeros((len(rows), width), dtype=torch.float64)
    delta.add_to(values, rows)
    return float(values.square_().sum())


def _load(file: TensorFile, name: str) -> Tensor:
    info = file.tensors[name]
    return read_tensor(file, info.begin, info.dtype, info.shape, torch.float64)


def _squared_norm_of_stored(file: TensorFile, name: str) -> float:
    info, total = file.tensors[name], 0.0
    count = math.prod(info.shape)
    for first in range(0, count, _PIECE):
        begin = info.begin + first * (info.nbytes // count)
        piece = read_tensor(file, begin, info.dtype, (min(_PIECE, count - first),), torch.float64)
        total += float(piece.square().sum())
    return total
