"""Files that people take for LoRAs and that are something else: each is refused by what it is."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple


class Kind(NamedTuple):
    """A recognised kind of file that is no adapter for a checkpoint's weights."""

    name: str
    advice: str
    has_factors: bool = False  # such files may hold LoRA factors as well
    is_checkpoint: bool = False  # a whole model, or a component of one


_ROWS = (
    # any name that matches                               what it is, what to do
    (
        r"string_to_param(\..*)?|string_to_token.*|emb_params",
        Kind("a textual inversion", "It adds words to the prompt; put it into the embeddings folder of your UI."),
    ),
    (
        r"(.*\.)?lllite_.*",
        Kind("a ControlNet-LLLite", "It needs a control image at run time and cannot be fused.", True),
    ),
    (
        r"lora_controlnet|(.*\.)?input_hint_block\..*|control_model\..*|(.*\.)?controlnet_cond_embedding\..*",
        Kind("a ControlNet", "It needs a control image at run time and cannot be fused.", True),
    ),
    (
        r"controlnet_(blocks|single_blocks|(down|mid)_blocks?|x_embedder)\..*|control_add_embedding\..*",
        Kind("a ControlNet", "It needs a control image at run time and cannot be fused.", True),
    ),
    (
        r"image_proj(_model)?\..*|ip_adapter(_proj_model)?\..*|.*\.to_[kv]_ip\.weight|.*\.processor\.ip_adapter_.*",
        Kind("an IP-Adapter", "It needs a reference image at run time and cannot be fused.", True),
    ),
    (
        r"id_encoder\..*|pulid_.*",
        Kind("an identity adapter (PhotoMaker, PuLID)", "It needs a reference image at run time.", True),
    ),
    (
        r"(adapter\.)?body\.\d+\.(in_conv|resnets)\..*",
        Kind("a T2I-Adapter", "It needs a control image at run time and cannot be fused."),
    ),
    (
        r"prompt_embeddings|(.*\.)?prompt_encoder\..*|.*\.adaption_(prompt|gate)",
        Kind(
            "a soft prompt (PEFT prompt, prefix or p-tuning)",
            "It adds inputs to the model, not updates to its weights.",
        ),
    ),
    (
        r".*motion_modules\..*",
        Kind("an AnimateDiff motion module", "It adds layers of its own; load it beside the checkpoint.", True),
    ),
    (
        r"\d+\.\d+\.(linear\.)?\d*\.?(weight|bias)|\d{3,4}\.\d+\..*",
        Kind("a hypernetwork", "It is run beside the model, not added to its weights."),
    ),
    (
        r"w_[ab]_\d{3}",
        Kind(
            "a SAM LoRA in a project's private format (w_a_000, w_b_000)",
            "Its tensors are numbered and do not say which layer they update; merge it with that project's code.",
        ),
    ),
    (
        r"(model\.diffusion_model\.input_blocks\.0\.0|conv_in|first_stage_model\..*\.conv_in)\.weight"
        r"|(.*\.)?(layers\.0\.self_attn\.q_proj|embeddings\.word_embeddings|token_embedding|embed_tokens)\.weight"
        r"|(?!.*(lora|adapter))(.*\.)?((double|single|joint|transformer)_blocks|blocks|(double|joint)_layers|layers)\.0\.\w+\.[\w.]+\.weight",
        Kind("a checkpoint", "Give it as the base, and adapters with -l.", is_checkpoint=True),
    ),
    (
        r"(clip_[lg]|t5xxl|emp_params|<[^>]+>|\*|bundle_emb\..+)",
        Kind("a textual inversion", "It adds words to the prompt; put it into the embeddings folder of your UI."),
    ),
    (
        r"(encoder|decoder)\.(down|up|mid).*|quant_conv\.weight",
        Kind("a VAE", "It replaces a component; it is not added to one.", is_checkpoint=True),
    ),
)
_KINDS = tuple((re.compile(rf"^(?:{pattern})$", re.MULTILINE), kind) for pattern, kind in _ROWS)


def kind_of(names: Collection[str], beside_factors: bool) -> Kind | None:
    """What a file with these tensor names is, if it is one of the known kinds.

    beside_factors: the file holds adapter factors too; then only kinds that do so come into question.
    """
    lines = "\n".join(names)  # one search through all names is many times faster than one for each
    for pattern, kind in _KINDS:
        if (kind.has_factors or not beside_factors) and pattern.search(lines):
            return kind
    return None
