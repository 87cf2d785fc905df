"""Write the small checkpoint and the two LoRAs under fixtures/sd1, or check that they are up to date.

    python scripts/make_fixtures.py [--check]

The base has every tensor name of Stable Diffusion 1.5 at a width of 4 instead of 320, with random
weights; nothing was trained and nothing was downloaded. One LoRA speaks kohya's dialect (UNet and
text encoder, fp16, alpha), the other that of diffusers (UNet attention, fp32, no alpha). Equal
seeds give equal bytes on every machine.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from layouts import Clip, Shapes, UNet, sd1, stored_dtype
from numpy.typing import NDArray

from bake.io.header import build_header, lay_out
from bake.keys import unet

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "sd1"
UNET = UNet(width=4, context=8)
CLIP = Clip(width=8, vocabulary=32, positions=16)
VAE_WIDTH, STEPS = 1, 10
_NUMPY = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "I32": np.int32}
_UNET_PREFIX, _CLIP_PREFIX = "model.diffusion_model.", "cond_stage_model.transformer."

Arrays = dict[str, "NDArray[np.generic]"]


def random(name: str, shape: tuple[int, ...], spread: float) -> NDArray[np.float64]:
    """Normal values that depend on the name alone, not on the order in which tensors are made."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * spread


def make_base() -> Arrays:
    """The checkpoint."""
    arrays: Arrays = {}
    for name, shape in sd1(UNET, CLIP, VAE_WIDTH, STEPS).items():
        dtype = stored_dtype(name)
        if dtype == "F16":
            arrays[name] = random(name, shape, 0.02).astype(np.float16)
        else:
            arrays[name] = np.arange(math.prod(shape)).reshape(shape).astype(_NUMPY[dtype])
    return arrays


def make_kohya(shapes: Shapes) -> Arrays:
    """A LoRA as kohya sd-scripts writes it: every Linear and 1x1 convolution of the attention blocks."""
    arrays: Arrays = {}
    for module, shape in attention_modules(shapes).items():
        flat = module.replace(".", "_")
        rank, trailing = 2, (1,) * (len(shape) - 2)
        arrays[f"{flat}.alpha"] = np.ones((), np.float16)
        arrays[f"{flat}.lora_down.weight"] = random(flat + "down", (rank, *shape[1:]), 0.1).astype(np.float16)
        arrays[f"{flat}.lora_up.weight"] = random(flat + "up", (shape[0], rank, *trailing), 0.1).astype(np.float16)
    return arrays


def make_diffusers(shapes: Shapes) -> Arrays:
    """A LoRA as diffusers 0.18 to 0.25 wrote it: the attention projections of the UNet."""
    arrays: Arrays = {}
    for module, shape in attention_modules(shapes).items():
        path = module.removeprefix("lora_unet_")
        if path == module or ".attn" not in path:
            continue
        name = "unet." + path
        arrays[f"{name}.lora.down.weight"] = random(name + "down", (1, shape[1]), 0.1).astype(np.float32)
        arrays[f"{name}.lora.up.weight"] = random(name + "up", (shape[0], 1), 0.1).astype(np.float32)
    return arrays


def attention_modules(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """kohya prefix + dotted path -> shape, for what kohya trains by default."""
    ldm = {
        name.removeprefix(_UNET_PREFIX).removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.startswith(_UNET_PREFIX) and name.endswith(".weight")
    }
    names = unet.translate(ldm)
    found = {
        "lora_unet_" + names[module]: shape
        for module, shape in ldm.items()
        if "attentions" in names[module] and len(shape) > 1
    }
    for name, shape in shapes.items():
        path = name.removeprefix(_CLIP_PREFIX).removesuffix(".weight")
        if path != name and len(shape) == 2 and (".self_attn." in path or ".mlp." in path) and "bias" not in path:
            found["lora_te_" + path] = shape
    return found


def serialise(arrays: Arrays, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file."""
    tags = {np.dtype(kind): tag for tag, kind in _NUMPY.items()}
    placed = lay_out((name, tags[array.dtype], array.shape) for name, array in arrays.items())
    return build_header(placed, metadata) + b"".join(arrays[name].tobytes() for name in placed)


def make_all() -> dict[str, bytes]:
    """Path below fixtures/sd1 -> content."""
    shapes = sd1(UNET, CLIP, VAE_WIDTH, STEPS)
    kohya = {"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora", "ss_network_dim": "2"}
    return {
        "base.safetensors": serialise(make_base(), {"format": "pt"}),
        "loras/watercolour.safetensors": serialise(
            make_kohya(shapes), {**kohya, "ss_network_alpha": "1.0", "ss_output_name": "watercolour"}
        ),
        "loras/fine_lines.safetensors": serialise(
            make_diffusers(shapes), {"format": "pt", "ss_output_name": "fine lines"}
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if a file is stale")
    check = parser.parse_args().check
    for relative, content in make_all().items():
        path = FOLDER / relative
        if check:
            if not path.is_file() or path.read_bytes() != content:
                sys.exit(f"{path} is stale: run python scripts/make_fixtures.py")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print(f"{path.relative_to(FOLDER.parent.parent)}: {len(content)} bytes")


if __name__ == "__main__":
    main()
