"""Stored values in the place of the old ones: ComfyUI set_weight, PEFT modules_to_save, biases, token rows.

They were trained as they are, not as a difference. ComfyUI ignores the strength for them, PEFT the scale:
at any weight other than 0 the stored values count.
"""

from __future__ import annotations

from torch import Tensor


def updated(old: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return `value`, for any rows of the tensor; `old` at weight 0.

    Source: ComfyUI comfy/lora.py ("set"), PEFT utils/other.py ModulesToSaveWrapper.
    """
    return value if scale != 0 else old
