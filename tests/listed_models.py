"""The published models by their name lists: which lists belong together, and where their components begin."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from headers import Shapes, layers
from names import read_list
from speaking import Layers

MODEL = "model.diffusion_model."


class Listed(NamedTuple):
    """One model in its two layouts."""

    family: str  # what bake calls it
    original: str | None  # name of the list
    prefix: str
    diffusers: str | None
    folder: str
    encoders: dict[str, tuple[str, str]]  # kind -> (list, folder) with Hugging Face names


def _encoders(name: str, *kinds: str) -> dict[str, tuple[str, str]]:
    return {kind: (name, f"text_encoder{'' if i == 1 else f'_{i}'}/") for i, kind in enumerate(kinds, 1)}


MODELS = {
    "sd15": Listed("sd1", "sd15_original", MODEL, "sd15_diffusers", "unet/", _encoders("sd15_diffusers", "clip")),
    "sd15-inpainting": Listed(
        *("sd1", "sd15_inpainting_original", MODEL, None, ""), _encoders("sd15_diffusers", "clip")
    ),
    "sd21": Listed("sd2", "sd21_original", MODEL, "sd21_diffusers", "unet/", _encoders("sd21_diffusers", "clip")),
    "sdxl": Listed(
        *("sdxl", "sdxl_base_original", MODEL, "sdxl_base_diffusers", "unet/"),
        _encoders("sdxl_base_diffusers", "clip_l", "clip_g"),
    ),
    "sdxl-refiner": Listed(
        *("sdxl-refiner", "sdxl_refiner_original", MODEL, "sdxl_refiner_diffusers", "unet/"),
        {"clip_g": ("sdxl_refiner_diffusers", "text_encoder_2/")},
    ),
    "sd3-with-clips": Listed(
        *("sd3", "sd3_medium_incl_clips_original", MODEL, None, ""),
        _encoders("sd3_encoders_diffusers", "clip_l", "clip_g"),
    ),
    "cascade-c": Listed("stable-cascade", "cascade_c_original", "", "cascade_c_diffusers", "prior/", {}),
    "cascade-b": Listed("stable-cascade", "cascade_b_original", "", "cascade_b_diffusers", "decoder/", {}),
    **{
        name: Listed(family, f"{name}_original", prefix, f"{name}_diffusers", "transformer/", {})
        for name, family, prefix in (
            *(("flux1_dev", "flux", ""), ("chroma", "chroma", ""), ("flux2_dev", "flux2", "")),
            *(("sd3_medium", "sd3", MODEL), ("sd35_medium", "sd3", MODEL), ("sd35_large", "sd3", MODEL)),
            *(("auraflow", "auraflow", ""), ("pixart_sigma", "pixart", ""), ("lumina2", "lumina2", "")),
            *(("zimage", "z-image", ""), ("hunyuanvideo", "hunyuan-video", ""), ("ltx_video", "ltxv", MODEL)),
            *(("wan21_t2v_1.3b", "wan", ""), ("wan21_t2v_14b", "wan", ""), ("wan21_i2v_14b", "wan", "")),
            *(("wan22_ti2v_5b", "wan", ""), ("qwen_image", "qwen-image", "")),
        )
    },
}
BASES = [(name, base) for name, model in MODELS.items() for base in (model.original, model.diffusers) if base]
# Language models, speech models and encoders in the names of transformers.
LANGUAGE = (
    *("llama31_8b", "qwen25_0.5b", "qwen3moe_small", "qwen3_30b_a3b", "mixtral_8x7b", "gemma2_2b", "mistral_7b"),
    *("gpt2_small", "minilm_l6", "t5_large", "whisper_small", "qwen25_vl_3b_old", "qwen25_vl_3b_new"),
)


def list_path(shared: Path, name: str) -> Path:
    (path,) = (shared / "names").glob(f"{name}.json*")
    return path


@cache
def listed_layers(path: Path, prefix: str) -> Shapes:
    """The layers below `prefix`; lists of a single folder do not name it."""
    about, shapes = read_list(path)
    folders = {file.rpartition("/")[0] for file in about.get("files", {})}
    return layers(shapes, prefix if len(folders) != 1 else "")


def layers_of(shared: Path, name: str) -> Layers:
    """Every layer of a model in both layouts."""
    model = MODELS[name]
    diffusers = listed_layers(list_path(shared, model.diffusers), model.folder) if model.diffusers else {}
    original = listed_layers(list_path(shared, model.original), model.prefix) if model.original else {}
    if model.family == "stable-cascade":  # its fused q, k and v is no layer; ComfyUI splits it
        respelled = {".attention.to_out.0": ".attention.attn.out_proj", ".attention.to_": ".attention.attn.to_"}
        for theirs, ours in respelled.items():
            original = original | {m.replace(theirs, ours): s for m, s in diffusers.items() if theirs in m}
        original = {m: s for m, s in original.items() if not m.endswith("attn.to_out.0")}
    encoders = {
        kind: listed_layers(list_path(shared, encoder), folder) for kind, (encoder, folder) in model.encoders.items()
    }
    if name == "sd3-with-clips":  # the single file leaves out CLIP-L's projection, which SD3 does not read
        encoders["clip_l"] = {m: s for m, s in encoders["clip_l"].items() if m != "text_projection"}
    return Layers(original, diffusers, encoders)
