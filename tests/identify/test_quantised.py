"""Quantised checkpoints are told by the names of their tensors, else by config.json."""

from __future__ import annotations

import pytest

from bake.identify.quantised import quantisation_of

PLAIN = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"]


@pytest.mark.parametrize(
    ("leaves", "kind"),
    [
        (["weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"], "bitsandbytes 4-bit"),
        (["weight.quant_state.bitsandbytes__fp4"], "bitsandbytes 4-bit"),
        (["SCB", "weight_format"], "bitsandbytes 8-bit"),
        (["qweight", "qzeros", "scales", "g_idx"], "GPTQ"),
        (["qweight", "qzeros", "scales"], "AWQ or GPTQ"),
        (["qweight", "wscales", "smooth_factor", "proj_up", "proj_down"], "SVDQuant"),
        (["qweight", "smooth_factor"], "SVDQuant"),
        (["gate_up_proj_blocks", "gate_up_proj_scales"], "MXFP4"),
        (["weight", "weight_scale", "weight_scale_2", "input_scale"], "NVFP4"),
        (["weight_packed", "weight_scale", "weight_global_scale"], "NVFP4"),
        (["weight_packed", "weight_scale", "weight_shape"], "compressed-tensors"),
        (["W_q", "scale", "zero"], "HQQ"),
        (["codes", "codebooks", "scales"], "AQLM"),
        (["q_weight", "q_invperm", "q_scale"], "EXL2"),
        (["trellis", "suh", "svh"], "EXL3"),
        (["weight._data", "weight._scale"], "quanto"),
        (["weight", "scales", "biases"], "MLX"),
        (["weight", "comfy_quant", "weight_scale"], "ComfyUI-quantised"),
        (["weight", "weight_scale_inv"], "block-scaled fp8"),
        (["weight", "weight_scale"], "scaled fp8"),
        (["weight", "scale_weight"], "scaled fp8"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
@pytest.mark.parametrize("order", [1, -1])
def test_tensor_names_tell(leaves: list[str], kind: str, order: int) -> None:
    found = quantisation_of(PLAIN + [f"model.layers.1.mlp.up_proj.{leaf}" for leaf in leaves][::order])
    assert found is not None
    assert found.kind == kind
    assert found.evidence.startswith("model.layers.1.mlp.up_proj.")
    assert found.remedy


@pytest.mark.parametrize(
    "names", [[], PLAIN, ["logit_scale", "text_projection.weight"], ["norm.scale", "norm.bias"], ["blocks.0.scales"]]
)
def test_ordinary_weights_are_not_taken_for_packed_ones(names: list[str]) -> None:
    assert quantisation_of(names) is None
    assert quantisation_of(names, {"model_type": "llama", "text_config": {"model_type": "x"}}) is None


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "AWQ"}, "AWQ"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_method": "next_years"}, "next_years-quantised"),
        ({"bits": 3}, "unknown-quantised"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_configuration_tells_where_names_do_not(settings: dict, kind: str, nested: bool) -> None:
    config = {"quantization_config": settings}
    found = quantisation_of(PLAIN, {"text_config": config} if nested else config)
    assert found is not None
    assert kind in found.kind
    assert "quantization_config" in found.remedy


def test_names_are_believed_before_the_configuration() -> None:
    found = quantisation_of(["a.weight.absmax"], {"quantization_config": {"quant_method": "gptq"}})
    assert found is not None
    assert found.kind == "bitsandbytes 4-bit"


def test_every_method_that_transformers_knows_has_a_name() -> None:
    module = pytest.importorskip("transformers.utils.quantization_config")
    for method in module.QuantizationMethod:
        found = quantisation_of(PLAIN, {"quantization_config": {"quant_method": method.value}})
        assert found is not None
        assert found.kind
