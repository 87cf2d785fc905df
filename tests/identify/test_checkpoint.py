"""Bases are recognised by names and structure, whatever their widths and packaging."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models import llama, random_arrays
from names import read_list, small
from support import save

from bake.errors import UsageError
from bake.identify.checkpoint import identify_checkpoint
from bake.io.checkpoint import open_checkpoint
from bake.keys.unet import translate


def identify(path: Path, also=()):
    return identify_checkpoint(open_checkpoint(path, also))


@pytest.mark.parametrize(
    ("family", "components"),
    [
        ("sd1", ["unet", "te1", "vae"]),
        ("sd2", ["unet", "te1", "vae"]),
        ("sdxl", ["unet", "te1", "te2", "vae"]),
        ("sdxl-refiner", ["unet", "te2", "vae"]),
    ],
)
def test_single_files_of_every_family(tmp_path: Path, family: str, components: list[str]) -> None:
    identity = identify(save(tmp_path / "a.safetensors", random_arrays(small(family))))
    assert (identity.family, identity.layout, identity.variant) == (family, "original", None)
    assert [component.name for component in identity.components] == components
    assert identity.evidence


@pytest.mark.parametrize(("channels", "variant"), [(9, "inpainting"), (8, "instruct-pix2pix"), (5, "depth")])
def test_variants_are_told_by_the_first_convolution(tmp_path: Path, channels: int, variant: str) -> None:
    arrays = random_arrays(small("sd1"))
    arrays["model.diffusion_model.input_blocks.0.0.weight"] = np.zeros((4, channels, 3, 3), np.float16)
    identity = identify(save(tmp_path / "a.safetensors", arrays))
    assert (identity.family, identity.variant) == ("sd1", variant)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_a_bare_unet_in_either_layout(tmp_path: Path, family: str) -> None:
    prefix = "model.diffusion_model."
    arrays = random_arrays({n.removeprefix(prefix): s for n, s in small(family).items() if n.startswith(prefix)})
    names = translate({name.rpartition(".")[0] for name in arrays})
    diffusers = {f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": array for n, array in arrays.items()}
    for stored, layout in ((arrays, "original"), (diffusers, "diffusers")):
        identity = identify(save(tmp_path / f"{layout}.safetensors", stored))
        assert (identity.family, identity.layout) == (family, layout)
        assert [component.name for component in identity.components] == ["unet"]


def test_a_stack_of_unet_and_two_text_encoders(tmp_path: Path) -> None:
    parts = {"unet": {}, "clip_l": {}, "clip_g": {}}
    prefixes = {
        "model.diffusion_model.": "unet",
        "conditioner.embedders.0.transformer.": "clip_l",
        "conditioner.embedders.1.model.": "clip_g",
    }
    for name, array in random_arrays(small("sdxl")).items():
        for prefix, part in prefixes.items():
            if name.startswith(prefix):
                parts[part][name.removeprefix(prefix)] = array
    paths = [save(tmp_path / f"{part}.safetensors", arrays) for part, arrays in parts.items()]
    identity = identify(paths[0], paths[1:])
    assert identity.family == "sdxl"
    assert {component.name: component.prefix for component in identity.components} == {
        "unet": "unet.safetensors/",
        "te1": "clip_l.safetensors/",
        "te2": "clip_g.safetensors/",
    }


def test_two_files_with_one_component_are_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "a.safetensors", random_arrays(small("sd1")))
    other = save(tmp_path / "b.safetensors", random_arrays(small("sd1")))
    with pytest.raises(UsageError, match="two files hold a unet"):
        identify(base, [other])


def test_a_language_model_is_called_by_its_model_type(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", random_arrays(llama()))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    identity = identify(tmp_path)
    assert (identity.family, identity.layout, identity.language_model) == ("llama", "huggingface", True)
    assert [component.name for component in identity.components] == ["model"]


def test_a_language_model_without_configuration_is_still_one(tmp_path: Path) -> None:
    identity = identify(save(tmp_path / "model.safetensors", random_arrays(llama())))
    assert (identity.family, identity.language_model) == ("language-model", True)


def test_anything_else_is_one_unknown_model(tmp_path: Path) -> None:
    identity = identify(save(tmp_path / "net.safetensors", {"layer.weight": np.ones((2, 2))}))
    assert (identity.family, identity.layout) == ("unknown", "plain")


@pytest.mark.parametrize(
    ("name", "family", "variant"),
    [
        ("sd15_original.json", "sd1", None),
        ("sd15_inpainting_original.json", "sd1", "inpainting"),
        ("sd21_original.json", "sd2", None),
        ("sdxl_base_original.json.gz", "sdxl", None),
        ("sdxl_refiner_original.json", "sdxl-refiner", None),
        ("flux1_dev_original.json", "flux", None),
        ("llama31_8b.json", "language-model", None),
    ],
)
def test_published_checkpoints(shared: Path, tmp_path: Path, name: str, family: str, variant: str | None) -> None:
    _, shapes = read_list(shared / "names" / name)
    tiny = {key: tuple(min(size, 16) for size in shape) for key, shape in shapes.items()}
    identity = identify(save(tmp_path / "a.safetensors", random_arrays(tiny)))
    assert (identity.family, identity.variant) == (family, variant)
