"""The model families bake tells apart, by what to call them and what to write into metadata."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models that share tensor names."""

    name: str  # short, stable: what JSON documents say
    title: str  # for people
    modelspec: str = ""  # architecture id of the ModelSpec metadata convention, where it has one
    image: bool = True  # an image model: web UIs read its metadata
    spelled: bool = True  # bake.keys knows how its modules are spelled; else it is only recognised


_ROWS = (
    Family("sd1", "Stable Diffusion 1", "stable-diffusion-v1"),
    Family("sd2", "Stable Diffusion 2", "stable-diffusion-v2-512"),
    Family("sdxl", "Stable Diffusion XL", "stable-diffusion-xl-v1-base"),
    Family("sdxl-refiner", "Stable Diffusion XL refiner", "stable-diffusion-xl-v1-refiner"),
    Family("sd3", "Stable Diffusion 3", spelled=False),
    Family("flux", "Flux", spelled=False),
    Family("auraflow", "AuraFlow", spelled=False),
    Family("wan", "Wan", spelled=False),
    Family("qwen-image", "Qwen-Image", spelled=False),
    Family("lumina", "Lumina 2 or Z-Image", spelled=False),
    Family("language-model", "a language model", image=False),
)
FAMILIES = {row.name: row for row in _ROWS}


def title(name: str) -> str:
    """The family's name for people, its short name in brackets."""
    family = FAMILIES.get(name)
    return f"{family.title} ({name})" if family is not None and family.title != name else name
