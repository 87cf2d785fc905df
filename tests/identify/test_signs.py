"""The DiT families are recognised in every packaging, by names and structure."""

from __future__ import annotations

from pathlib import Path

import dits
import pytest
from listed import checkpoint_of, checkpoint_of_list
from names import read_list, small

from bake.errors import UsageError
from bake.identify.checkpoint import identify_checkpoint
from bake.identify.families import FAMILIES
from bake.keys.dialects import Address
from bake.keys.modules import TABLES, ModuleIndex

T5 = {f"encoder.block.0.layer.0.SelfAttention.{leaf}.weight": (4, 4) for leaf in "qkvo"} | {"shared.weight": (8, 4)}
CLIP = {
    **{"text_model.embeddings.token_embedding.weight": (8, 4)},
    **{f"text_model.encoder.layers.{n}.self_attn.q_proj.weight": (4, 4) for n in range(2)},
}
CLIP_G = CLIP | {f"text_model.encoder.layers.{n}.self_attn.q_proj.weight": (4, 4) for n in range(32)}
GEMMA = {"model.layers.0.self_attn.q_proj.weight": (4, 4), "model.norm.weight": (4,)}
VAE = {"encoder.down.0.block.0.conv1.weight": (4, 4, 3, 3)}


def under(prefix: str, shapes: dits.Shapes) -> dits.Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def slots(identity) -> dict[str, tuple[str, ...]]:
    return {component.name: component.also for component in identity.components}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "net.", "transformer."])
@pytest.mark.parametrize("name", dits.MODELS)
def test_single_files_under_every_prefix(name: str, prefix: str) -> None:
    family, variant, build, _, _ = dits.MODELS[name]
    identity = identify_checkpoint(checkpoint_of({"": under(prefix, build())}))
    assert (identity.family, identity.variant, identity.layout) == (family, variant, "original")
    (component,) = identity.components
    assert (component.name, component.prefix) == ("unet" if family == "stable-cascade" else "transformer", prefix)
    assert identity.evidence


def test_comfyuis_names_of_hunyuan_are_original_too() -> None:
    identity = identify_checkpoint(checkpoint_of({"": dits.hunyuan_comfy()}))
    assert (identity.family, identity.layout) == ("hunyuan-video", "original")


def changed(shapes: dits.Shapes, **tensors: tuple[int, ...] | None) -> dits.Shapes:
    """`shapes` with these tensors, "__" for a dot; None takes one away."""
    new = {name.replace("__", "."): shape for name, shape in tensors.items()}
    return {name: shape for name, shape in (shapes | new).items() if shape is not None}


@pytest.mark.parametrize(
    ("shapes", "variant"),
    [
        (changed(dits.flux(), img_in__weight=(8, 6 * dits.CHANNELS)), "fill"),
        (changed(dits.flux(), img_in__weight=(8, 2 * dits.CHANNELS)), "depth-or-canny"),
        (changed(dits.flux(), guidance_in__in_layer__weight=None), "schnell"),
        (changed(dits.wan(), vace_patch_embedding__weight=(8, 24, 1, 2, 2)), "vace"),
        (changed(dits.wan(), patch_embedding__weight=(8, 9, 1, 2, 2)), "image-to-video"),
        (changed(dits.hunyuan(), img_in__proj__weight=(8, 9, 1, 2, 2)), "image-to-video"),
        (changed(dits.hunyuan(), img_in__proj__weight=(8, 4, 1, 1)), "image"),
    ],
)
def test_variants_are_told_by_names_and_channels(shapes: dits.Shapes, variant: str) -> None:
    assert identify_checkpoint(checkpoint_of({"": shapes})).variant == variant


def test_every_family_with_a_table_has_a_name_for_people() -> None:
    assert set(TABLES) | {"stable-cascade"} <= set(FAMILIES)


def test_variants_have_their_own_architecture_ids() -> None:
    assert FAMILIES["flux"].architecture(None) == "flux-1-dev"
    assert FAMILIES["flux"].architecture("schnell") == "flux-1-schnell"
    assert FAMILIES["flux"].architecture("fill") == ""
    assert FAMILIES["sd3"].architecture("3.5-large") == "stable-diffusion-v3.5-large"
    assert FAMILIES["sdxl"].architecture("inpainting") == "stable-diffusion-xl-v1-base"


def test_a_file_with_everything_has_all_components() -> None:
    shapes = {
        **under("model.diffusion_model.", dits.sd3()),
        **under("text_encoders.clip_l.transformer.", CLIP),
        **under("text_encoders.clip_g.transformer.", CLIP),
        **under("text_encoders.t5xxl.transformer.", T5),
        **under("first_stage_model.", VAE),
        **{"text_encoders.clip_l.logit_scale": ()},
    }
    identity = identify_checkpoint(checkpoint_of({"": shapes}))
    assert identity.family == "sd3"
    assert slots(identity) == {"transformer": (), "te1": (), "te2": (), "te3": (), "vae": ()}
    assert [component.naming for component in identity.components][1:4] == ["hf clip", "hf clip", "t5"]


def test_a_stack_of_flux_has_a_t5_that_answers_to_both_numbers() -> None:
    parts = {"flux1-dev.safetensors/": dits.flux(), "clip_l.safetensors/": CLIP, "t5xxl.safetensors/": T5}
    identity = identify_checkpoint(checkpoint_of(parts, "stack"))
    assert slots(identity) == {"transformer": (), "te1": (), "te3": ("te2",)}
    shapes = {group + name: shape for group, part in parts.items() for name, shape in part.items()}
    index = ModuleIndex(identity.components, shapes)
    path = "encoder.block.0.layer.0.SelfAttention.q"
    for slot in ("te2", "te3"):
        found = index.find(Address((slot,), path.replace(".", "_"), "flat", "kohya"))
        assert found is not None
        assert (found.component, found.module) == ("te3", path)
    assert index.find(Address(("te1",), path, "dotted", "diffusers")) is None


def test_a_diffusers_folder_of_flux_answers_to_both_numbers_too() -> None:
    parts = {"transformer/": dits.flux(), "text_encoder/": CLIP, "text_encoder_2/": T5, "vae/": VAE}
    identity = identify_checkpoint(checkpoint_of(parts, "diffusers"))
    assert slots(identity) == {"transformer": (), "te1": (), "te2": ("te3",), "vae": ()}


def test_a_second_clip_keeps_its_number() -> None:
    parts = {"sd3/": dits.sd3(), "l/": CLIP, "g/": CLIP_G, "t5/": T5}
    identity = identify_checkpoint(checkpoint_of(parts, "stack"))
    assert slots(identity) == {"transformer": (), "te1": (), "te2": (), "te3": ()}


def test_a_t5_that_is_the_only_encoder_is_also_the_first() -> None:
    identity = identify_checkpoint(checkpoint_of({"auraflow/": dits.auraflow(), "t5/": T5}, "stack"))
    assert slots(identity) == {"transformer": (), "te3": ("te1", "te2")}


def test_a_language_model_as_text_encoder_is_found_with_and_without_its_outer_level() -> None:
    shapes = under("model.diffusion_model.", dits.z_image()) | under("text_encoders.qwen3_4b.transformer.", GEMMA)
    identity = identify_checkpoint(checkpoint_of({"": shapes}))
    assert slots(identity) == {"transformer": (), "te1": ()}
    index = ModuleIndex(identity.components, shapes)
    for path in ("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"):
        assert index.find(Address(("te1",), path, "dotted", "diffusers")) is not None


def test_two_encoders_of_one_kind_in_a_file_get_numbers_of_their_own() -> None:
    shapes = under("model.diffusion_model.", dits.hunyuan_comfy())
    shapes |= under("text_encoders.clip_l.transformer.", CLIP) | under("text_encoders.llama.transformer.", GEMMA)
    assert slots(identify_checkpoint(checkpoint_of({"": shapes}))) == {"transformer": (), "te1": (), "te2": ()}


def test_both_transformers_of_wan_are_components() -> None:
    parts = {"transformer/": dits.wan(), "transformer_2/": dits.wan(), "text_encoder/": T5}
    identity = identify_checkpoint(checkpoint_of(parts, "diffusers"))
    assert identity.family == "wan"
    assert slots(identity) == {"transformer": (), "transformer_2": (), "te1": ("te2", "te3")}
    assert {component.naming for component in identity.components} == {"wan", "t5"}


def test_the_stages_of_cascade() -> None:
    both = identify_checkpoint(checkpoint_of({"decoder/": dits.cascade_b(), "prior/": dits.cascade_c()}, "diffusers"))
    assert (both.variant, slots(both)) == ("stage-c", {"decoder": (), "unet": ()})
    alone = identify_checkpoint(checkpoint_of({"decoder/": dits.cascade_b()}, "diffusers"))
    assert (alone.variant, slots(alone)) == ("stage-b", {"decoder": ("unet",)})
    single = under("model.diffusion_model.", dits.cascade_c()) | under("text_encoders.clip_g.transformer.", CLIP)
    assert slots(identify_checkpoint(checkpoint_of({"": single}))) == {"unet": (), "te2": ("te1",)}


def test_two_transformers_in_a_stack_are_refused() -> None:
    with pytest.raises(UsageError, match="two files hold a transformer"):
        identify_checkpoint(checkpoint_of({"high/": dits.wan(), "low/": dits.wan()}, "stack"))


def test_an_unknown_transformer_is_called_by_its_class() -> None:
    parts = {"transformer/": {"layer.weight": (2, 2)}, "text_encoder/": GEMMA}
    configs = {"transformer/": {"_class_name": "NewTransformer2DModel"}}
    identity = identify_checkpoint(checkpoint_of(parts, "diffusers", configs))
    assert (identity.family, identity.layout) == ("NewTransformer2DModel", "diffusers")
    assert {component.name: component.naming for component in identity.components} == {
        "transformer": "plain",
        "te1": "language model",
    }


def test_the_unets_are_still_unets() -> None:
    assert identify_checkpoint(checkpoint_of({"": small("sdxl")})).family == "sdxl"


# Where the list's own word for the family is not bake's, or a list is not a whole model.
FAMILY_OF = {"flux1": "flux", "clip-l": "unknown", "flux1-vae": "unknown", "t5-xxl": "unknown"}
VARIANTS = {
    **{"sd15_inpainting_original": "inpainting", "sd3_medium_original": "medium", "sd3_medium_diffusers": "medium"},
    **{"sd3_medium_incl_clips_original": "medium"},
    **{f"sd35_{size}_{layout}": f"3.5-{size}" for size in ("medium", "large") for layout in ("original", "diffusers")},
    **{f"cascade_{stage}_{layout}": f"stage-{stage}" for stage in "bc" for layout in ("original", "diffusers")},
    **{f"wan21_i2v_14b_{layout}": "image-to-video" for layout in ("original", "diffusers")},
}
DIFFUSION_MODEL = {"sd1": "unet", "sd2": "unet", "sdxl": "unet", "sdxl-refiner": "unet", "stable-cascade": "unet"}
COMPONENTS = {
    **{"sd15": ["unet", "te1", "vae"], "sd21": ["unet", "te1", "vae"], "sdxl_base": ["unet", "te1", "te2", "vae"]},
    **{"sdxl_refiner": ["unet", "te2", "vae"], "sd3_encoders": ["te1", "te2", "te3", "vae"]},
    **{"flux1_dev_encoders": ["te1", "te2", "vae"], "clip_l_comfy": ["te1"], "t5xxl_fp16_comfy": ["te3"]},
    **{"flux1_ae": ["vae"], "cascade_b_diffusers": ["decoder"], "sd3_medium_original": ["transformer", "vae"]},
    **{"sd35_medium_original": ["transformer", "vae"], "sd35_large_original": ["transformer", "vae"]},
    **{"sd3_medium_incl_clips": ["transformer", "te1", "te2", "vae"]},
}


def test_every_published_list_is_what_it_says(shared: Path) -> None:
    lists = sorted((shared / "names").glob("*.json*"))
    assert len(lists) >= 67
    for path in lists:
        name = path.name.partition(".json")[0]
        checkpoint = checkpoint_of_list(path)
        identity = identify_checkpoint(checkpoint)
        about = read_list(path)[0]
        family = "unknown" if "_encoders_" in name else FAMILY_OF.get(about["family"], about["family"])
        assert identity.family == family, name
        layout = {"hf": "huggingface", "diffusers": "diffusers"}.get(about["layout"])
        layout = layout or ("plain" if family == "unknown" else "original")
        assert identity.layout == layout, name
        assert identity.variant == VARIANTS.get(name), name
        if about["layout"] == "hf":
            expected = ["model"]
        else:
            lists_of = (expected for start, expected in COMPONENTS.items() if name.startswith(start))
            expected = next(lists_of, [DIFFUSION_MODEL.get(family, "transformer")])
        assert sorted(component.name for component in identity.components) == sorted(expected), name
        if identity.components[0].naming in {*TABLES, "ldm unet", "diffusers unet", "stable-cascade"}:
            assert identity.evidence, name
