"""Planning: accounting, refusals, layout of the output."""

from __future__ import annotations

import json
import os
from pathlib import Path

import dits
import numpy as np
import pytest
import torch
from models import (
    SD1_MODULES,
    UNET,
    kohya_lora,
    llama,
    lora_factors,
    peft_lora,
    random_arrays,
    save_base,
    sd1_pair,
)
from names import small
from support import load, random, save, save_torch

from bake.api import build_plan
from bake.errors import (
    DuplicateTarget,
    FamilyMismatch,
    InputError,
    ShapeMismatch,
    UnmatchedModules,
    Unsupported,
    UsageError,
)
from bake.plan.model import Coverage
from bake.plan.recipe import AdapterChoice


def terms(plan) -> dict[str, list]:
    return {tensor.name: list(tensor.terms) for _, tensor in plan.tensors() if tensor.terms}


class TestAccounting:
    def test_every_module_finds_its_tensor(self, tmp_path: Path) -> None:
        base, lora, deltas = sd1_pair(tmp_path)
        plan = build_plan(base, [(lora, 0.8)])
        assert plan.components == {"unet": Coverage(5, 5), "te1": Coverage(1, 1)}
        assert set(terms(plan)) == set(deltas)
        assert all(term.scale * term.weight == pytest.approx(0.4) for found in terms(plan).values() for term in found)

    def test_an_unmatched_module_refuses_the_whole_bake(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        arrays = {name: array.astype(np.float16) for name, array in load(lora).items()}
        for name in list(arrays):
            arrays[name.replace("mid_block_attentions_0_proj_in", "mid_block_attentions_0_proj_inn")] = arrays.pop(name)
        save(lora, arrays)
        with pytest.raises(UnmatchedModules) as caught:
            build_plan(base, [lora])
        error = caught.value
        assert error.exit_code == 4
        assert error.details["matched"] == 5
        assert error.details["components"] == {"unet": {"matched": 4, "total": 5}, "te1": {"matched": 1, "total": 1}}
        (entry,) = error.details["unmatched"]
        assert entry["module"] == "lora_unet_mid_block_attentions_0_proj_inn"
        assert entry["adapter"] == "style.safetensors"
        assert entry["nearest"] == "mid_block_attentions_0_proj_in"
        assert "--allow-unmatched" in error.message

    def test_allow_unmatched_fuses_the_rest_and_lists_what_is_left(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path, modules={**SD1_MODULES})
        arrays = {name.replace("_proj_in.", "_proj_out_of_space."): a for name, a in load(lora).items()}
        save(lora, {name: array.astype(np.float16) for name, array in arrays.items()})
        plan = build_plan(base, [lora], allow_unmatched=True)
        assert plan.components["unet"] == Coverage(4, 5)
        assert [entry.module for entry in plan.unmatched] == ["lora_unet_mid_block_attentions_0_proj_out_of_space"]

    def test_nothing_matched_is_refused_even_if_allowed(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base.safetensors")
        up, down = lora_factors((4, 4))
        lora = save(
            tmp_path / "a.safetensors", {"lora_unet_x.lora_up.weight": up, "lora_unet_x.lora_down.weight": down}
        )
        with pytest.raises(UnmatchedModules, match="Nothing at all matched"):
            build_plan(base, [lora], allow_unmatched=True)

    def test_text_encoder_modules_without_a_text_encoder_name_the_remedy(self, tmp_path: Path) -> None:
        _, lora, _ = sd1_pair(tmp_path)
        unet = save(tmp_path / "unet.safetensors", random_arrays({n: s for n, s in small("sd1").items() if UNET in n}))
        with pytest.raises(UnmatchedModules, match=r"no te1\. .*--also FILE.*--only unet"):
            build_plan(unet, [lora])
        plan = build_plan(unet, [lora], only=["unet"])
        assert plan.components == {"unet": Coverage(5, 5)}
        assert [(entry.component, entry.modules) for entry in plan.skipped] == [("te1", 1)]

    def test_leaving_everything_out_is_refused(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        with pytest.raises(UnmatchedModules, match="left out: --only vae"):
            build_plan(base, [lora], only=["vae"])

    def test_unknown_tensors_are_unmatched(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        save(lora, {**{n: a.astype(np.float16) for n, a in load(lora).items()}, "mystery": np.ones(3)})
        with pytest.raises(UnmatchedModules, match="no adapter format uses this tensor name"):
            build_plan(base, [lora])

    def test_a_bias_the_base_lacks_is_unmatched(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        save(lora, {**{n: a.astype(np.float16) for n, a in load(lora).items()}, f"{module}.diff_b": np.ones(8)})
        with pytest.raises(UnmatchedModules, match="the base has no bias"):
            build_plan(base, [lora])


class TestWeights:
    def test_te_and_unet_have_weights_of_their_own(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        plan = build_plan(base, [AdapterChoice(lora, 2.0, te=-1.0, unet=3.0)])
        scales = {name.partition(".")[0]: found[0].scale * found[0].weight for name, found in terms(plan).items()}
        assert scales == {"model": 1.5, "cond_stage_model": -0.5}

    def test_weight_zero_leaves_the_adapter_out_unread(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        plan = build_plan(base, [(lora, 0.0), (tmp_path / "not there.safetensors", 0.0)])
        assert terms(plan) == {}
        assert plan.adapters == ()
        assert "left out, its weight is 0" in plan.notes[0]

    def test_weight_zero_for_one_component_skips_its_modules(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        plan = build_plan(base, [AdapterChoice(lora, 1.0, te=0.0)])
        assert [(e.component, e.modules, e.reason) for e in plan.skipped] == [("te1", 1, "its weight is 0")]

    def test_the_same_lora_twice_gives_two_terms(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        plan = build_plan(base, [(lora, 0.25), (lora, 0.5)])
        assert all([term.scale * term.weight for term in found] == [0.125, 0.25] for found in terms(plan).values())

    def test_the_order_of_adapters_changes_nothing_in_the_plan(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        arrays, _ = kohya_lora(small("sd1"), seed=77)
        other = save(tmp_path / "aaa.safetensors", arrays)
        one, two = build_plan(base, [(lora, 0.5), other]), build_plan(base, [other, (lora, 0.5)])
        assert one.to_json() == two.to_json()

    @pytest.mark.parametrize("weight", [float("nan"), float("inf")])
    def test_weights_must_be_finite(self, tmp_path: Path, weight: float) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        with pytest.raises(UsageError, match="finite"):
            build_plan(base, [(lora, weight)])

    def test_only_takes_components_the_base_has(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        with pytest.raises(UsageError, match="it has unet, te1, vae"):
            build_plan(base, [lora], only=["te2"])
        assert build_plan(base, [lora], only=["te"]).components == {"te1": Coverage(1, 1)}


class TestMismatches:
    def test_another_family_names_both(self, tmp_path: Path) -> None:
        _, lora, _ = sd1_pair(tmp_path)
        sdxl = save_base(tmp_path / "xl.safetensors", "sdxl")
        with pytest.raises(FamilyMismatch, match=r"Stable Diffusion 1.*Stable Diffusion XL") as caught:
            build_plan(sdxl, [lora])
        assert caught.value.exit_code == 5

    def test_a_language_models_adapter_on_an_image_model(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base.safetensors")
        lora = save(tmp_path / "a.safetensors", peft_lora(llama(), ["model.layers.0.self_attn.q_proj.weight"]))
        with pytest.raises(FamilyMismatch, match="language model"):
            build_plan(base, [lora])
        llm = save(tmp_path / "llm.safetensors", random_arrays(llama()))
        arrays, _ = kohya_lora(small("sd1"))
        with pytest.raises(FamilyMismatch, match="Stable Diffusion 1"):
            build_plan(llm, [save(tmp_path / "b.safetensors", arrays)])

    def test_another_width_lists_both_shapes(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base.safetensors")
        up, down = lora_factors((16, 16))
        module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
        lora = save(tmp_path / "a.safetensors", {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down})
        with pytest.raises(ShapeMismatch, match=r"the update is 16 x 16, .*attn2.to_k.weight is \[16, 8\]"):
            build_plan(base, [lora])

    def test_real_widths_name_the_family(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base.safetensors")
        module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
        factors = {f"{module}.lora_up.weight": np.ones((16, 1)), f"{module}.lora_down.weight": np.ones((1, 1024))}
        with pytest.raises(FamilyMismatch, match=r"looks made for Stable Diffusion 2.*the base is Stable Diffusion 1"):
            build_plan(base, [save(tmp_path / "a.safetensors", factors)])

    def test_swapped_factors_are_hinted_at(self, tmp_path: Path) -> None:
        base = save(tmp_path / "base.safetensors", {"layer.weight": random(0, 4, 6)})
        factors = {"layer.lora_A.weight": random(1, 2, 4), "layer.lora_B.weight": random(2, 6, 2)}
        with pytest.raises(ShapeMismatch, match="would fit transposed"):
            build_plan(base, [save(tmp_path / "a.safetensors", factors)])

    def test_linear_factors_fit_a_1x1_convolution_and_the_reverse(self, tmp_path: Path) -> None:
        base = save(
            tmp_path / "base.safetensors", {"conv.weight": random(0, 4, 6, 1, 1), "linear.weight": random(0, 4, 6)}
        )
        factors = {
            **{"conv.lora_A.weight": random(1, 2, 6), "conv.lora_B.weight": random(2, 4, 2)},
            **{"linear.lora_A.weight": random(1, 2, 6, 1, 1), "linear.lora_B.weight": random(2, 4, 2, 1, 1)},
        }
        assert len(terms(build_plan(base, [save(tmp_path / "a.safetensors", factors)]))) == 2

    def test_two_modules_for_one_tensor_are_refused_if_they_differ(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        arrays = {name: array.astype(np.float16) for name, array in load(lora).items()}
        ours = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        theirs = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        copies = {name.replace(ours, theirs): array for name, array in arrays.items() if ours in name}
        same = build_plan(base, [save(lora, {**arrays, **copies})])
        assert len(terms(same)) == 6
        assert "stored twice" in same.notes[-1]
        changed = {name: array + 1 for name, array in copies.items()}
        with pytest.raises(DuplicateTarget, match="contradicts itself"):
            build_plan(base, [save(lora, {**arrays, **changed})])

    @pytest.mark.parametrize("zero_first", [True, False])
    def test_zeros_beside_what_was_trained_contradict_nothing(self, tmp_path: Path, zero_first: bool) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        ours = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        theirs = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        arrays = {name: array for name, array in load(lora).items() if ours in name}
        copies = {
            name.replace(ours, theirs): np.zeros_like(array) if "lora_up" in name else array
            for name, array in arrays.items()
        }
        both = {**copies, **arrays}
        if not zero_first:
            swap = {ours: theirs, theirs: ours}
            both = {swap[name.partition(".")[0]] + name[name.index(".") :]: array for name, array in both.items()}
        ((term,),) = terms(build_plan(base, [save(lora, both)])).values()
        assert term.module == (ours if zero_first else theirs)

    @pytest.mark.parametrize("spelling", ["to_", "to."])
    def test_of_a_z_image_projection_stored_whole_and_in_parts_the_parts_count(self, tmp_path: Path, spelling) -> None:
        base = save(tmp_path / "base.safetensors", random_arrays(dits.z_image()))
        attention = "diffusion_model.layers.0.attention."
        arrays = {}
        for seed, (name, height) in enumerate({"qkv": 24, **{f"{spelling}{part}": 8 for part in "qkv"}}.items()):
            up, down = lora_factors((height, 8), seed=seed)
            arrays |= {f"{attention}{name}.lora.up.weight": up, f"{attention}{name}.lora.down.weight": down}
        plan = build_plan(base, [save(tmp_path / "a.safetensors", arrays)])
        (found,) = terms(plan).values()
        assert sorted(term.module for term in found) == [f"{attention}{spelling}{part}" for part in "kqv"]
        assert [(skipped.modules, skipped.reason) for skipped in plan.skipped] == [
            (1, "q, k and v are stored one by one as well")
        ]

    def test_plain_loras_on_the_wider_input_of_an_inpainting_model(self, tmp_path: Path) -> None:
        wide = {UNET + "input_blocks.0.0.weight": random(0, 4, 9, 3, 3).astype(np.float16)}
        base = save(tmp_path / "base.safetensors", random_arrays(small("sd1")) | wide)
        up, down = lora_factors((4, 4, 3, 3))
        lora = save(
            tmp_path / "a.safetensors",
            {"lora_unet_conv_in.lora_up.weight": up, "lora_unet_conv_in.lora_down.weight": down},
        )
        ((term,),) = terms(build_plan(base, [lora])).values()
        assert (term.rows, term.columns) == ((0, 4), (0, 36))


class TestLayouts:
    def test_projections_of_an_openclip_encoder_are_rows_of_one_tensor(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "xl.safetensors", "sdxl")
        arrays = {}
        for projection in ("q_proj", "k_proj", "v_proj"):
            module = f"lora_te2_text_model_encoder_layers_5_self_attn_{projection}"
            up, down = lora_factors((8, 8))
            arrays |= {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
        found = terms(build_plan(base, [save(tmp_path / "a.safetensors", arrays)]))
        (rows,) = ([term.rows for term in each] for each in found.values())
        assert sorted(rows) == [(0, 8), (8, 16), (16, 24)]

    def test_gpt2_weights_are_stored_transposed(self, tmp_path: Path) -> None:
        shapes = {"h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_proj.weight": (4, 4), "wte.weight": (9, 4)}
        base = save(tmp_path / "base.safetensors", random_arrays(shapes, np.float32))
        logical = {"transformer.h.0.attn.c_attn.weight": (12, 4), "transformer.h.0.attn.c_proj.weight": (4, 4)}
        plan = build_plan(base, [save(tmp_path / "a.safetensors", peft_lora(logical, logical))])
        assert all(term.transposed for found in terms(plan).values() for term in found)

    def test_square_weights_follow_the_configuration(self, tmp_path: Path) -> None:
        base = save(tmp_path / "base.safetensors", {"layer.weight": random(0, 4, 4)})
        folder = tmp_path / "adapter"
        save(folder / "adapter_model.safetensors", peft_lora({"layer.weight": (4, 4)}, ["layer.weight"]))
        for flag in (True, False):
            config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": flag}
            (folder / "adapter_config.json").write_text(json.dumps(config))
            ((term,),) = terms(build_plan(base, [folder])).values()
            assert term.transposed is flag

    def test_every_tensor_of_the_base_is_in_the_output_once(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        (file,) = build_plan(base, [lora]).files
        assert {tensor.name for tensor in file.tensors} == set(small("sd1"))
        end = 0
        for tensor in file.tensors:
            assert tensor.span[0] == end
            end = tensor.span[1]

    def test_dtype_converts_floats_and_leaves_integers_and_markers(self, tmp_path: Path) -> None:
        marker = {"v_pred": np.zeros(0, np.float32), "sigma": np.ones((), np.float32)}
        base = save(tmp_path / "base.safetensors", random_arrays(small("sd1"), np.float32) | marker)
        arrays, _ = kohya_lora(small("sd1"))
        plan = build_plan(base, [save(tmp_path / "a.safetensors", arrays)], dtype="bf16")
        dtypes = {tensor.name: tensor.dtype for _, tensor in plan.tensors()}
        assert (dtypes["v_pred"], dtypes["sigma"]) == ("F32", "F32")
        assert dtypes["cond_stage_model.transformer.text_model.embeddings.position_ids"] == "I64"
        assert dtypes[UNET + "out.2.weight"] == "BF16"

    def test_the_configuration_of_a_folder_follows_the_dtype(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        save(folder / "model.safetensors", random_arrays(llama(), np.float32))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32"}))
        lora = save(tmp_path / "a.safetensors", peft_lora(llama(), ["model.layers.0.self_attn.q_proj.weight"]))
        (side,) = build_plan(folder, [lora], dtype="bf16").side_files
        assert json.loads(side.content or "") == {"model_type": "llama", "torch_dtype": "bfloat16"}
        (side,) = build_plan(folder, [lora]).side_files
        assert side.source == folder / "config.json"

    def test_shard_indexes_come_last_with_the_new_size(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shapes = llama()
        names = sorted(shapes)
        index = {}
        for number, part in enumerate((names[:5], names[5:]), 1):
            shard = f"model-0000{number}-of-00002.safetensors"
            save(folder / shard, random_arrays({name: shapes[name] for name in part}, np.float32))
            index |= dict.fromkeys(part, shard)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
        )
        (folder / "config.json").write_text('{"model_type": "llama"}')
        lora = save(tmp_path / "a.safetensors", peft_lora(shapes, ["model.layers.0.self_attn.q_proj.weight"]))
        plan = build_plan(folder, [lora], dtype="bf16")
        last = plan.side_files[-1]
        assert last.relative == "model.safetensors.index.json"
        assert json.loads(last.content or "")["metadata"]["total_size"] == plan.data_bytes
        assert sum(file.is_recorded for file in plan.files) == 1


def test_averaged_weights_in_the_base_are_copied_and_mentioned(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    assert not build_plan(base, [lora]).notes
    ema = {"model_ema.diffusion_modelinput_blocks00weight": random(0, 4, 4, 3, 3).astype(np.float16)}
    with_ema = save(tmp_path / "ema.safetensors", random_arrays(small("sd1")) | ema)
    assert "model_ema" in build_plan(with_ema, [lora]).notes[0]


class TestUnsupported:
    @pytest.mark.parametrize(
        ("extra", "kind"),
        [
            ("layer.weight.absmax", "bitsandbytes"),
            ("layer.qweight", "GPTQ"),
            ("layer.scale_weight", "scaled fp8"),
            ("layer.weight_scale_2", "NVFP4"),
            ("layer.gate_up_proj_blocks", "MXFP4"),
        ],
    )
    def test_quantised_bases_are_refused_by_name_with_the_remedy(self, tmp_path: Path, extra: str, kind: str) -> None:
        base = save(tmp_path / "base.safetensors", {"layer.weight": random(0, 4, 4), extra: np.ones(2, np.float32)})
        lora = save(tmp_path / "a.safetensors", peft_lora({"layer.weight": (4, 4)}, ["layer.weight"]))
        with pytest.raises(Unsupported, match=rf"{kind}.*(16-bit|bf16|BF16|Dequantise)"):
            build_plan(base, [lora])

    def test_integers_are_no_place_for_an_update(self, tmp_path: Path) -> None:
        base = save(tmp_path / "base.safetensors", {"layer.weight": np.ones((4, 4), np.int8)})
        lora = save(tmp_path / "a.safetensors", peft_lora({"layer.weight": (4, 4)}, ["layer.weight"]))
        with pytest.raises(Unsupported, match="stored as I8"):
            build_plan(base, [lora])

    def test_plain_fp8_is_a_float_like_others(self, tmp_path: Path) -> None:
        values = torch.randn(4, 4).to(torch.float8_e4m3fn)
        base = save_torch(tmp_path / "base.safetensors", {"layer.weight": values})
        lora = save(tmp_path / "a.safetensors", peft_lora({"layer.weight": (4, 4)}, ["layer.weight"]))
        assert len(terms(build_plan(base, [lora]))) == 1

    def test_an_embedding_that_is_also_the_head_is_stored_apart_from_it(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shapes = {name: shape for name, shape in llama().items() if "lm_head" not in name}
        save(folder / "model.safetensors", random_arrays(shapes))
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config))
        factors = {
            "base_model.model.model.embed_tokens.lora_embedding_A": random(0, 2, 16),
            "base_model.model.model.embed_tokens.lora_embedding_B": random(1, 8, 2),
        }
        plan = build_plan(folder, [save(tmp_path / "a.safetensors", factors)])
        added = next(tensor for _, tensor in plan.tensors() if tensor.name == "lm_head.weight")
        assert (added.source.name, added.terms) == ("model.embed_tokens.weight", ())
        (config,) = (side for side in plan.side_files if side.relative == "config.json")
        assert json.loads(config.content)["tie_word_embeddings"] is False


class TestNumbered:
    def test_a_list_for_a_unet_of_another_size_is_unmatched(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base.safetensors")
        torch.save([torch.ones(4, 1), torch.ones(1, 4), torch.ones(8, 1), torch.ones(1, 4)], tmp_path / "a.pt")
        with pytest.raises(UnmatchedModules, match="their count fits no unet"):
            build_plan(base, [tmp_path / "a.pt"])

    def test_a_text_encoder_beside_a_list_is_mentioned(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base.safetensors")
        pairs = [tensor for _ in range(48) for tensor in (torch.ones(8, 1), torch.ones(1, 8))]
        torch.save(pairs, tmp_path / "a.text_encoder.pt")
        assert build_plan(base, [tmp_path / "a.text_encoder.pt"]).components == {"te1": Coverage(48, 48)}


def test_unreadable_inputs_are_input_errors(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    with pytest.raises(InputError):
        build_plan(tmp_path / "no.safetensors", [lora])
    with pytest.raises(InputError):
        build_plan(base, [tmp_path / "no.safetensors"])


def test_planning_closes_every_file(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    base, lora, _ = sd1_pair(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    build_plan(base, [lora])
    with pytest.raises(UsageError):
        build_plan(base, [lora], only=["te3"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_transforms_are_applied_in_the_order_of_the_user_and_sums_in_one_of_their_own(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", {"layer.weight": random(0, 4, 4)})
    loras = [
        save(
            tmp_path / f"{n}.safetensors",
            {"layer.lora_A.weight": random(n, 2, 4), "layer.lora_B.weight": random(9, 4, 2)},
        )
        for n in (1, 2)
    ]
    rotation = save(tmp_path / "oft.safetensors", {"layer.oft_blocks": random(3, 2, 2, 2)})

    def order(*adapters: Path) -> list[str]:
        return [use.name for use in build_plan(base, adapters).adapters]

    assert order(*loras) == order(*reversed(loras))
    for chosen in ((loras[0], rotation, loras[1]), (loras[1], loras[0], rotation)):
        assert order(*chosen) == [path.name for path in chosen]
