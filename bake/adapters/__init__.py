"""The maths of each algorithm: factors in, update or new weight out. One file per algorithm, one line here.

Keys are the names of the rows of `bake.keys.factors.ALGORITHMS`; each is in exactly one of the four
tables, and a contract test holds them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from bake.adapters import (
    adalora,
    boft,
    boft_peft,
    full,
    glora,
    hra,
    ia3,
    ia3_peft,
    loha,
    lokr,
    lora,
    oft,
    oft_diag,
    oft_peft,
    replace,
    sparse_bias,
    vera,
)


class Update(Protocol):
    """An additive update, prepared for one tensor."""

    def add_to(self, block: Tensor, rows: range) -> None:
        """Add these contiguous rows of the update, seen as a matrix (out, in * kernel), to `block`, in place."""


class Transform(Protocol):
    """An algorithm that makes a new weight out of the old one, prepared for one tensor."""

    block: int  # rows are transformed in multiples of this many

    def apply(self, weight: Tensor, rows: range) -> None:
        """Overwrite these rows of the weight, seen as a matrix (out, in * kernel), with their new values."""


# low_rank(factors..., scale): the update as two matrices, left @ right. Updates given so are summed by
# concatenation: many LoRAs on one tensor cost one product.
LOW_RANK: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "lora": lora.low_rank,
    "adalora": adalora.low_rank,
    "vera": vera.low_rank,
}

# Update(factors..., scale, transposed).
DELTAS: dict[str, Callable[..., Update]] = {"loha": loha.Update, "lokr": lokr.Update, "sparse": sparse_bias.Update}

# updated(old, stored, scale): new rows from the old ones and the same rows of one stored tensor.
STORED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"full": full.updated, "set": replace.updated}

# Transform(factors..., shape, strength).
TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "glora": glora.Transform,
    "ia3": ia3.Transform,
    "ia3-peft": ia3_peft.Transform,
    "oft": oft.Transform,
    "oft-diag": oft_diag.Transform,
    "oft-peft": oft_peft.Transform,
    "boft": boft.Transform,
    "boft-peft": boft_peft.Transform,
    "hra": hra.Transform,
}
