"""Quantised checkpoints, told by the tensors that only they have, or by their configuration.

Updates cannot be added to packed weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

ORIGINAL = "Fuse into the 16-bit original and quantise the result."
_FEW_ORIGINALS = (
    "Dequantise it first (load it in transformers with Mxfp4Config(dequantize=True) and save it), "
    "fuse into that, and quantise the result."
)


class Quantised(NamedTuple):
    """What a checkpoint is quantised with."""

    kind: str
    evidence: str  # the tensor, or the setting, that tells
    remedy: str  # what to do instead of fusing into it


class _Row(NamedTuple):
    leaves: tuple[str, ...]  # last names of tensors, which must all be there
    kind: str
    remedy: str = ORIGINAL


# The first row that fits wins: formats that share names with others come before them.
_ROWS = (
    #    last names of tensors                    kind                                       seen in
    _Row(("wscales",), "SVDQuant"),  #                                                       nunchaku
    _Row(("qweight_scales",), "SVDQuant"),
    _Row(("smooth_factor", "qweight"), "SVDQuant"),
    _Row(("absmax",), "bitsandbytes 4-bit"),  #                                              transformers, ComfyUI
    _Row(("quant_map",), "bitsandbytes 4-bit"),
    _Row(("bitsandbytes__nf4",), "bitsandbytes 4-bit"),
    _Row(("bitsandbytes__fp4",), "bitsandbytes 4-bit"),
    _Row(("SCB",), "bitsandbytes 8-bit"),
    _Row(("qweight", "g_idx"), "GPTQ"),  #                                                   AutoGPTQ, GPTQModel
    _Row(("qweight", "qzeros"), "AWQ or GPTQ"),  #                                           AutoAWQ
    _Row(("qweight",), "GPTQ or AWQ"),
    _Row(("gate_up_proj_blocks",), "MXFP4", _FEW_ORIGINALS),  #                              gpt-oss
    _Row(("down_proj_blocks",), "MXFP4", _FEW_ORIGINALS),
    _Row(("weight_packed", "weight_global_scale"), "NVFP4"),  #                              compressed-tensors
    _Row(("weight_global_scale",), "NVFP4"),
    _Row(("weight_scale_2",), "NVFP4"),  #                                                   ModelOpt, ComfyUI
    _Row(("weight_packed",), "compressed-tensors"),
    _Row(("W_q",), "HQQ"),
    _Row(("codes", "codebooks"), "AQLM"),
    _Row(("centroids", "indices"), "VPTQ"),
    _Row(("q_weight", "q_invperm"), "EXL2"),
    _Row(("trellis",), "EXL3"),
    _Row(("Qidxs",), "QuIP#"),
    _Row(("_data", "_scale"), "quanto"),
    _Row(("weight_scales",), "EETQ"),
    _Row(("scales", "biases"), "MLX"),
    _Row(("comfy_quant",), "ComfyUI-quantised"),
    _Row(("weight_scale_inv",), "block-scaled fp8"),  #                                      DeepSeek
    _Row(("weight_scale",), "scaled fp8"),  #                                                ComfyUI, compressed-tensors
    _Row(("scale_weight",), "scaled fp8"),  #                                                ComfyUI, first generation
)

# quant_method of config.json -> kind. Source: transformers utils/quantization_config.py.
_METHODS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "quanto": "quanto",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "scaled fp8",
    "torchao": "torchao",
    "gguf": "GGUF",
    "bitnet": "BitNet",
    "spqr": "SpQR",
    "fp8": "block-scaled fp8",
    "quark": "Quark",
    "fp_quant": "FP-Quant",
    "auto-round": "AutoRound",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "modelopt": "ModelOpt",
    "svdquant": "SVDQuant",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "quip": "QuIP#",
}
_DETAILS = ("quant_algo", "format")  # what ModelOpt and compressed-tensors call the number format
_ON_LOAD = " If its weights are 16-bit and it is only quantised while loading, delete quantization_config there first."


def quantisation_of(names: Iterable[str], config: Mapping[str, Any] | None = None) -> Quantised | None:
    """What a checkpoint with these tensors is quantised with; None for ordinary weights.

    config: its config.json, which tells where the tensors are called like ordinary ones.
    """
    by_leaf: dict[str, str] = {}
    for name in names:
        by_leaf.setdefault(name[name.rfind(".") + 1 :], name)
    for row in _ROWS:
        if all(leaf in by_leaf for leaf in row.leaves):
            return Quantised(row.kind, by_leaf[row.leaves[0]], row.remedy)
    return _by_config(config or {})


def _by_config(config: Mapping[str, Any]) -> Quantised | None:
    for holder in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        settings = holder.get("quantization_config") or holder.get("compression_config")
        if not isinstance(settings, Mapping):
            continue
        method = str(settings.get("quant_method") or "").lower()
        if not method:
            method = "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "unknown"
        detail = next((f" ({settings[key]})" for key in _DETAILS if isinstance(settings.get(key), str)), "")
        kind = _METHODS.get(method, f"{method}-quantised") + detail
        remedy = _FEW_ORIGINALS if method == "mxfp4" else ORIGINAL
        return Quantised(kind, f"config.json: quantization_config, quant_method {method}", remedy + _ON_LOAD)
    return None
