"""(IA)3 as PEFT trains it: each output or input channel of the weight is scaled (arXiv:2205.05638).

W * (1 + strength * (l - 1)), l = 1 leaves the weight alone; the bias is scaled with the output channels
"""

from __future__ import annotations

from torch import Tensor

from bake.adapters.ia3 import Scaling


class Transform(Scaling):
    """A weight, or the bias beside it, scaled by channel."""

    def __init__(
        self,
        ia3_l: Tensor,
        *,
        shape: tuple[int, ...],
        strength: float,
        feedforward: bool | None = None,
        transposed: bool = False,
    ) -> None:
        """Take one number for each channel.

        ia3_l: (out, 1) scales outputs, (1, in) inputs, which PEFT calls feed-forward; of a convolution (1, out, 1, 1)
        or (1, in, 1, 1). shape: (out, in, *kernel), or (out,) for the bias. strength: the user's weight.
        feedforward: what the configuration says; needed where shapes do not tell. transposed: the tensor is stored
        (in, out), and so is `shape` (fan_in_fan_out). Raises ValueError if `ia3_l` does not fit, if shapes do not tell
        which channels it means or tell another thing than `feedforward`, and for a bias that it does not touch.
        Source: PEFT tuners/ia3/layer.py.
        """
        told = _is_feedforward(tuple(ia3_l.shape), shape, transposed)
        if feedforward is None and told is None:
            raise ValueError(
                f"ia3_l {list(ia3_l.shape)} may scale inputs or outputs of a tensor of shape {list(shape)}"
            )
        if None not in (feedforward, told) and feedforward != told:
            raise ValueError(f"ia3_l {list(ia3_l.shape)} scales {'inputs' if told else 'outputs'}, not the others")
        feedforward = bool(feedforward or told)
        if feedforward and len(shape) == 1:
            raise ValueError("feed-forward (IA)3 scales inputs; the bias stays as it is")
        by_column = len(shape) > 1 and feedforward != transposed
        super().__init__(ia3_l, by_column, shape, offset=1.0 - strength, factor=strength)


def _is_feedforward(factor: tuple[int, ...], shape: tuple[int, ...], transposed: bool) -> bool | None:
    """Whether input channels are meant, by shape: of the factor, else of the weight; None if neither tells."""
    if len(factor) == 2 and factor != (1, 1):
        return factor[0] == 1
    if len(shape) == 1 or len(factor) < 2:
        return None
    out, ins = shape[1::-1] if transposed else shape[:2]
    return None if out == ins else factor[1] == ins
