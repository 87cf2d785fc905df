"""The maths of each algorithm: factors in, update out. One file per algorithm, one line here.

Keys are the names of the rows of `bake.keys.factors.ALGORITHMS` that have a shape; a contract test
holds the two tables together.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bake.adapters import full, lora

# name -> delta(factors..., scale): the update as a matrix, in the dtype of the factors
DELTAS: dict[str, Callable[..., Tensor]] = {"lora": lora.delta, "full": full.delta}

# name -> low_rank(factors..., scale): the same update as two matrices, left @ right. Updates given so
# are summed by concatenation: many LoRAs on one tensor cost one product.
LOW_RANK: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"lora": lora.low_rank}
