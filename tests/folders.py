"""Original checkpoints as diffusers folders: names and shapes written down from diffusers' converter."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from support import Arrays, save

from bake.keys.unet import translate

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_CLIP_L = ("conditioner.embedders.0.transformer.", "cond_stage_model.transformer.")
_CLIP_G = "conditioner.embedders.1.model."
_VAE = (
    (r"encoder\.down\.(\d+)\.block\.(\d+)", r"encoder.down_blocks.\1.resnets.\2"),
    (r"encoder\.down\.(\d+)\.downsample", r"encoder.down_blocks.\1.downsamplers.0"),
    (r"decoder\.up\.(\d+)\.block\.(\d+)", lambda m: f"decoder.up_blocks.{3 - int(m[1])}.resnets.{m[2]}"),
    (r"decoder\.up\.(\d+)\.upsample", lambda m: f"decoder.up_blocks.{3 - int(m[1])}.upsamplers.0"),
    (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
    (r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
    (r"mid\.attn_1\.proj_out", "mid_block.attentions.0.to_out.0"),
    (r"nin_shortcut", "conv_shortcut"),
    (r"norm_out", "conv_norm_out"),
)
_RESBLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}


def components(arrays: Arrays) -> dict[str, Arrays]:
    """folder -> tensors as diffusers has them. What belongs to no component is left out."""
    return {
        "unet": _unet({name.removeprefix(UNET): a for name, a in arrays.items() if name.startswith(UNET)}),
        "vae": _vae({name.removeprefix(VAE): a for name, a in arrays.items() if name.startswith(VAE)}),
        "text_encoder": {
            name.removeprefix(prefix): a for prefix in _CLIP_L for name, a in arrays.items() if name.startswith(prefix)
        },
        "text_encoder_2": _clip({n.removeprefix(_CLIP_G): a for n, a in arrays.items() if n.startswith(_CLIP_G)}),
    }


def save_folder(folder: Path, arrays: Arrays) -> Path:
    """The diffusers folder of an original checkpoint."""
    for name, tensors in components(arrays).items():
        if tensors:
            stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
            save(folder / name / f"{stem}.safetensors", tensors, {"format": "pt"})
    (folder / "model_index.json").write_text("{}")
    return folder


def _unet(arrays: Arrays) -> Arrays:
    names = translate({name.rpartition(".")[0] for name in arrays})
    return {f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": array for n, array in arrays.items()}


def _vae(arrays: Arrays) -> Arrays:
    found = {}
    for name, array in arrays.items():
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) is not None
        for pattern, other in _VAE:
            name = re.sub(pattern, other, name)
        found[name] = array[:, :, 0, 0] if is_projection else array
    return found


def _clip(arrays: Arrays) -> Arrays:
    found: Arrays = {}
    for name, array in arrays.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if name == "text_projection":
            found["text_projection.weight"] = np.ascontiguousarray(array.T)
        elif name == "positional_embedding":
            found["text_model.embeddings.position_embedding.weight"] = array
        elif name == "token_embedding.weight":
            found["text_model.embeddings.token_embedding.weight"] = array
        elif name.startswith("ln_final"):
            found[name.replace("ln_final", "text_model.final_layer_norm")] = array
        elif block is not None and block[2] == "attn.in_proj":
            for letter, part in zip("qkv", np.split(array, 3), strict=True):
                found[f"text_model.encoder.layers.{block[1]}.self_attn.{letter}_proj.{block[3]}"] = part
        elif block is not None:
            found[f"text_model.encoder.layers.{block[1]}.{_RESBLOCK[block[2]]}.{block[3]}"] = array
    return found
