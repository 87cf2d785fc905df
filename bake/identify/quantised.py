"""Quantised checkpoints, told by the tensors that only they have. Updates cannot be added to packed weights."""

from __future__ import annotations

from collections.abc import Iterable

# End of a tensor name                      kind                          seen in
_SUFFIXES = (
    (".absmax", "bitsandbytes 4-bit"),  #                                 transformers, ComfyUI
    (".quant_map", "bitsandbytes 4-bit"),
    (".SCB", "bitsandbytes 8-bit"),
    (".qweight", "GPTQ or AWQ"),  #                                       AutoGPTQ, AutoAWQ
    ("_blocks", "MXFP4"),  #                                              gpt-oss: experts.gate_up_proj_blocks
    (".weight_scale_inv", "block-scaled fp8"),  #                         DeepSeek
    (".weight_scale_2", "NVFP4"),  #                                      ModelOpt, ComfyUI
    (".weight_scale", "scaled fp8"),  #                                   ComfyUI, compressed-tensors
    (".scale_weight", "scaled fp8"),  #                                   ComfyUI, first generation
    (".comfy_quant", "ComfyUI-quantised"),
    (".qweight_scales", "SVDQuant"),  #                                   nunchaku
    (".wscales", "SVDQuant"),
)


def quantisation_of(names: Iterable[str]) -> tuple[str, str] | None:
    """(kind, the tensor that tells) of a quantised checkpoint; None for ordinary weights."""
    for name in names:
        for suffix, kind in _SUFFIXES:
            if name.endswith(suffix):
                return kind, name
    return None
