"""Which family an adapter was made for, and who wrote it: from names first, widths and metadata as hints."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from bake.keys.dialects import addresses, flatten

Shape = tuple[int, ...]
Families = frozenset[str]

_UNETS = frozenset({"sd1", "sd2", "sdxl", "sdxl-refiner"})
_IS_UNET = r"(down_blocks|up_blocks|input_blocks|output_blocks|mid_block|middle_block)_"

# Paths below the prefix, dots written "_" and numbers "#" -> the families that have such a module. Of each name the
# first row that fits is taken; the adapter's families are those that all its names leave. Names that are in no row,
# and families that are in no row, decide nothing.
_ROWS = (
    (r"(down|up)_blocks_#_#_(attention|channelwise|depthwise|kv_mapper|mapper)", "stable-cascade"),
    (r"(clip_(txt|img)(_pooled)?_mapper|down_downscalers|up_upscalers)(_|$)", "stable-cascade"),
    (_IS_UNET, "sd1 sd2 sdxl sdxl-refiner"),  #  which one is told by _UNET_EVIDENCE
    # Flux and its relatives
    (r"distilled_guidance_layer_", "chroma"),
    (r"(double|single)_stream_modulation|to_qkv_mlp_proj$|transformer_blocks_#_ff(_context)?_linear_(in|out)", "flux2"),
    (r"individual_token_refiner_|context_embedder_(token_refiner|time_text_embed|proj_in)", "hunyuan-video"),
    (r"double_blocks_#_(img|txt)_(mlp_fc#|mod_linear)|single_blocks_#_modulation_linear", "hunyuan-video"),
    (r"double_blocks_#_(img|txt)_mod_lin$|single_blocks_#_modulation_lin$", "flux hunyuan-video"),
    (r"(time_in|vector_in|guidance_in)_(in|out)_layer$", "flux flux2 hunyuan-video"),
    (r"^(img_in|txt_in)$", "flux chroma flux2 qwen-image"),
    (r"(double|single)_blocks_#_", "flux chroma flux2 hunyuan-video"),
    # AuraFlow
    (r"joint_transformer_blocks_#_|(double|single)_layers_#_", "auraflow"),
    (r"single_transformer_blocks_#_(ff_(linear_#|out_projection)|norm#_linear|attn_to_out_#)", "auraflow"),
    # transformers in diffusers names
    (r"single_transformer_blocks_#_norm_linear$", "flux hunyuan-video"),
    (r"single_transformer_blocks_#_(proj_mlp|proj_out)", "flux chroma hunyuan-video"),
    (r"single_transformer_blocks_#_attn_to_out$", "flux2"),
    (r"single_transformer_blocks_#_attn_to_[qkv]", "flux chroma hunyuan-video auraflow"),
    (r"transformer_blocks_#_(img|txt)_(mlp|mod)_", "qwen-image"),
    (r"transformer_blocks_#_attn_", "flux chroma flux2 hunyuan-video sd3 qwen-image"),
    (r"transformer_blocks_#_norm#(_context)?_linear$", "flux hunyuan-video sd3 mochi"),
    (r"transformer_blocks_#_ff_context_net_", "flux chroma hunyuan-video sd3 mochi"),
    (r"transformer_blocks_#_attn#_add_[qkv]_proj", "mochi"),
    (r"transformer_blocks_#_attn#_", "pixart sana ltxv mochi sd3"),
    (r"transformer_blocks_#_ff_net_", "flux chroma hunyuan-video sd3 pixart ltxv mochi"),
    # outside the blocks of transformers
    (r"^context_embedder$", "flux chroma flux2 sd3 auraflow"),
    (r"^x_embedder$", "flux chroma flux2 lumina2 z-image"),
    (r"^pos_embed_proj$", "sd3 pixart auraflow"),
    (r"^time_text_embed_text_embedder_", "flux hunyuan-video sd3"),
    (r"^adaln_single_", "pixart ltxv"),
    (r"^time_embed_(linear$|emb_)", "ltxv sana"),
    (r"^caption_projection_linear_", "pixart ltxv sana"),
    # transformers in names of their own
    (r"joint_blocks_#_(context|x)_block", "sd3"),
    (r"patchify_proj$", "ltxv"),
    (r"blocks_#_cross_attn_(q_linear|kv_linear)", "pixart sana"),
    (r"blocks_#_(attn_(qkv|proj)|mlp)_[xy](_|$)", "mochi"),
    (r"blocks_#_(self_attn|cross_attn)_([qkvo]|[kv]_img|norm_[qk]|norm_k_img)$", "wan"),
    (r"blocks_#_(ffn_(#|net_)|attn#_(to|add|norm)_)", "wan"),
    (r"(all_x_embedder|all_final_layer)_", "z-image"),
    (r"(layers|(noise|context)_refiner)_#_attention_to_(q|k|v|out)", "z-image"),
    (r"(layers|(noise|context)_refiner)_#_(attn_to_|feed_forward_linear_#)", "lumina2"),
    (r"layers_#_attention_(qkv|out)$|(noise|context)_refiner_#_", "lumina2 z-image"),
    # language models
    (r"(model|language_model|transformer|decoder)_(layers|h)_#_(self_attn|mlp|attn)_", "language-model"),
    (r"^layers_#_(self_attn_[qkvo]_proj|mlp_(gate|up|down)_proj)|^h_#_(attn|mlp)_c_", "language-model"),
)
_FAMILIES = tuple((re.compile(rf"(?:^|_)(?:{pattern})"), frozenset(names.split())) for pattern, names in _ROWS)
_NUMBER = re.compile(r"\d+")

# What the blocks named rule in, among the UNets.
_UNET_EVIDENCE = (
    (r"transformer_blocks_[1-9]", {"sdxl", "sdxl-refiner"}),  # deeper than one
    (r"input_blocks_[12]_1_", {"sd1", "sd2"}),
    (r"input_blocks_(9|1\d)_|output_blocks_(9|1\d)_|(down|up)_blocks_3_", {"sd1", "sd2", "sdxl-refiner"}),
    (r"down_blocks_0_attentions|up_blocks_3_attentions", {"sd1", "sd2"}),
    (r"up_blocks_0_attentions", {"sdxl"}),
    (r"add_embedding|label_emb", {"sdxl", "sdxl-refiner"}),
)
_UNET_BLOCK = re.compile(rf"(^|_){_IS_UNET}")
_EVIDENCE = tuple((re.compile(pattern), frozenset(families)) for pattern, families in _UNET_EVIDENCE)

# A module, the width of its input -> the family of that width. Reduced and distilled models have others.
_WIDTHS = (
    (  # as wide as the text encoder
        r"(attentions_\d+|(input|output)_blocks_\d+_\d+|middle_block_\d+)_transformer_blocks_\d+_attn2_to_[kv]$",
        {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"},
    ),
    (r"double_blocks_19_|single_blocks_3[89]_|single_transformer_blocks_3[89]_", {3072: "hunyuan-video"}),
    (r"(double|single)_blocks_\d+_|single_transformer_blocks_\d+_(proj_mlp|norm)", {3072: "flux", 6144: "flux2"}),
    (r"layers_\d+_attention_(qkv|out)$", {2304: "lumina2", 3840: "z-image"}),
    (r"transformer_blocks_\d+_attn_(add_|to_)", {1536: "sd3", 2432: "sd3"}),
    (r"transformer_blocks_\d+_attn1_to_[qkv]$", {1152: "pixart", 2048: "ltxv", 2240: "sana"}),
    (r"blocks_\d+_(attn_qkv|cross_attn_q_linear)$", {1152: "pixart", 2240: "sana"}),
)
_WIDTH_HINTS = tuple((re.compile(rf"(?:^|_)(?:{pattern})"), widths) for pattern, widths in _WIDTHS)
# The projections around a transformer are 1x1 convolutions in SD1, Linear layers in its successors.
_PROJECTION = re.compile(r"_proj_(in|out)$")

# How ss_base_model_version (kohya, ai-toolkit) or modelspec.architecture begins, without case and punctuation.
_VERSIONS = (
    *(("sdxl", "sdxl"), ("sdv1", "sd1"), ("sd1", "sd1"), ("sdv2", "sd2"), ("sd2", "sd2"), ("sd3", "sd3")),
    *(("stablediffusionxlv1refiner", "sdxl-refiner"), ("stablediffusionxl", "sdxl"), ("stablediffusionv1", "sd1")),
    *(("stablediffusionv2", "sd2"), ("stablediffusionv3", "sd3"), ("stablediffusion3", "sd3")),
    *(("flux2", "flux2"), ("flux", "flux"), ("chroma", "chroma"), ("auraflow", "auraflow"), ("pixart", "pixart")),
    *(("lumina", "lumina2"), ("zimage", "z-image"), ("hunyuanvideo", "hunyuan-video")),
    *(("hunyuanimage", "hunyuan-video"), ("wan", "wan"), ("qwenimage", "qwen-image"), ("ltx", "ltxv")),
    *(("stablecascade", "stable-cascade"), ("mochi", "mochi"), ("sana", "sana")),
)


def families_by_names(modules: Iterable[str], text_encoders: Collection[str] = ()) -> tuple[Families, str]:
    """(families whose blocks these module names are, the name that decided).

    Several families where they share names; none where no name tells, or where the names of several
    families are mixed: then nothing is refused on this account.
    modules: names of modules outside the text encoders. text_encoders: which of those there are modules of.
    """
    modules = list(modules)
    kinds: dict[str, str] = {}  # names that differ by numbers alone are of one kind
    for module in modules:
        kinds.setdefault(_NUMBER.sub("#", module), module)
    possible: Families | None = None
    telling = ""
    for name in kinds.values():
        found = _families_of(name)
        if found is not None and (possible is None or not possible <= found):
            possible, telling = found if possible is None else possible & found, name
    if possible == _UNETS:
        return _which_unet([flatten(module) for module in modules], text_encoders)
    return (possible, telling) if possible else (frozenset(), "")


def _families_of(module: str) -> Families | None:
    """The families that have a module like this one; None: no telling."""
    kind = _NUMBER.sub("#", flatten(addresses(module)[0].path))
    return next((families for pattern, families in _FAMILIES if pattern.search(kind)), None)


def _which_unet(flat: list[str], text_encoders: Collection[str]) -> tuple[Families, str]:
    possible = _UNETS
    if "te2" in text_encoders:  # the refiner has SDXL's second one alone
        possible = _UNETS & ({"sdxl"} if "te1" in text_encoders else {"sdxl", "sdxl-refiner"})
    telling = next((name for name in flat if _UNET_BLOCK.search(name)), "")
    for pattern, families in _EVIDENCE:
        if possible & families != possible:
            found = next((name for name in flat if pattern.search(name)), None)
            if found is not None:
                possible, telling = possible & families, found
    return possible, telling


def family_by_shapes(down_shapes: Mapping[str, Shape]) -> str | None:
    """The family that these shapes of down factors, by module name, point to; a hint, not a proof.

    Cross-attention is as wide as the family's text encoder; SD1 alone projects by convolution.
    """
    flat = {flatten(module): shape for module, shape in down_shapes.items() if len(shape) > 1}
    for pattern, widths in _WIDTH_HINTS:
        for name, shape in flat.items():
            if shape[1] in widths and pattern.search(name):
                return widths[shape[1]]
    is_sd1 = any(len(shape) == 4 and _PROJECTION.search(name) for name, shape in flat.items())
    return "sd1" if is_sd1 else None


def family_by_metadata(metadata: Mapping[str, str]) -> str | None:
    """The family a trainer wrote into the file: kohya's ss_base_model_version, or ModelSpec."""
    for key in ("ss_base_model_version", "modelspec.architecture"):
        version = re.sub(r"[^a-z0-9]", "", metadata.get(key, "")[:100].lower())
        family = next((family for start, family in _VERSIONS if version.startswith(start)), None)
        if family is not None:
            return family
    return "sd2" if metadata.get("ss_v2") == "True" else None


# A metadata key, how its value begins -> who writes it.
_SIGNATURES = (
    ("ot_revision", r"", "OneTrainer"),
    ("ot_branch", r"", "OneTrainer"),
    ("software", r".*ai-toolkit", "ai-toolkit"),
    ("ss_network_module", r"lycoris", "LyCORIS in kohya sd-scripts"),
    ("ss_network_module", r"networks\.lora_(wan|framepack|flux_kontext|flux_2|qwen_image|zimage|hv)", "musubi-tuner"),
    ("ss_network_module", r"networks\.", "kohya sd-scripts"),
    ("lora_adapter_metadata", r"", "diffusers"),
)
# What a key looks like -> who writes such keys. The first row that fits any key is taken.
_HANDWRITING = (
    (r"(unet|text_encoder):\d+:(up|down)", "cloneofsimo/lora"),
    (
        r"bundle_emb\..+|lora_(transformer|prior_unet|prior_te)_.+|(clip_[lg]|t5|llama)\..+\.(lora_\w+\.weight|alpha)",
        "OneTrainer",
    ),
    (r"(diffusion_model\.)?(double|single)_blocks\.\d+\.processor\..+", "XLabs"),
    (r"(double|single)_blocks\.\d+\..*_norm\.scale", "Black Forest Labs"),
    (r"pipe\.dit\..+|(?!base_model\.).+\.lora_[AB]\.default\.weight", "DiffSynth-Studio"),
    (r".+\.lora_[ab]", "MLX"),
    (r"base_model\.model\..+", "PEFT"),
    (r"lora_unet__.+", "VideoX-Fun"),
    (r"oft_(unet|te)_.+", "kohya sd-scripts"),
    (r"lycoris_.+", "LyCORIS (SimpleTuner, or its wrapper)"),
    (r"(lora_unet|lora_te\d?)_.+\.(hada_|lokr_|w_norm|b_norm|on_input|oft_|diff|[ab][12]\.weight).*", "LyCORIS"),
    (
        r"lora_unet_(blocks|double_blocks)_\d+_(self_attn_[qkvo]|cross_attn_[qkvo]|ffn_\d|img_mod_linear)\..+",
        "musubi-tuner",
    ),
    (r"(lora_unet|lora_te\d?)_.+", "kohya sd-scripts"),
    (r".+\.processor\..+_lora\..+", "diffusers before 0.18"),
    (r"diffusion_model\..+", "ai-toolkit, diffusion-pipe or another that writes ComfyUI's names"),
    (r"transformer\..+", "diffusers, or ai-toolkit or SimpleTuner, which write its names"),
    (r"(unet|text_encoder(_\d)?)\..+", "diffusers"),
)
_SIGNED = tuple((key, re.compile(pattern, re.DOTALL), trainer) for key, pattern, trainer in _SIGNATURES)
_WRITTEN = tuple((re.compile(pattern), trainer) for pattern, trainer in _HANDWRITING)


def trainer_of(keys: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """Who probably wrote an adapter with these keys: what its metadata says, else whose names they are.

    A guess for people to read, None where nothing tells. Nothing else may depend on it.
    """
    for key, pattern, trainer in _SIGNED:
        if key in metadata and pattern.match(metadata[key][:10_000]):
            return trainer
    return next((trainer for pattern, trainer in _WRITTEN if any(pattern.fullmatch(key) for key in keys)), None)
