"""Adapters: modules, scales, dialects, families, and what is no adapter at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import kohya_lora, peft_lora
from names import small
from support import KOHYA_LORA, random, save, save_torch

from bake.errors import InputError, NonFinite, UnmatchedModules, Unsupported
from bake.identify.adapter import identify_adapter, is_adapter
from bake.io.adapter import open_adapter

UP, DOWN = random(0, 4, 2).astype(np.float32), random(1, 2, 6).astype(np.float32)
ONE = {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": UP}
PAIR = {**ONE, "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": DOWN}


def identify(path: Path):
    return identify_adapter(open_adapter(path))


def only_update(adapter):
    ((update,),) = (module.updates for module in adapter.modules)
    return update


class TestScale:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
    def test_alpha_over_rank_in_any_dtype(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensors = {name: torch.from_numpy(array) for name, array in PAIR.items()}
        tensors["lora_unet_mid_block_attentions_0_proj_in.alpha"] = torch.tensor(8, dtype=dtype)
        assert only_update(identify(save_torch(tmp_path / "a.safetensors", tensors))).scale == 4.0

    def test_no_alpha_means_scale_one_and_a_note(self, tmp_path: Path) -> None:
        adapter = identify(save(tmp_path / "a.safetensors", PAIR))
        assert only_update(adapter).scale == 1.0
        assert adapter.notes == ("no alpha stored for 1 of 1 modules: alpha / rank taken as 1",)

    def test_alpha_zero_is_taken_literally_and_noted(self, tmp_path: Path) -> None:
        alpha = {"lora_unet_mid_block_attentions_0_proj_in.alpha": np.zeros((), np.float16)}
        adapter = identify(save(tmp_path / "a.safetensors", {**PAIR, **alpha}))
        assert only_update(adapter).scale == 0.0
        assert "alpha is 0" in adapter.notes[0]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_alpha_that_is_no_number_is_refused(self, tmp_path: Path, value: float) -> None:
        alpha = {"lora_unet_mid_block_attentions_0_proj_in.alpha": np.array(value, np.float32)}
        with pytest.raises(NonFinite, match="alpha"):
            identify(save(tmp_path / "a.safetensors", {**PAIR, **alpha}))

    def test_mixed_ranks_have_each_their_own_scale(self, tmp_path: Path) -> None:
        arrays = {}
        for module, rank in (("lora_unet_a", 2), ("lora_unet_b", 8)):
            arrays[f"{module}.lora_up.weight"] = np.ones((4, rank), np.float32)
            arrays[f"{module}.lora_down.weight"] = np.ones((rank, 4), np.float32)
            arrays[f"{module}.alpha"] = np.array(4, np.float32)
        adapter = identify(save(tmp_path / "a.safetensors", arrays))
        assert [module.updates[0].scale for module in adapter.modules] == [2.0, 0.5]
        assert adapter.ranks == (2, 8)

    def test_a_stored_scale_replaces_alpha_over_rank(self, tmp_path: Path) -> None:
        extra = {"lora_unet_mid_block_attentions_0_proj_in.scale": np.array(0.25, np.float32)}
        assert only_update(identify(save(tmp_path / "a.safetensors", {**PAIR, **extra}))).scale == 0.25

    def test_diffusers_configuration_in_the_metadata(self, tmp_path: Path) -> None:
        arrays = {"unet.x.to_q.lora_A.weight": DOWN, "unet.x.to_q.lora_B.weight": UP}
        config = json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.r": 4, "text_encoder.lora_alpha": 1})
        path = save(tmp_path / "a.safetensors", arrays, {"lora_adapter_metadata": config})
        assert only_update(identify(path)).scale == 3.0

    @pytest.mark.parametrize("text", ["{", "[]", "3", '{"a": ' + "[" * 100_000])
    def test_configuration_in_the_metadata_that_is_no_object(self, tmp_path: Path, text: str) -> None:
        arrays = {"unet.x.to_q.lora_A.weight": DOWN, "unet.x.to_q.lora_B.weight": UP}
        with pytest.raises(InputError, match="lora_adapter_metadata"):
            identify(save(tmp_path / "a.safetensors", arrays, {"lora_adapter_metadata": text}))


class TestModules:
    def test_weight_and_bias_of_one_module_are_two_updates(self, tmp_path: Path) -> None:
        bias = {"lora_unet_mid_block_attentions_0_proj_in.diff_b": np.ones(4, np.float32)}
        adapter = identify(save(tmp_path / "a.safetensors", {**PAIR, **bias}))
        (module,) = adapter.modules
        assert {(update.parameter, update.algorithm) for update in module.updates} == {
            ("weight", "lora"),
            ("bias", "full"),
        }

    def test_embeddings_of_peft_are_transposed(self, tmp_path: Path) -> None:
        arrays = {"base_model.model.emb.lora_embedding_A": DOWN, "base_model.model.emb.lora_embedding_B": UP}
        assert only_update(identify(save(tmp_path / "a.safetensors", arrays))).transposed

    def test_an_alpha_without_its_pair_is_refused_by_module(self, tmp_path: Path) -> None:
        arrays = {**PAIR, "lora_unet_conv_in.alpha": np.array(1.0)}
        with pytest.raises(InputError, match="conv_in' is incomplete: it has alpha"):
            identify(save(tmp_path / "a.safetensors", arrays))

    @pytest.mark.parametrize("half", ["lora_up", "lora_down"])
    def test_half_a_pair_is_refused_by_module(self, tmp_path: Path, half: str) -> None:
        arrays = {name: array for name, array in PAIR.items() if half in name}
        other = {"lora_unet_conv_in.lora_up.weight": UP, "lora_unet_conv_in.lora_down.weight": DOWN}
        with pytest.raises(InputError, match="proj_in' is incomplete"):
            identify(save(tmp_path / "a.safetensors", {**arrays, **other}))

    def test_an_alpha_without_factors_is_refused(self, tmp_path: Path) -> None:
        lonely = {"lora_unet_conv_in.alpha": np.ones((), np.float32)}
        with pytest.raises(InputError, match="conv_in' is incomplete"):
            identify(save(tmp_path / "a.safetensors", {**PAIR, **lonely}))

    def test_factors_of_different_ranks_are_refused_by_module(self, tmp_path: Path) -> None:
        arrays = {**PAIR, "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": np.ones((4, 3), np.float32)}
        with pytest.raises(InputError, match=r"proj_in'.*differ"):
            identify(save(tmp_path / "a.safetensors", arrays))

    def test_two_spellings_of_one_factor_are_refused(self, tmp_path: Path) -> None:
        arrays = {**PAIR, "lora_unet_mid_block_attentions_0_proj_in.lora_B.weight": UP}
        with pytest.raises(InputError, match="two tensors for up"):
            identify(save(tmp_path / "a.safetensors", arrays))

    def test_a_magnitude_makes_a_lora_a_dora(self, tmp_path: Path) -> None:
        extra = {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": np.ones((4, 1), np.float32)}
        adapter = identify(save(tmp_path / "a.safetensors", {**PAIR, **extra}))
        assert (adapter.algorithms, adapter.transforms) == (("dora (lora)",), True)

    @pytest.mark.parametrize("suffix", ["bias_values", "bias_indices"])
    def test_half_a_sparse_remainder_is_refused(self, tmp_path: Path, suffix: str) -> None:
        extra = {f"lora_unet_mid_block_attentions_0_proj_in.{suffix}": np.ones((4, 1), np.float32)}
        with pytest.raises(InputError, match="lacks bias_"):
            identify(save(tmp_path / "a.safetensors", {**PAIR, **extra}))

    def test_what_a_lora_is_combined_with_is_never_dropped(self, tmp_path: Path) -> None:
        extra = {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": np.ones((4, 1), np.float32)}
        adapter = identify(save(tmp_path / "a.safetensors", {**PAIR, **extra}))
        assert "w1_a" in adapter.refusals[0].message

    @pytest.mark.parametrize(
        ("factors", "algorithm"),
        [
            ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4)}, "loha"),
            ({"lokr_w1": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)}, "lokr"),
            ({"oft_blocks": (2, 2, 2)}, "oft"),
            ({"oft_blocks": (1, 2, 2, 2)}, "boft"),
            ({"a1.weight": (4, 2), "a2.weight": (2, 4), "b1.weight": (4, 2), "b2.weight": (2, 4)}, "glora"),
            ({"weight": (4,), "on_input": ()}, "ia3"),
            ({"oft_R.weight": (2, 1)}, "oft-peft"),
            ({"hra_u": (4, 2)}, "hra"),
            ({"w_norm": (4,)}, "full"),
            ({"set_weight": (4, 4)}, "set"),
        ],
    )
    def test_the_algorithm_is_told_by_the_factors(self, tmp_path: Path, factors, algorithm: str) -> None:
        arrays = {f"lora_unet_mid_block.{name}": np.ones(shape, np.float32) for name, shape in factors.items()}
        adapter = identify(save(tmp_path / "a.safetensors", arrays))
        assert (adapter.algorithms, adapter.refusals) == ((algorithm,), ())

    @pytest.mark.parametrize("module", ["lycoris_proj_out", "transformer.proj_out", "diffusion_model.x.qkv", "x.qkv"])
    def test_the_vector_of_ia3_is_no_stored_weight_in_any_dialect(self, tmp_path: Path, module: str) -> None:
        arrays = {f"{module}.weight": np.ones(4, np.float32), f"{module}.on_input": np.array(0)}
        adapter = identify(save(tmp_path / "a.safetensors", arrays))
        assert (adapter.algorithms, adapter.refusals, adapter.unknown) == (("ia3",), (), ())

    def test_metadata_for_the_whole_file_scales_every_module(self, tmp_path: Path) -> None:
        settings = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6})
        arrays = {"x.to_q.lora_A.weight": np.ones((4, 8)), "x.to_q.lora_B.weight": np.ones((8, 4))}
        path = save(tmp_path / "a.safetensors", arrays, {"lora_adapter_metadata": settings})
        assert identify(path).modules[0].updates[0].scale == 1.5

    @pytest.mark.parametrize(
        ("factors", "algorithm"),
        [
            ({"base_model.model.x.fourierft_spectrum": (4,)}, "FourierFT"),
            (
                {f"lora_unet_x.{f}": (2, 2) for f in ("q_layer.weight", "p_layer.weight", "lambda_layer")},
                "T-LoRA as LyCORIS stores it",
            ),
        ],
    )
    def test_an_algorithm_without_maths_is_named_and_refused(self, tmp_path: Path, factors, algorithm: str) -> None:
        arrays = {name: np.ones(shape, np.float32) for name, shape in factors.items()}
        adapter = identify(save(tmp_path / "a.safetensors", arrays))
        assert adapter.algorithms == (algorithm,)
        assert adapter.refusals[0].exit_code == 6

    def test_tensors_no_format_knows_are_kept_for_the_accounting(self, tmp_path: Path) -> None:
        adapter = identify(save(tmp_path / "a.safetensors", {**PAIR, "mystery": UP}))
        assert adapter.unknown == ("mystery",)

    def test_buffers_without_effect_are_not_unknown(self, tmp_path: Path) -> None:
        buffers = {"text_model.embeddings.position_ids": np.arange(3), "_aux.slider": UP}
        assert identify(save(tmp_path / "a.safetensors", {**PAIR, **buffers})).unknown == ()


class TestFamilies:
    @pytest.mark.parametrize(
        ("modules", "families"),
        [
            (["lora_unet_down_blocks_0_attentions_0_proj_in"], {"sd1", "sd2"}),
            (["lora_unet_up_blocks_3_attentions_0_proj_in"], {"sd1", "sd2"}),
            (["lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"], {"sdxl", "sdxl-refiner"}),
            (["lora_unet_up_blocks_0_attentions_0_transformer_blocks_9_attn1_to_q"], {"sdxl"}),
            (
                ["lora_unet_input_blocks_4_1_proj_in", "lora_te2_text_model_encoder_layers_0_mlp_fc1"],
                {"sdxl", "sdxl-refiner"},
            ),
            (
                [
                    "lora_unet_input_blocks_4_1_proj_in",
                    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
                    "lora_te2_text_model_encoder_layers_0_mlp_fc1",
                ],
                {"sdxl"},
            ),
            (["unet.mid_block.attentions.0.proj_in"], {"sd1", "sd2", "sdxl", "sdxl-refiner"}),
            (["diffusion_model.input_blocks.1.1.proj_in"], {"sd1", "sd2"}),
            (["lora_unet_double_blocks_0_img_attn_qkv"], {"flux", "chroma", "flux2", "hunyuan-video"}),
            (["transformer.joint_transformer_blocks.0.attn.to_q"], {"auraflow"}),
            (["base_model.model.model.layers.0.self_attn.q_proj"], {"language-model"}),
            (["lora_te_text_model_encoder_layers_0_mlp_fc1"], set()),
            (["base_model.model.encoder.layer.0.attention.self.query"], set()),
        ],
    )
    def test_blocks_tell_the_family(self, tmp_path: Path, modules: list[str], families: set[str]) -> None:
        arrays = {}
        for module in modules:
            arrays |= {f"{module}.lora_up.weight": UP, f"{module}.lora_down.weight": DOWN}
        assert identify(save(tmp_path / "a.safetensors", arrays)).families == families

    def test_metadata_and_widths_are_hints(self, tmp_path: Path) -> None:
        arrays, _ = kohya_lora(small("sd1"))
        adapter = identify(save(tmp_path / "a.safetensors", arrays, {"ss_base_model_version": "sd_v1"}))
        assert (adapter.family_hint, adapter.family) == ("sd1", "sd1")
        module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
        wide = {f"{module}.lora_A.weight": np.ones((2, 1024)), f"{module}.lora_B.weight": np.ones((320, 2))}
        assert identify(save(tmp_path / "b.safetensors", wide)).family == "sd2"

    def test_the_shipped_lora_speaks_kohya(self) -> None:
        adapter = identify(KOHYA_LORA)
        assert adapter.dialects == ("kohya",)
        assert adapter.algorithms == ("lora",)


class TestOtherFiles:
    @pytest.mark.parametrize(
        ("names", "kind"),
        [
            (["string_to_param.*"], "textual inversion"),
            (["emb_params"], "textual inversion"),
            (["clip_l", "clip_g"], "textual inversion"),
            (["<s1>"], "textual inversion"),
            (["lllite_unet_input_blocks_1_1.conditioning1.0.weight"], "ControlNet-LLLite"),
            (["control_model.input_hint_block.0.weight"], "ControlNet"),
            (["lora_controlnet", "input_blocks.0.0.weight"], "ControlNet"),
            (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "IP-Adapter"),
            (["down_blocks.0.motion_modules.0.temporal.weight"], "motion module"),
            (["768.0.linear.0.weight"], "hypernetwork"),
            (["w_a_000", "w_b_000"], "SAM"),
            (["model.diffusion_model.input_blocks.0.0.weight"], "a checkpoint"),
            (["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"], "a checkpoint"),
            (["encoder.down.0.block.0.conv1.weight"], "a VAE"),
        ],
    )
    def test_what_is_no_lora_is_refused_by_what_it_is(self, tmp_path: Path, names: list[str], kind: str) -> None:
        source = open_adapter(save(tmp_path / "a.safetensors", {name: np.ones((2, 2)) for name in names}))
        assert not is_adapter(source)
        with pytest.raises(Unsupported, match=kind):
            identify_adapter(source)

    def test_an_ip_adapter_with_lora_layers_is_still_an_ip_adapter(self, tmp_path: Path) -> None:
        arrays = {"0.to_q_lora.up.weight": UP, "0.to_q_lora.down.weight": DOWN, "image_proj.norm.weight": UP}
        with pytest.raises(Unsupported, match="IP-Adapter"):
            identify(save(tmp_path / "a.safetensors", arrays))

    def test_a_file_of_unknown_names_is_unmatched(self, tmp_path: Path) -> None:
        with pytest.raises(UnmatchedModules, match=r"none of its 1 tensors.*'thing'"):
            identify(save(tmp_path / "a.safetensors", {"thing": UP}))

    def test_an_empty_file_is_unmatched(self, tmp_path: Path) -> None:
        with pytest.raises(UnmatchedModules):
            identify(save(tmp_path / "a.safetensors", {}))


class TestNumbered:
    def test_embeddings_in_the_file_are_named(self, tmp_path: Path) -> None:
        arrays = {"unet:0:up": UP, "unet:0:down": DOWN, "<s1>": np.ones(6, np.float32)}
        adapter = identify(save(tmp_path / "a.safetensors", arrays))
        assert adapter.embeddings == ("<s1>",)
        assert adapter.dialects == ("cloneofsimo",)

    def test_a_list_of_one_width_is_a_text_encoder(self, tmp_path: Path) -> None:
        torch.save([torch.ones(6, 2), torch.ones(2, 6)] * 2, tmp_path / "a.pt")
        adapter = identify(tmp_path / "a.pt")
        assert [module.name for module in adapter.modules] == ["text_encoder:0", "text_encoder:1"]

    def test_a_list_of_several_widths_is_a_unet(self, tmp_path: Path) -> None:
        torch.save([torch.ones(6, 2), torch.ones(2, 6), torch.ones(12, 2), torch.ones(2, 6)], tmp_path / "a.pt")
        assert [module.name for module in identify(tmp_path / "a.pt").modules] == ["unet:0", "unet:1"]

    @pytest.mark.parametrize("tensors", [[torch.ones(6, 2)], [torch.ones(6), torch.ones(6)]])
    def test_a_list_that_is_not_pairs_is_refused(self, tmp_path: Path, tensors) -> None:
        torch.save(tensors, tmp_path / "a.pt")
        with pytest.raises(InputError, match="not pairs"):
            identify(tmp_path / "a.pt")


def test_peft_files_without_configuration_have_scale_one(tmp_path: Path) -> None:
    arrays = peft_lora({"x.weight": (4, 6)}, ["x.weight"])
    adapter = identify(save(tmp_path / "adapter_model.safetensors", arrays))
    assert only_update(adapter).scale == 1.0
    assert adapter.dialects == ("peft",)
