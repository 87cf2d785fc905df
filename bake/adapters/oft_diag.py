"""OFT as early LyCORIS stored it: the blocks are the rotations themselves.

W'[block] = R_s^T W[block],  R_s = s R + (1 - s) I
"""

from __future__ import annotations

from torch import Tensor

from bake.adapters.rotations import RowRotation, square_blocks


class Transform(RowRotation):
    """OFT on output rows from stored rotations. Source: A1111 extensions-builtin/Lora/network_oft.py."""

    def __init__(self, oft_diag: Tensor, *, shape: tuple[int, ...], strength: float) -> None:
        """oft_diag: (n, b, b), n * b = out. shape: of the weight tensor. strength: what the user typed.

        Raises ValueError if the blocks do not make up the rows.
        """
        square_blocks("oft_diag", oft_diag, 3)
        super().__init__(oft_diag, shape=shape, strength=strength)
