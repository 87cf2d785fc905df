"""A stored difference: of a weight (LyCORIS full, ComfyUI diff), of a bias, of a norm's scale."""

from __future__ import annotations

from torch import Tensor


def updated(old: Tensor, diff: Tensor, scale: float) -> Tensor:
    """Return `old + scale * diff`, for any rows of the two as matrices.

    scale: the user's weight; a stored difference knows no alpha. In the dtype of `old`.
    Source: LyCORIS modules/full.py and modules/norms.py, ComfyUI comfy/lora.py.
    """
    return old + scale * diff
