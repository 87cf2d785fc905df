"""OFT of kohya and LyCORIS (diag-oft): blocks of output rows are rotated.

Q = B - B^T of each stored block, made smaller as a whole where it is too long
R = (I + Q)(I - Q)^-1,  R_s = s R + (1 - s) I
W'[block] = R_s^T W[block], times `rescale` in full (LyCORIS: at every strength but 0)

The bias of the layer stays as it is: the forward passes of both trainers rotate the weight and add the
stored bias. (Only LyCORIS's bypass mode, its way with quantised layers, turns the layer's output and so
the bias too; the file does not say so.) kohya's Flux network stores one such set of blocks for
each of q, k, v and mlp: every part is an OFT of its own on its own rows, with its own length to keep to.
"""

from __future__ import annotations

from torch import Tensor

from bake.adapters.rotations import RowRotation, cayley, skew, square_blocks

_TINY = 1e-8  # both trainers' guard against a length of zero


class Transform(RowRotation):
    """OFT on output rows. Source: arXiv:2306.07280; kohya networks/oft.py, LyCORIS modules/diag_oft.py."""

    def __init__(
        self,
        oft_blocks: Tensor,
        rescale: Tensor | None = None,
        *,
        shape: tuple[int, ...],
        strength: float,
        alpha: float | None = None,
        kohya: bool = False,
    ) -> None:
        """Prepare the rotations, in the dtype of `oft_blocks`.

        oft_blocks: (n, b, b), n * b = out. rescale: (out, 1[, 1, ...]). shape: of the weight tensor.
        strength: what the user typed; 0 leaves the weight as it is. alpha: the stored number; alpha * out
        is the longest Q may be, all blocks taken together, in the Frobenius norm. None: no such limit.
        kohya: written by kohya's network (module names start with "oft_unet"), to which alpha 0 means a
        length of 0; to LyCORIS it means no limit. Raises ValueError if the factors contradict each other.
        """
        square_blocks("oft_blocks", oft_blocks, 3)
        skewed = skew(oft_blocks)
        if alpha is not None:
            skewed = shortened(skewed, alpha * shape[0], kohya=kohya)
        super().__init__(cayley(skewed), rescale, shape=shape, strength=strength)


def shortened(skewed: Tensor, limit: float, *, kohya: bool) -> Tensor:
    """Return Q, scaled down to the length `limit` if it is longer; LyCORIS knows no limit of 0 or less.

    The two trainers put the guard against division by zero in different places.
    """
    length = float(skewed.norm())
    if kohya:
        return skewed * ((min(length, limit) + _TINY) / (length + _TINY))
    if limit <= 0 or length + _TINY <= limit:
        return skewed
    return skewed * (limit / (length + _TINY))
