"""The model families bake tells apart, by what to call them and what to write into metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models that share tensor names."""

    name: str  # short, stable: what JSON documents say
    title: str  # for people
    modelspec: str = ""  # architecture id of the ModelSpec metadata convention, where it has one for all variants
    variants: Mapping[str | None, str] = field(default_factory=dict)  # variant -> its own architecture id
    image: bool = True  # an image or video model: web UIs read its metadata

    def architecture(self, variant: str | None) -> str:
        """The ModelSpec architecture id of `variant` (None: the plain model); "" where the convention has none."""
        return self.variants.get(variant, self.modelspec)


_ROWS = (
    Family("sd1", "Stable Diffusion 1", "stable-diffusion-v1"),
    Family("sd2", "Stable Diffusion 2", "stable-diffusion-v2-512"),
    Family("sdxl", "Stable Diffusion XL", "stable-diffusion-xl-v1-base"),
    Family("sdxl-refiner", "Stable Diffusion XL refiner", "stable-diffusion-xl-v1-refiner"),
    Family(
        "sd3",
        "Stable Diffusion 3",
        variants={
            "medium": "stable-diffusion-v3-medium",
            "3.5-medium": "stable-diffusion-v3.5-medium",
            "3.5-large": "stable-diffusion-v3.5-large",
        },
    ),
    Family("flux", "Flux.1", variants={None: "flux-1-dev", "schnell": "flux-1-schnell"}),
    Family("flux2", "Flux.2"),
    Family("chroma", "Chroma", "chroma"),
    Family("auraflow", "AuraFlow"),
    Family("pixart", "PixArt"),
    Family("sana", "Sana"),
    Family("lumina2", "Lumina 2", "lumina-2"),
    Family("z-image", "Z-Image"),
    Family("hunyuan-video", "HunyuanVideo or HunyuanImage", variants={"image": "hunyuan-image-2.1"}),
    Family("wan", "Wan"),
    Family("qwen-image", "Qwen-Image"),
    Family("ltxv", "LTX-Video"),
    Family("mochi", "Mochi"),
    Family("stable-cascade", "Stable Cascade"),
    Family("language-model", "a language model", image=False),
)
FAMILIES = {row.name: row for row in _ROWS}


def title(name: str) -> str:
    """The family's name for people, its short name in brackets."""
    family = FAMILIES.get(name)
    return f"{family.title} ({name})" if family is not None and family.title != name else name
