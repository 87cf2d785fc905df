"""BOFT of LyCORIS: output rows are rotated in blocks, several times, shuffled further apart each time.

Q = B - B^T, shortened and turned into R_s as in OFT; `rescale` in full at every strength but 0
Stage i: within every 2^i b rows, put row j of one half beside row j of the other half; W[block] = R_s W[block]
(here R itself, not its transpose); put the rows back.

The bias stays as it is, as in OFT.
"""

from __future__ import annotations

from torch import Tensor

from bake.adapters.oft import shortened
from bake.adapters.rotations import blocks_of, cayley, multiply_rows, skew, square_blocks, towards


class Transform:
    """BOFT on output rows. Source: arXiv:2311.06243; LyCORIS modules/boft.py, functional/boft.py."""

    def __init__(
        self,
        oft_blocks: Tensor,
        rescale: Tensor | None = None,
        *,
        shape: tuple[int, ...],
        strength: float,
        alpha: float | None = None,
    ) -> None:
        """Prepare the rotations, in the dtype of `oft_blocks`.

        oft_blocks: (stages, n, b, b), n * b = out, b even. rescale: (out, 1[, 1, ...]). shape: of the
        weight tensor. strength: what the user typed. alpha: alpha * out is the longest Q may be over all
        stages; 0 or None: no limit. Raises ValueError if the factors contradict each other.
        """
        count, size = square_blocks("oft_blocks", oft_blocks, 4)
        widest = size << (len(oft_blocks) - 1)
        if count * size != shape[0]:
            raise ValueError(f"{count} blocks of {size} rows do not make up the {shape[0]} rows of the weight")
        if size % 2 or shape[0] % widest:
            raise ValueError(f"{len(oft_blocks)} stages of blocks of {size} rows cannot shuffle {shape[0]} rows")
        if rescale is not None and rescale.numel() != shape[0]:
            raise ValueError(f"rescale {list(rescale.shape)} does not have one number for each of {shape[0]} rows")
        self.block = widest
        skewed = shortened(skew(oft_blocks), (alpha or 0) * shape[0], kohya=False)
        self._strength = strength
        self._stages = towards(cayley(skewed), strength)
        self._rescale = None if rescale is None else rescale.reshape(-1, 1)

    def apply(self, weight: Tensor, rows: range) -> None:
        """Overwrite the rows `rows` of the weight, (len(rows), in * kernel), with their new values.

        Raises ValueError if the rows are no whole groups of `block`.
        """
        size = self._stages.shape[-1]
        blocks_of(rows, size << (len(self._stages) - 1))
        if self._strength == 0:
            return
        new = weight
        for stage, blocks in enumerate(self._stages[:, blocks_of(rows, size)]):
            half = size // 2 << stage
            mixed = new.reshape(-1, 2, half, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            mixed = multiply_rows(blocks, mixed)
            new = mixed.reshape(-1, half, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        weight.copy_(new)
        if self._rescale is not None:
            weight.mul_(self._rescale[rows.start : rows.stop])
