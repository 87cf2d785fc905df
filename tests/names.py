"""Name lists: of the layouts written down in scripts/layouts.py, and of real checkpoints where there are any."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import layouts

Shapes = dict[str, tuple[int, ...]]

SMALL_CLIP = layouts.Clip(width=8, layers=2, vocabulary=16, positions=8)


def small(family: str) -> Shapes:
    """A whole checkpoint of a family in the original layout, at widths that give files of kilobytes."""
    if family == "sd1":
        return layouts.sd1(layouts.UNet(width=4, context=8), layouts.Clip(8, 12, 16, 8), 1, 4)
    if family == "sd2":
        return layouts.sd2(layouts.UNet(width=4, context=8, linear_projection=True), layouts.Clip(8, 24, 16, 8), 1, 4)
    if family == "sdxl":
        unet = layouts.UNet(4, (1, 2, 4), (0, 2, 10), 10, 16, True, 12)
        return layouts.sdxl(unet, layouts.Clip(8, 12, 16, 8), layouts.Clip(8, 32, 16, 8), 1)
    unet = layouts.UNet(4, (1, 2, 4, 4), (0, 4, 4, 0), 4, 8, True, 12)
    return layouts.sdxl_refiner(unet, layouts.Clip(8, 32, 16, 8), 1)


def read_content(path: Path) -> dict[str, Any]:
    """What a published checkpoint's list says: "about", and "tensors", name -> [dtype, shape]."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    content: dict[str, Any] = json.loads(text)
    return content


def read_list(path: Path) -> tuple[dict[str, Any], Shapes]:
    """(about, name -> shape) of a published checkpoint's list."""
    content = read_content(path)
    return content["about"], {name: tuple(shape) for name, (_, shape) in content["tensors"].items()}
