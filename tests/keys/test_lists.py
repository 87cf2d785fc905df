"""Every published checkpoint, addressed in the names of its other layout: each row once, nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest
from covering import cover, flat_collisions
from listed import checkpoint_of_list, shapes_of

from bake.identify.checkpoint import identify_checkpoint
from bake.keys.modules import ModuleIndex

MODEL = "model.diffusion_model."
VAE = "first_stage_model."
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
# (list, list of its other layout, component here -> what its tensors begin with there)
PAIRS = [
    ("sd15_original", "sd15_diffusers", {"unet": "unet/", "te1": "text_encoder/", "vae": "vae/"}),
    ("sd15_diffusers", "sd15_original", {"unet": MODEL, "te1": "cond_stage_model.transformer.", "vae": VAE}),
    ("sd21_original", "sd21_diffusers", {"unet": "unet/", "te1": "text_encoder/"}),
    ("sd21_diffusers", "sd21_original", {"unet": MODEL}),
    (
        *("sdxl_base_original", "sdxl_base_diffusers"),
        {"unet": "unet/", "te1": "text_encoder/", "te2": "text_encoder_2/", "vae": "vae/"},
    ),
    ("sdxl_base_diffusers", "sdxl_base_original", {"unet": MODEL, "te1": CLIP_L, "vae": VAE}),
    ("sdxl_refiner_original", "sdxl_refiner_diffusers", {"unet": "unet/", "te2": "text_encoder_2/"}),
    ("sdxl_refiner_diffusers", "sdxl_refiner_original", {"unet": MODEL}),
    ("sd3_encoders_diffusers", "t5xxl_fp16_comfy", {"te3": ""}),
    ("t5xxl_fp16_comfy", "sd3_encoders_diffusers", {"te3": "text_encoder_3/"}),
    ("t5xxl_fp16_comfy", "flux1_dev_encoders_diffusers", {"te3": "text_encoder_2/"}),
    ("clip_l_comfy", "flux1_dev_encoders_diffusers", {"te1": "text_encoder/"}),
    (
        *("sd3_medium_incl_clips_original", "sd3_encoders_diffusers"),
        {"te1": "text_encoder/", "te2": "text_encoder_2/"},
    ),
    ("cascade_c_original", "cascade_c_diffusers", {"unet": "prior/"}),
    ("cascade_c_diffusers", "cascade_c_original", {"unet": ""}),
    ("cascade_b_original", "cascade_b_diffusers", {"unet": "decoder/"}),
    ("cascade_b_diffusers", "cascade_b_original", {"decoder": ""}),
]
for model in (
    *("flux1_dev", "chroma", "flux2_dev", "sd3_medium", "sd35_medium", "sd35_large", "auraflow", "pixart_sigma"),
    *("lumina2", "zimage", "hunyuanvideo", "wan21_t2v_1.3b", "wan21_t2v_14b", "wan21_i2v_14b", "wan22_ti2v_5b"),
    *("qwen_image", "ltx_video"),
):
    prefix = MODEL if model.startswith(("sd3", "ltx")) else ""
    PAIRS.append((f"{model}_original", f"{model}_diffusers", {"transformer": "transformer/"}))
    PAIRS.append((f"{model}_diffusers", f"{model}_original", {"transformer": prefix}))

# Tensors of one layout that the other has not, and why.
UNPAIRED = {
    "norm_final.weight",  # Lumina 2 never uses it
    "text_projection",  # of SD2's encoder, which nothing reads and diffusers leaves out
    "text_projection.weight",  # the list of SD3's encoders has CLIP-L's, the single file leaves it out
    "text_model.embeddings.position_ids",  # a counter, not a weight; newer files leave it out
    "logit_scale",  # a weight of CLIP's training, which diffusers drops
}
UNPAIRED_BLOCKS = ("transformer.resblocks.23.",)  # SD2 stops one layer earlier; diffusers leaves the last one out


def open_list(shared: Path, name: str):
    (path,) = (shared / "names").glob(f"{name}.json*")
    return checkpoint_of_list(path)


@pytest.mark.parametrize(("here", "there", "components"), PAIRS, ids=[f"{a}<-{b}" for a, b, _ in PAIRS])
def test_a_full_adapter_in_the_other_layouts_names_reaches_everything_once(
    shared: Path, here: str, there: str, components: dict[str, str]
) -> None:
    base = open_list(shared, here)
    shapes, other = shapes_of(base), shapes_of(open_list(shared, there))
    index = ModuleIndex(identify_checkpoint(base).components, shapes)
    for component in index.components:
        if component.name not in components:
            continue
        own = {name: shape for name, shape in shapes.items() if name.startswith(component.prefix)}
        theirs = {name: shape for name, shape in other.items() if name.startswith(components[component.name])}
        if there == "t5xxl_fp16_comfy":  # the same tensor a second time
            theirs.pop("encoder.embed_tokens.weight")
        homeless, unreached = cover(index.spellings[component.name], own, theirs, components[component.name])
        left = {name.removeprefix(components[component.name]) for name in homeless}
        left |= {name.removeprefix(component.prefix) for name in unreached}
        assert {name for name in left - UNPAIRED if not name.startswith(UNPAIRED_BLOCKS)} == set()


def test_no_two_modules_of_any_list_flatten_alike(shared: Path) -> None:
    for path in sorted((shared / "names").glob("*.json*")):
        base = checkpoint_of_list(path)
        flat_collisions(ModuleIndex(identify_checkpoint(base).components, shapes_of(base)))
