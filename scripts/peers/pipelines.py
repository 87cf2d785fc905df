"""The diffusers folder of a job's checkpoint, made offline: configurations by hand, tensors by diffusers' converter."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

_CLIP_L = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"hidden_act": "quick_gelu", "projection_dim": 768, "architectures": ["CLIPTextModel"]},
}
_CLIP_G = {
    **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    **{"hidden_act": "gelu", "projection_dim": 1280, "architectures": ["CLIPTextModelWithProjection"]},
}
_VAE = {
    **{"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4},
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_SD1_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
_SDXL_UNET = {
    **{"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20)},
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    **{"transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True},
    **{
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_ENCODERS = {
    "sd15": {"text_encoder": ("CLIPTextModel", _CLIP_L)},
    "sdxl": {
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
    },
}
_PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
_ABSENT = {
    "sd15": ("tokenizer", "safety_checker", "feature_extractor"),
    "sdxl": ("tokenizer", "tokenizer_2", "feature_extractor", "image_encoder"),
}
MODELS = tuple(_PIPELINES)


def write_folder(model: str, checkpoint: str, folder: Path) -> Path:
    """The checkpoint as a diffusers folder of fp16 safetensors below `folder`; return its path."""
    torch = import_module("torch")
    diffusers = import_module("diffusers")
    configs, done = folder / "configs", folder / "base"
    _write_configs(model, configs)
    pipeline = getattr(diffusers, _PIPELINES[model]).from_single_file(
        checkpoint, config=str(configs), local_files_only=True, torch_dtype=torch.float16, **_without(model)
    )
    pipeline.save_pretrained(done, safe_serialization=True)
    return done


def load_folder(model: str, folder: Path, dtype: str) -> Any:
    """The pipeline in `folder`, computing in `dtype`."""
    torch = import_module("torch")
    diffusers = import_module("diffusers")
    return getattr(diffusers, _PIPELINES[model]).from_pretrained(
        str(folder), torch_dtype=getattr(torch, dtype), local_files_only=True, **_without(model)
    )


def _without(model: str) -> dict[str, None]:
    return dict.fromkeys(_ABSENT[model])


def _write_configs(model: str, folder: Path) -> None:
    torch = import_module("torch")
    diffusers, transformers = import_module("diffusers"), import_module("transformers")
    unet = _SDXL_UNET if model == "sdxl" else _SD1_UNET
    index: dict[str, Any] = {"_class_name": _PIPELINES[model], "_diffusers_version": diffusers.__version__}
    with torch.device("meta"):
        diffusers.UNet2DConditionModel(**unet).save_config(folder / "unet")
        diffusers.AutoencoderKL(**_VAE).save_config(folder / "vae")
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    for name, (kind, config) in _ENCODERS[model].items():
        transformers.CLIPTextConfig(**config).save_pretrained(folder / name)
        index[name] = ["transformers", kind]
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"]} | {name: [None, None] for name in _ABSENT[model]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
