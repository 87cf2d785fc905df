"""Which dtype a tensor gets, and what lies beside scaled weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import llama, peft_lora, random_arrays, save_base, sd1_pair
from scaled import PLAIN, SHAPES, TOUCHED, plain_tensors, scaled_base
from support import save, save_torch

from bake.api import build_plan
from bake.dtypes import OUTPUT_DTYPES
from bake.errors import InputError, UnmatchedModules, Unsupported, UsageError
from bake.keys.scaled import WRITTEN
from bake.plan.model import Plan, TensorPlan
from bake.plan.recipe import Recipe

SCALED_NAMES = sorted(WRITTEN)


def tensors(plan: Plan) -> dict[str, TensorPlan]:
    return {tensor.name: tensor for _, tensor in plan.tensors()}


def lora(path: Path, prefix: str = "") -> Path:
    return save(path, peft_lora(SHAPES, TOUCHED, prefix=f"diffusion_model.{prefix}"))


class TestDtypes:
    def test_the_narrowest_name_counts(self) -> None:
        recipe = Recipe(Path("x"), (), dtype={"all": "bf16", "te": "fp16", "te2": "fp32", "vae": "keep"})
        names = ("unet", "te1", "te2", "vae", "")
        assert [recipe.dtype_for(name) for name in names] == ["bf16", "fp16", "fp32", "keep", "bf16"]

    def test_components_get_their_own(self, tmp_path: Path) -> None:
        base, adapter, _ = sd1_pair(tmp_path)
        plan = build_plan(base, [adapter], dtype={"all": "bf16", "vae": "fp32", "te": "keep"})
        by_component = {}
        for _, tensor in plan.tensors():
            if len(tensor.shape) > 1 and tensor.source.dtype == "F16":
                by_component.setdefault(tensor.component, set()).add(tensor.dtype)
        assert by_component == {"unet": {"BF16"}, "vae": {"F32"}, "te1": {"F16"}}
        assert plan.settings["dtype"] == {"all": "bf16", "te": "keep", "vae": "fp32"}

    @pytest.mark.parametrize(
        ("dtype", "match"),
        [
            ("fp12", "no such dtype; there are keep, fp32"),
            ({"all": "x"}, "no such dtype"),
            ({"transformer": "fp16"}, "no such component; it has unet, te1, vae"),
            ({"te2": "fp16"}, "no such component"),
        ],
    )
    def test_what_there_is_not_is_refused(self, tmp_path: Path, dtype, match: str) -> None:
        base, adapter, _ = sd1_pair(tmp_path)
        with pytest.raises(UsageError, match=match):
            build_plan(base, [adapter], dtype=dtype)

    def test_an_unknown_rounding_is_refused(self, tmp_path: Path) -> None:
        base, adapter, _ = sd1_pair(tmp_path)
        with pytest.raises(UsageError, match="there are nearest, stochastic, fast"):
            build_plan(base, [adapter], rounding="up")

    def test_fp8_is_for_the_matrices_inside_the_blocks(self, tmp_path: Path) -> None:
        plan = build_plan(save_base(tmp_path / "base.safetensors"), [], dtype="fp8_e4m3fn")
        narrow = {name for name, tensor in tensors(plan).items() if tensor.dtype == "F8_E4M3"}
        unet, encoder = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
        for name in (
            f"{unet}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
            f"{unet}input_blocks.4.1.proj_in.weight",
            f"{unet}input_blocks.1.0.in_layers.2.weight",
            f"{unet}middle_block.0.out_layers.3.weight",
            f"{encoder}encoder.layers.3.mlp.fc1.weight",
        ):
            assert name in narrow
        for name in tensors(plan).keys() & {
            f"{unet}input_blocks.0.0.weight",
            f"{unet}out.2.weight",
            f"{unet}time_embed.0.weight",
            f"{unet}input_blocks.1.0.emb_layers.1.weight",
            f"{unet}input_blocks.4.1.norm.weight",
            f"{unet}input_blocks.4.1.proj_in.bias",
            f"{encoder}embeddings.token_embedding.weight",
            f"{encoder}encoder.layers.3.layer_norm1.weight",
        }:
            assert name not in narrow
        assert not any(name.startswith("first_stage_model") for name in narrow)
        assert all(len(tensors(plan)[name].shape) > 1 for name in narrow)

    def test_a_vae_is_converted_to_fp8_only_if_it_is_named(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base.safetensors")
        plan = build_plan(base, [], dtype={"vae": "fp8_e5m2"})
        owners = {tensor.component for _, tensor in plan.tensors() if tensor.dtype == "F8_E5M2"}
        assert owners == {"vae"}

    def test_the_configuration_of_a_folder_names_a_wide_dtype_and_no_fp8(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        save(folder / "model.safetensors", random_arrays(llama()))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float16"}))
        for dtype, expected in (("bf16", "bfloat16"), ({"model": "fp32"}, "float32"), ("fp8_e4m3fn", None)):
            plan = build_plan(folder, [], dtype=dtype)
            (config,) = (side for side in plan.side_files if side.relative == "config.json")
            assert (json.loads(config.content)["torch_dtype"] if config.content else None) == expected


class TestScaledBases:
    @pytest.mark.parametrize("new", [False, True])
    @pytest.mark.parametrize("by_row", [False, True])
    def test_touched_layers_get_a_new_scale_and_the_others_are_copied(
        self, tmp_path: Path, new: bool, by_row: bool
    ) -> None:
        base = scaled_base(tmp_path / "base.safetensors", new, by_row=by_row)
        found = tensors(build_plan(base, [lora(tmp_path / "a.safetensors")]))
        end = ".weight_scale" if new else ".scale_weight"
        for name in SHAPES:
            scale = found[name.removesuffix(".weight") + end]
            if name in TOUCHED:
                assert found[name].rescaled is not None
                assert found[name].rescaled.by_row == by_row
                assert found[name].rescaled.name == scale.name == found[name].scale.name
                assert (scale.scale_of, scale.dtype) == (name, "F32")
                assert scale.shape == ((SHAPES[name][0], 1) if by_row else ())
                assert not found[name].is_copy
            else:
                assert found[name].is_copy
                assert scale.is_copy
        rest = found.keys() - SHAPES.keys() - {name.removesuffix(".weight") + end for name in TOUCHED}
        assert all(found[name].is_copy for name in rest)

    def test_side_tensors_are_no_modules(self, tmp_path: Path) -> None:
        base = scaled_base(tmp_path / "base.safetensors", True)
        shapes = {"blocks.0.attn.q.weight_scale.weight": (8, 16)}
        adapter = save(tmp_path / "a.safetensors", peft_lora(shapes, shapes, prefix="diffusion_model."))
        with pytest.raises(UnmatchedModules, match="no place in the base"):
            build_plan(base, [adapter])

    @pytest.mark.parametrize("new", [False, True])
    @pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8_e4m3fn"])
    def test_another_dtype_drops_everything_beside_the_weights(self, tmp_path: Path, new: bool, dtype: str) -> None:
        base = scaled_base(tmp_path / "base.safetensors", new)
        plan = build_plan(base, [lora(tmp_path / "a.safetensors")], dtype=dtype)
        found = tensors(plan)
        assert found.keys() == SHAPES.keys() | PLAIN.keys()
        assert all(found[name].dtype == OUTPUT_DTYPES[dtype] for name in SHAPES)
        assert all(found[name].scale is not None and found[name].rescaled is None for name in SHAPES)

    def test_layers_listed_in_the_metadata_leave_with_their_scales(self, tmp_path: Path) -> None:
        base = scaled_base(tmp_path / "base.safetensors", True, in_metadata=True)
        adapter = lora(tmp_path / "a.safetensors")
        kept = build_plan(base, [adapter]).files[0].metadata
        assert len(json.loads(kept["_quantization_metadata"])["layers"]) == 3
        assert "_quantization_metadata" not in build_plan(base, [adapter], dtype="bf16").files[0].metadata

    @pytest.mark.parametrize(("new", "dtype"), [(True, "fp8_e4m3fn_scaled"), (False, "fp8_e4m3fn_scaled_old")])
    def test_asking_for_what_it_is_changes_nothing(self, tmp_path: Path, new: bool, dtype: str) -> None:
        base = scaled_base(tmp_path / "base.safetensors", new)
        found = tensors(build_plan(base, [], dtype=dtype))
        assert all(tensor.is_copy for tensor in found.values())

    @pytest.mark.parametrize(
        ("new", "dtype", "ends"),
        [
            (False, "fp8_e4m3fn_scaled", {"weight", "weight_scale", "comfy_quant"}),
            (True, "fp8_e4m3fn_scaled_old", {"weight", "scale_weight"}),
            (True, "fp8_e5m2_scaled", {"weight", "weight_scale", "comfy_quant"}),
        ],
    )
    def test_the_other_kind_is_written_anew(self, tmp_path: Path, new: bool, dtype: str, ends: set[str]) -> None:
        found = tensors(build_plan(scaled_base(tmp_path / "base.safetensors", new), [], dtype=dtype))
        for name in SHAPES:
            layer = name.removesuffix("weight")
            assert {other.removeprefix(layer) for other in found if other.startswith(layer)} - {"bias"} == ends
            assert found[name].scale is not None
            assert found[name].rescaled is not None
        assert ("scaled_fp8" in found) == (dtype == "fp8_e4m3fn_scaled_old")

    @pytest.mark.parametrize("dtype", SCALED_NAMES)
    def test_linear_layers_of_a_16_bit_base_are_scaled_and_convolutions_are_not(
        self, tmp_path: Path, dtype: str
    ) -> None:
        base = save_torch(tmp_path / "base.safetensors", plain_tensors())
        found = tensors(build_plan(base, [lora(tmp_path / "a.safetensors")], dtype=dtype))
        assert {name for name, tensor in found.items() if tensor.rescaled} == SHAPES.keys()
        assert found["blocks.0.conv.weight"].is_copy
        if dtype.endswith("_old"):
            assert found["scaled_fp8"].shape == (2,)
        else:
            settings = json.loads(found["blocks.2.mlp.comfy_quant"].content)
            assert settings == {"format": f"float8_{dtype.split('_')[1]}", "full_precision_matrix_mult": True}

    @pytest.mark.parametrize("named", [False, True])
    def test_clip_is_scaled_only_by_name_and_every_component_has_its_marker(self, tmp_path: Path, named: bool) -> None:
        base = save_base(tmp_path / "base.safetensors")
        dtype = "fp8_e4m3fn_scaled_old"
        found = tensors(build_plan(base, [], dtype={"all": dtype, "te": dtype} if named else dtype))
        scaled = {tensor.component for tensor in found.values() if tensor.rescaled}
        assert scaled == ({"unet", "te1"} if named else {"unet"})
        markers = {name for name in found if name.endswith("scaled_fp8")}
        prefixes = {"model.diffusion_model.", *(["cond_stage_model.transformer."] if named else [])}
        assert markers == {f"{prefix}scaled_fp8" for prefix in prefixes}
        assert not any(len(tensor.shape) == 4 for tensor in found.values() if tensor.rescaled)

    def test_a_plan_with_scales_survives_json(self, tmp_path: Path) -> None:
        base = scaled_base(tmp_path / "base.safetensors", False, by_row=True)
        plan = build_plan(
            base, [lora(tmp_path / "a.safetensors")], dtype="fp8_e5m2_scaled", rounding="stochastic", seed=7
        )
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan

    def test_the_index_of_a_folder_names_what_is_written(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        scaled_base(folder / "model-00001-of-00001.safetensors", True)
        weight_map = dict.fromkeys(
            tensors(build_plan(folder / "model-00001-of-00001.safetensors", [], dtype="fp8_e4m3fn_scaled")),
            "model-00001-of-00001.safetensors",
        )
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        plan = build_plan(folder, [], dtype="bf16")
        written = json.loads(plan.side_files[-1].content)["weight_map"]
        assert written.keys() == tensors(plan).keys()


class TestRefusals:
    @pytest.mark.parametrize(
        ("beside", "weight", "kind"),
        [
            ({"weight_scale": torch.ones(1, 2)}, torch.float8_e4m3fn, "block-scaled fp8"),
            ({"weight_scale_inv": torch.ones(1, 1)}, torch.float8_e4m3fn, "block-scaled fp8"),
            ({"weight_scale": torch.ones(8, 1, dtype=torch.uint8)}, torch.float8_e4m3fn, "MXFP8"),
            ({"weight_scale": torch.ones(())}, torch.int8, "int8"),
            (
                {"weight_scale": torch.ones(8, 1).to(torch.float8_e4m3fn), "weight_scale_2": torch.ones(())},
                torch.uint8,
                "NVFP4",
            ),
            (
                {"weight_scale": torch.ones(()), "comfy_quant": {"format": "mxfp8"}},
                torch.float8_e4m3fn,
                "MXFP8",
            ),
            (
                {"weight_scale": torch.ones(()), "comfy_quant": {"format": "float8_e4m3fn", "convrot": True}},
                torch.float8_e4m3fn,
                "convrot",
            ),
        ],
    )
    @pytest.mark.parametrize("how", ["fuse", "convert"])
    def test_other_scales_are_refused_by_name(self, tmp_path: Path, beside, weight, kind: str, how: str) -> None:
        stored = plain_tensors()
        stored["blocks.2.mlp.weight"] = stored["blocks.2.mlp.weight"].float().to(weight)
        for end, value in beside.items():
            if isinstance(value, dict):
                value = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
            stored[f"blocks.2.mlp.{end}"] = value
        base = save_torch(tmp_path / "base.safetensors", stored)
        adapters = [lora(tmp_path / "a.safetensors")] if how == "fuse" else []
        with pytest.raises(Unsupported, match=rf"{kind}.*16-bit original"):
            build_plan(base, adapters, dtype="keep" if adapters else "bf16")

    def test_layers_that_the_metadata_calls_something_else_are_refused(self, tmp_path: Path) -> None:
        listed = {"_quantization_metadata": json.dumps({"layers": {"blocks.2.mlp": {"format": "nvfp4"}}})}
        base = save_torch(tmp_path / "base.safetensors", plain_tensors(), listed)
        with pytest.raises(Unsupported, match="NVFP4"):
            build_plan(base, [lora(tmp_path / "a.safetensors")])

    def test_settings_that_are_no_json_are_malformed(self, tmp_path: Path) -> None:
        stored = plain_tensors()
        stored["blocks.2.mlp.weight"] = stored["blocks.2.mlp.weight"].to(torch.float8_e4m3fn)
        stored |= {
            "blocks.2.mlp.weight_scale": torch.ones(()),
            "blocks.2.mlp.comfy_quant": torch.ones(3).to(torch.uint8),
        }
        base = save_torch(tmp_path / "base.safetensors", stored)
        with pytest.raises(InputError, match="is not valid JSON"):
            build_plan(base, [lora(tmp_path / "a.safetensors")])
