"""A stored difference: of a weight (LyCORIS full, ComfyUI diff), of a bias, of a norm's scale."""

from __future__ import annotations

from torch import Tensor


def delta(diff: Tensor, *, scale: float) -> Tensor:
    """Return `scale * diff` as a matrix: (rows, everything else), a vector as one column.

    scale: the user's weight; a stored difference knows no alpha. In the dtype of `diff`.
    Source: LyCORIS modules/full.py and modules/norms.py, ComfyUI comfy/lora.py.
    """
    return diff.reshape(diff.shape[0] if diff.dim() else 1, -1) * scale
