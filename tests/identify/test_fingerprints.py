"""Families and trainers, told from names alone; widths and metadata are hints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from names import read_list

from bake.identify.fingerprints import families_by_names, family_by_metadata, family_by_shapes, trainer_of
from bake.io.adapter import open_adapter
from bake.keys.dialects import addresses, flatten
from bake.keys.factors import split_key, split_value
from bake.keys.places import split_parameter

FLUX = {"flux", "chroma", "hunyuan-video"}
FLUX_OR_2 = FLUX | {"flux2"}
JOINT = FLUX_OR_2 | {"sd3", "qwen-image"}

# What the lists in the shared folder call a family -> what bake calls it
LISTED = {
    "flux1": "flux",
    **dict.fromkeys(("gemma2", "gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3_moe"), "language-model"),
    **dict.fromkeys(("qwen2_5_vl", "whisper"), "language-model"),
}
# Of these no block is told: bake refuses nothing on their account.
UNTOLD = {"bert", "t5", "t5-xxl", "clip-l"}


class TestFamilies:
    @pytest.mark.parametrize(
        ("module", "families"),
        [
            ("lora_unet_double_blocks_0_img_attn_qkv", FLUX_OR_2),
            ("lora_unet_double_blocks_0_img_mod_lin", FLUX - {"chroma"}),  # Chroma has no modulations
            ("double_blocks.0.processor.qkv_lora1", FLUX_OR_2),
            ("diffusion_model.img_in", FLUX_OR_2 - {"hunyuan-video"} | {"qwen-image"}),
            ("diffusion_model.single_blocks.0.linear1", FLUX_OR_2),
            ("transformer.single_transformer_blocks.0.attn.to_q", FLUX | {"auraflow"}),
            ("transformer.single_transformer_blocks.0.proj_mlp", FLUX),
            ("transformer.single_transformer_blocks.0.norm.linear", FLUX - {"chroma"}),
            ("transformer.transformer_blocks.0.norm1.linear", FLUX - {"chroma"} | {"sd3", "mochi"}),
            ("transformer.context_embedder", {"flux", "chroma", "flux2", "sd3", "auraflow"}),
            ("transformer.x_embedder", {"flux", "chroma", "flux2", "lumina2", "z-image"}),
            ("transformer.pos_embed.proj", {"sd3", "pixart", "auraflow"}),
            ("transformer.adaln_single.linear", {"pixart", "ltxv"}),
            ("lycoris_transformer_blocks_0_ff_context_linear_in", {"flux2"}),
            ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", {"flux2"}),
            ("lora_unet_double_blocks_0_img_mod_linear", {"hunyuan-video"}),
            ("lora_unet_txt_in_individual_token_refiner_blocks_0_mlp_fc1", {"hunyuan-video"}),
            ("diffusion_model.distilled_guidance_layer.layers.0.in_layer", {"chroma"}),
            ("lora_unet_joint_blocks_0_x_block_attn_qkv", {"sd3"}),
            ("transformer.transformer_blocks.0.attn.add_q_proj", JOINT),
            ("transformer.transformer_blocks.0.img_mlp.net.2", {"qwen-image"}),
            ("transformer.joint_transformer_blocks.0.attn.to_q", {"auraflow"}),
            ("lora_unet_double_layers_0_attn_w1q", {"auraflow"}),
            ("lora_unet_blocks_0_self_attn_q", {"wan"}),
            ("lora_unet__blocks_0_cross_attn_k", {"wan"}),
            ("transformer.blocks.0.attn1.to_q", {"wan"}),
            ("diffusion_model.blocks.0.cross_attn.k_img", {"wan"}),
            ("lora_transformer_blocks_0_ffn_net_0_proj", {"wan"}),
            ("lora_unet_layers_0_attention_qkv", {"lumina2", "z-image"}),
            ("transformer.layers.0.attention.to_q", {"z-image"}),
            ("transformer.layers.0.attn.to_q", {"lumina2"}),
            ("transformer.context_refiner.0.feed_forward.w1", {"lumina2", "z-image"}),
            ("diffusion_model.patchify_proj", {"ltxv"}),
            ("transformer.transformer_blocks.0.attn1.to_q", {"pixart", "sana", "ltxv", "mochi", "sd3"}),
            ("lora_unet_blocks_0_cross_attn_kv_linear", {"pixart", "sana"}),
            ("blocks.0.attn.qkv_x", {"mochi"}),
            ("lora_prior_unet_down_blocks_0_2_attention_to_q", {"stable-cascade"}),
            ("unet.clip_txt_mapper", {"stable-cascade"}),
            ("base_model.model.model.layers.0.self_attn.q_proj", {"language-model"}),
            ("base_model.model.transformer.h.0.attn.c_attn", {"language-model"}),
            ("base_model.model.layers.0.mlp.up_proj", {"language-model"}),
            ("model.layers.0.self_attn.q_proj", {"language-model"}),
            ("lora_unet_mid_block_attentions_0_proj_in", {"sd1", "sd2", "sdxl", "sdxl-refiner"}),
            ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q", {"sdxl", "sdxl-refiner"}),
            # not told
            ("base_model.model.encoder.layer.0.attention.self.query", set()),
            ("base_model.model.text_model.encoder.layers.0.self_attn.q_proj", set()),
            ("lora_unet_blocks_0_self_attn_q_proj", set()),
            ("proj_out", set()),
        ],
    )
    def test_one_name(self, module: str, families: set[str]) -> None:
        found, telling = families_by_names([module])
        assert found == families
        assert (telling == "") == (not families)

    def test_names_narrow_each_other_down(self) -> None:
        shared, own = "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.txt_mlp.net.2"
        assert families_by_names([shared, own]) == ({"qwen-image"}, own)
        assert families_by_names([own, shared]) == ({"qwen-image"}, own)

    def test_names_of_two_families_tell_nothing(self) -> None:
        assert (
            families_by_names(["unet.mid_block.resnets.0.conv1", "transformer.joint_blocks.0.x_block.mlp.fc1"])[0]
            == set()
        )

    @pytest.mark.parametrize("spell", ["lora_unet_{}", "transformer.{}", "diffusion_model.{}", "lycoris_{}", "{}"])
    def test_every_published_model_is_among_the_families_of_its_own_names(self, shared: Path, spell: str) -> None:
        for path in sorted((shared / "names").glob("*.json*")):
            if path.name == "flux1_ae_original.json":  # an autoencoder has the blocks of a UNet
                continue
            about, shapes = read_list(path)
            family = LISTED.get(about["family"], about["family"])
            names = [split_parameter(name)[0] for name, shape in shapes.items() if len(shape) > 1]
            paths = [name.split("/")[-1].removeprefix("model.diffusion_model.") for name in names if is_model(name)]
            flat = spell.endswith("_{}")
            found, _ = families_by_names(spell.format(flatten(name) if flat else name) for name in paths)
            if family in UNTOLD or not paths:
                assert found == set(), path.name
            else:
                assert family in found or (family == "language-model" and not found), path.name


def is_model(name: str) -> bool:
    """True for tensors of the UNet, the transformer or the language model in a list of names."""
    others = ("first_stage_model", "conditioner", "cond_stage_model", "text_encoder", "vae", "model_ema")
    return not name.startswith(others)


class TestHints:
    @pytest.mark.parametrize(
        ("module", "shape", "family"),
        [
            ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", (4, 768), "sd1"),
            ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", (4, 1024), "sd2"),
            ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", (4, 2048), "sdxl"),
            ("lora_unet_down_blocks_0_attentions_0_proj_in", (4, 320, 1, 1), "sd1"),
            ("lora_unet_double_blocks_0_img_attn_qkv", (4, 3072), "flux"),
            ("lora_unet_double_blocks_19_img_attn_qkv", (4, 3072), "hunyuan-video"),
            ("lora_unet_double_blocks_0_img_attn_qkv", (4, 6144), "flux2"),
            ("lora_unet_layers_0_attention_qkv", (4, 3840), "z-image"),
            ("lora_unet_layers_0_attention_qkv", (4, 2304), "lumina2"),
            ("transformer.transformer_blocks.0.attn.add_q_proj", (4, 1536), "sd3"),
            ("transformer.transformer_blocks.0.attn2.to_k", (4, 2048), None),  # LTX-Video's, not SDXL's
            ("lora_unet_blocks_0_attn_qkv", (4, 1152), "pixart"),
            ("transformer.transformer_blocks.0.attn1.to_q", (4, 2048), "ltxv"),
            ("lora_unet_double_blocks_0_img_attn_qkv", (4, 8), None),
            ("proj_out", (4,), None),
        ],
    )
    def test_widths(self, module: str, shape: tuple[int, ...], family: str | None) -> None:
        assert family_by_shapes({module: shape}) == family

    @pytest.mark.parametrize(
        ("metadata", "family"),
        [
            ({"ss_base_model_version": "sd_v1"}, "sd1"),
            ({"ss_base_model_version": "sd_1.5"}, "sd1"),
            ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
            ({"ss_base_model_version": "flux1"}, "flux"),
            ({"ss_base_model_version": "flux2"}, "flux2"),
            ({"ss_base_model_version": "qwen_image"}, "qwen-image"),
            ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
            ({"modelspec.architecture": "Flux.1-dev/lora"}, "flux"),
            ({"modelspec.architecture": "stable-diffusion-3-m"}, "sd3"),
            ({"ss_base_model_version": "", "modelspec.architecture": "wan2.1"}, "wan"),
            ({"ss_v2": "True"}, "sd2"),
            ({"ss_v2": "False"}, None),
            ({"modelspec.architecture": "something else"}, None),
            ({}, None),
        ],
    )
    def test_metadata(self, metadata: dict[str, str], family: str | None) -> None:
        assert family_by_metadata(metadata) == family


class TestTrainers:
    @pytest.mark.parametrize(
        ("key", "metadata", "trainer"),
        [
            ("lora_unet_x.lora_up.weight", {"ot_revision": "1"}, "OneTrainer"),
            ("lora_unet_x.lora_up.weight", {"software": '{"name": "ai-toolkit"}'}, "ai-toolkit"),
            ("lora_unet_x.lora_up.weight", {"ss_network_module": "lycoris.kohya"}, "LyCORIS in kohya sd-scripts"),
            ("lora_unet_x.lora_up.weight", {"ss_network_module": "networks.lora_flux"}, "kohya sd-scripts"),
            ("lora_unet_x.lora_up.weight", {"ss_network_module": "networks.lora_wan"}, "musubi-tuner"),
            ("transformer.x.lora_A.weight", {"lora_adapter_metadata": "{}"}, "diffusers"),
            ("unet:0:up", {}, "cloneofsimo/lora"),
            ("lora_prior_unet_x.lora_up.weight", {}, "OneTrainer"),
            ("bundle_emb.cat.clip_l", {}, "OneTrainer"),
            ("single_blocks.0.processor.qkv_lora.up.weight", {}, "XLabs"),
            ("single_blocks.0.norm.key_norm.scale", {}, "Black Forest Labs"),
            ("pipe.dit.blocks.0.x.lora_A.weight", {}, "DiffSynth-Studio"),
            ("blocks.0.x.lora_A.default.weight", {}, "DiffSynth-Studio"),
            ("model.layers.0.x.lora_a", {}, "MLX"),
            ("base_model.model.x.lora_A.weight", {"format": "pt"}, "PEFT"),
            ("base_model.model.x.lora_A.default.weight", {}, "PEFT"),
            ("lora_unet__blocks_0_x.lora_up.weight", {}, "VideoX-Fun"),
            ("lora_unet_x.hada_w1_a", {}, "LyCORIS"),
            ("lora_unet_blocks_0_self_attn_q.lora_up.weight", {}, "musubi-tuner"),
            ("lora_te1_x.lora_up.weight", {}, "kohya sd-scripts"),
            ("oft_unet_x.oft_blocks", {}, "kohya sd-scripts"),
            ("x.attn1.processor.to_q_lora.up.weight", {}, "diffusers before 0.18"),
            ("unet.x.lora.up.weight", {}, "diffusers"),
            ("x.lora_up.weight", {}, None),
        ],
    )
    def test_a_guess_from_metadata_and_names(self, key: str, metadata: dict[str, str], trainer: str | None) -> None:
        assert trainer_of([key], metadata) == trainer

    @pytest.mark.parametrize(
        ("key", "names"),
        [
            ("lycoris_x.lokr_w1", "SimpleTuner"),
            ("diffusion_model.x.lora_A.weight", "ai-toolkit"),
            ("transformer.x.lora_A.weight", "diffusers"),
        ],
    )
    def test_names_that_several_write(self, key: str, names: str) -> None:
        assert names in (trainer_of([key], {}) or "")


class TestPublishedAdapters:
    @pytest.mark.parametrize(
        ("name", "families", "trainer"),
        [
            ("flux_lora_kohya", FLUX - {"chroma"}, "kohya sd-scripts"),
            ("flux_lora_diffusers", FLUX - {"chroma"}, "diffusers, or ai-toolkit"),
            ("flux_dora_onetrainer", FLUX, "OneTrainer"),
            ("qwen_image_lora_diffusers", JOINT, None),
        ],
    )
    def test_every_key_of_a_published_list_is_a_factor_of_a_known_place(
        self, shared: Path, name: str, families: set[str], trainer: str | None
    ) -> None:
        content = json.loads((shared / "data" / "keys" / f"{name}.json").read_text())
        keys = list(content.get("tensors", content))
        split = [split_key(key) for key in keys]
        assert None not in split
        modules = dict.fromkeys(found[0] for found in split if found is not None)
        assert {found[1].factor for found in split if found is not None} <= {"up", "down", "alpha", "magnitude"}
        outside = [module for module in modules if not is_text(module)]
        assert families_by_names(outside)[0] == families
        guess = trainer_of(keys, {})
        assert guess is None if trainer is None else (guess or "").startswith(trainer)

    def test_the_t5_of_a_flux_lora_is_not_taken_for_a_second_clip(self, shared: Path) -> None:
        content = json.loads((shared / "data" / "keys" / "flux_dora_onetrainer.json").read_text())
        modules = {split_key(key)[0] for key in content.get("tensors", content) if key.startswith("lora_te2_")}
        assert modules
        assert all("te3" in addresses(module)[0].components for module in modules)

    def test_every_key_the_trainers_own_code_wrote_is_known(self, shared: Path) -> None:
        folders = sorted(path.parent for path in (shared / "cases").glob("*/case.json"))
        assert folders
        for folder in folders:
            case = json.loads((folder / "case.json").read_text())
            peft = "adapter_config.json" in case["adapter"]
            file = open_adapter(folder if peft else folder / case["adapter"][0]).file
            unknown = [key for key in file.tensors if split_key(key) is None and split_value(key) is None]
            assert unknown == [], folder.name
            assert trainer_of(file.tensors, file.metadata) is not None, folder.name


def is_text(module: str) -> bool:
    return any(name.startswith("te") for name in addresses(module)[0].components)
