"""Which tensor an adapter that transforms the weight fits, told from the shapes of its factors.

Each rule takes {factor: shape} and returns (rows, columns) of the weight seen as a matrix, out by
in * kernel; None where the factors do not say. It raises ValueError where they contradict each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

Shape = tuple[int, ...]
Fit = tuple[int | None, int | None]


def oft_shape(shapes: Mapping[str, Shape]) -> Fit:
    """Of OFT on output rows, kohya's and LyCORIS's: oft_blocks (n, b, b), rescale (out, 1, ...)."""
    count, size = _squares("oft_blocks", shapes["oft_blocks"], 3)
    _one_for_each("rescale", shapes.get("rescale"), count * size)
    return count * size, None


def oft_diag_shape(shapes: Mapping[str, Shape]) -> Fit:
    """Of early LyCORIS OFT: oft_diag (n, b, b)."""
    count, size = _squares("oft_diag", shapes["oft_diag"], 3)
    return count * size, None


def boft_shape(shapes: Mapping[str, Shape]) -> Fit:
    """Of LyCORIS BOFT: oft_blocks (stages, n, b, b), rescale (out, 1, ...)."""
    blocks = shapes["oft_blocks"]
    count, size = _squares("oft_blocks", blocks, 4)
    if size % 2 or count % (1 << (blocks[0] - 1)):
        raise ValueError(f"{blocks[0]} stages cannot shuffle {count} blocks of {size} rows")
    _one_for_each("rescale", shapes.get("rescale"), count * size)
    return count * size, None


def oft_peft_shape(shapes: Mapping[str, Shape]) -> Fit:
    """Of OFT on input columns, PEFT's and OneTrainer's: oft_r (n, b(b-1)/2); one block may stand for many."""
    blocks = shapes["oft_r"]
    if len(blocks) != 2 or not blocks[0]:
        raise ValueError(f"oft_r {list(blocks)} is no list of blocks")
    count, numbers = blocks
    size = (1 + math.isqrt(1 + 8 * numbers)) // 2
    if size * (size - 1) // 2 != numbers:
        raise ValueError(f"oft_r {list(blocks)}: {numbers} numbers fill no triangle")
    return None, count * size if count > 1 else None


def boft_peft_shape(shapes: Mapping[str, Shape]) -> Fit:
    """Of PEFT BOFT: boft_r (stages, n, b, b), boft_s (out, 1), of a convolution (1, out)."""
    blocks, scales = shapes["boft_r"], shapes["boft_s"]
    count, size = _squares("boft_r", blocks, 4)
    if blocks[0] > 1 and (size % 2 or count % (1 << (blocks[0] - 1))):
        raise ValueError(f"{blocks[0]} stages cannot shuffle {count} blocks of {size} columns")
    rows = math.prod(scales)
    _one_for_each("boft_s", scales, rows)
    return rows, count * size


def hra_shape(shapes: Mapping[str, Shape]) -> Fit:
    """Of HRA: hra_u (in * kernel, reflections)."""
    vectors = shapes["hra_u"]
    if len(vectors) != 2:
        raise ValueError(f"hra_u {list(vectors)} is no list of vectors")
    return None, vectors[0]


class MagnitudeAxis(NamedTuple):
    """Which lengths a stored DoRA magnitude sets."""

    axis: int  # 0: of the rows of the stored weight (output), 1: of its input channels
    certain: bool  # False: the shapes allow the other axis too, and another program may have written it


def magnitude_axis(suffix: str, magnitude: Shape, weight: Shape, *, transposed: bool = False) -> MagnitudeAxis:
    """Return which axis of `weight` a DoRA magnitude belongs to.

    suffix: the end of the adapter key: "dora_scale" or "magnitude" (LyCORIS, OneTrainer: the shape says),
    or "lora_magnitude_vector[.weight]" (PEFT, diffusers) or "m" (MLX): always the output axis. weight: shape of the
    weight that was trained on, (out, in, *kernel). transposed: the weight is stored (in, out), as PEFT's
    embeddings and GPT-2's Conv1D; then PEFT's output axis is axis 1.
    Raises ValueError if the magnitude fits neither.
    """
    longest = math.prod(magnitude)
    if len(weight) < 2 or not magnitude or max(magnitude) != longest:
        raise ValueError(f"the magnitude {list(magnitude)} is no list of lengths for {list(weight)}")
    out, channels = weight[:2]
    if suffix.startswith("lora_magnitude_vector") or suffix == "m":
        if longest != (channels if transposed else out):
            raise ValueError(f"the magnitude {list(magnitude)} has no length for each output of {list(weight)}")
        # PEFT never writes (1, n) for a matrix: diffusers renames LyCORIS's magnitudes without a look at them.
        renamed = len(magnitude) == 2 and magnitude[0] == 1 and out == channels > 1
        return MagnitudeAxis(1 if transposed else 0, certain=not renamed)
    if magnitude[0] == out and longest == out:
        return MagnitudeAxis(0, certain=True)
    if len(magnitude) > 1 and magnitude[0] == 1 and magnitude[1] == longest:
        # (1, n, 1, 1) is also how PEFT writes the output axis of a convolution.
        of_peft = len(magnitude) > 2 and longest == out
        if longest == channels:
            return MagnitudeAxis(1, certain=not of_peft)
        if of_peft:
            return MagnitudeAxis(0, certain=True)
    raise ValueError(f"the magnitude {list(magnitude)} fits neither outputs nor inputs of {list(weight)}")


def _squares(name: str, blocks: Shape, dimensions: int) -> tuple[int, int]:
    """(number of blocks side by side, size of a block)."""
    if len(blocks) != dimensions or blocks[-1] != blocks[-2] or 0 in blocks:
        raise ValueError(f"{name} {list(blocks)} is no tensor of {dimensions} dimensions that ends in squares")
    return blocks[-3], blocks[-1]


def _one_for_each(name: str, shape: Shape | None, rows: int) -> None:
    """Raises ValueError unless the factor, where there is one, has one number for each row."""
    if shape is not None and (math.prod(shape) != rows or rows not in shape):
        raise ValueError(f"{name} {list(shape)} does not have one number for each of {rows} rows")
