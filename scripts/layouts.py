"""Tensor names and shapes of Stable Diffusion checkpoints in the original layout, at any width.

Written from the architectures, not from a file: with the default widths the lists equal those of the
published checkpoints, with small ones they make fixtures that have every name and weigh nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]
Items = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class UNet:
    """The parts of a UNet configuration that decide names and shapes."""

    width: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks per attention, by level; 0: no attention
    middle_depth: int = 1
    context: int = 768
    linear_projection: bool = False
    label: int | None = None
    channels: int = 4


@dataclass(frozen=True, slots=True)
class Clip:
    """The parts of a text encoder's configuration that decide names and shapes."""

    width: int = 768
    layers: int = 12
    vocabulary: int = 49408
    positions: int = 77


SD1_UNET = UNet()
SD2_UNET = UNet(context=1024, linear_projection=True)
SDXL_UNET = UNet(320, (1, 2, 4), (0, 2, 10), 10, 2048, True, 2816)
REFINER_UNET = UNet(384, (1, 2, 4, 4), (0, 4, 4, 0), 4, 1280, True, 2560)
CLIP_L = Clip()
CLIP_H = Clip(1024, 24)
CLIP_BIGG = Clip(1280, 32)
_SCHEDULE = (
    *("alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance"),
    *("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
    "sqrt_recipm1_alphas_cumprod",
)


def sd1(unet: UNet = SD1_UNET, clip: Clip = CLIP_L, vae_width: int = 128, steps: int = 1000) -> Shapes:
    """A single-file checkpoint of Stable Diffusion 1 in the original layout."""
    return {
        **_under("model.diffusion_model.", ldm_unet(unet)),
        **_under("cond_stage_model.transformer.text_model.", hf_clip(clip)),
        **_under("first_stage_model.", ldm_vae(vae_width)),
        **dict.fromkeys(_SCHEDULE, (steps,)),
        "model_ema.decay": (),
        "model_ema.num_updates": (),
    }


def sd2(unet: UNet = SD2_UNET, clip: Clip = CLIP_H, vae_width: int = 128, steps: int = 1000) -> Shapes:
    """A single-file checkpoint of Stable Diffusion 2 in the original layout."""
    return {
        **_under("model.diffusion_model.", ldm_unet(unet)),
        **_under("cond_stage_model.model.", openclip(clip)),
        **_under("first_stage_model.", ldm_vae(vae_width)),
        **dict.fromkeys(_SCHEDULE, (steps,)),
        "model_ema.decay": (),
        "model_ema.num_updates": (),
    }


def sdxl_refiner(unet: UNet = REFINER_UNET, clip: Clip = CLIP_BIGG, vae_width: int = 128) -> Shapes:
    """A single-file checkpoint of the Stable Diffusion XL refiner in the original layout."""
    return {
        **_under("model.diffusion_model.", ldm_unet(unet)),
        **_under("conditioner.embedders.0.model.", openclip(clip)),
        **_under("first_stage_model.", ldm_vae(vae_width)),
    }


def sdxl(unet: UNet = SDXL_UNET, clip_l: Clip = CLIP_L, clip_g: Clip = CLIP_BIGG, vae_width: int = 128) -> Shapes:
    """A single-file checkpoint of Stable Diffusion XL in the original layout."""
    return {
        **_under("model.diffusion_model.", ldm_unet(unet)),
        **_under("conditioner.embedders.0.transformer.text_model.", hf_clip(clip_l)),
        **_under("conditioner.embedders.1.model.", openclip(clip_g)),
        **_under("first_stage_model.", ldm_vae(vae_width)),
    }


def stored_dtype(name: str) -> str:
    """The dtype of the few tensors that are no weights; F16 for all others."""
    if name.endswith("position_ids"):
        return "I64"
    return "I32" if name.endswith("num_updates") else "F16"


def _under(prefix: str, items: Items) -> Shapes:
    return {prefix + name: shape for name, shape in items}


def _norm(name: str, width: int) -> Items:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _linear(name: str, out: int, into: int, bias: bool = True) -> Items:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _conv(name: str, out: int, into: int, kernel: int = 3) -> Items:
    yield f"{name}.weight", (out, into, kernel, kernel)
    yield f"{name}.bias", (out,)


def ldm_unet(config: UNet) -> Items:
    """A UNet in the names of the latent diffusion code."""
    embedding = 4 * config.width
    yield from _linear("time_embed.0", embedding, config.width)
    yield from _linear("time_embed.2", embedding, embedding)
    if config.label is not None:
        yield from _linear("label_emb.0.0", embedding, config.label)
        yield from _linear("label_emb.0.2", embedding, embedding)
    yield from _conv("input_blocks.0.0", config.width, config.channels)
    width, skips, number = config.width, [config.width], 0
    for level, multiplier in enumerate(config.multipliers):
        for _ in range(2):
            number += 1
            out = multiplier * config.width
            yield from _resnet(f"input_blocks.{number}.0", width, out, embedding)
            width = out
            if config.depths[level]:
                yield from _transformer(f"input_blocks.{number}.1", width, config.depths[level], config)
            skips.append(width)
        if level < len(config.multipliers) - 1:
            number += 1
            yield from _conv(f"input_blocks.{number}.0.op", width, width)
            skips.append(width)
    yield from _resnet("middle_block.0", width, width, embedding)
    yield from _transformer("middle_block.1", width, config.middle_depth, config)
    yield from _resnet("middle_block.2", width, width, embedding)
    yield from _ldm_output_blocks(config, width, skips, embedding)
    yield from _norm("out.0", config.width)
    yield from _conv("out.2", 4, config.width)


def _ldm_output_blocks(config: UNet, width: int, skips: list[int], embedding: int) -> Items:
    number = 0
    for level in reversed(range(len(config.multipliers))):
        for block in range(3):
            here, out = f"output_blocks.{number}", config.multipliers[level] * config.width
            yield from _resnet(f"{here}.0", width + skips.pop(), out, embedding)
            width = out
            if config.depths[level]:
                yield from _transformer(f"{here}.1", width, config.depths[level], config)
            if level and block == 2:
                yield from _conv(f"{here}.{2 if config.depths[level] else 1}.conv", width, width)
            number += 1


def _resnet(name: str, into: int, out: int, embedding: int) -> Items:
    yield from _norm(f"{name}.in_layers.0", into)
    yield from _conv(f"{name}.in_layers.2", out, into)
    yield from _linear(f"{name}.emb_layers.1", out, embedding)
    yield from _norm(f"{name}.out_layers.0", out)
    yield from _conv(f"{name}.out_layers.3", out, out)
    if into != out:
        yield from _conv(f"{name}.skip_connection", out, into, 1)


def _transformer(name: str, width: int, depth: int, config: UNet) -> Items:
    yield from _norm(f"{name}.norm", width)
    for projection in ("proj_in", "proj_out"):
        if config.linear_projection:
            yield from _linear(f"{name}.{projection}", width, width)
        else:
            yield from _conv(f"{name}.{projection}", width, width, 1)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for attention, context in (("attn1", width), ("attn2", config.context)):
            yield from _linear(f"{block}.{attention}.to_q", width, width, bias=False)
            yield from _linear(f"{block}.{attention}.to_k", width, context, bias=False)
            yield from _linear(f"{block}.{attention}.to_v", width, context, bias=False)
            yield from _linear(f"{block}.{attention}.to_out.0", width, width)
        yield from _linear(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _linear(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{block}.{norm}", width)


def hf_clip(config: Clip) -> Items:
    """A CLIP text encoder in Hugging Face names."""
    yield "embeddings.position_ids", (1, config.positions)
    yield "embeddings.position_embedding.weight", (config.positions, config.width)
    yield "embeddings.token_embedding.weight", (config.vocabulary, config.width)
    for number in range(config.layers):
        layer = f"encoder.layers.{number}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{projection}", config.width, config.width)
        yield from _linear(f"{layer}.mlp.fc1", 4 * config.width, config.width)
        yield from _linear(f"{layer}.mlp.fc2", config.width, 4 * config.width)
        yield from _norm(f"{layer}.layer_norm1", config.width)
        yield from _norm(f"{layer}.layer_norm2", config.width)
    yield from _norm("final_layer_norm", config.width)


def openclip(config: Clip) -> Items:
    """A CLIP text encoder in OpenCLIP names, with q, k and v in one tensor."""
    yield "positional_embedding", (config.positions, config.width)
    yield "text_projection", (config.width, config.width)
    yield "logit_scale", ()
    yield "token_embedding.weight", (config.vocabulary, config.width)
    for number in range(config.layers):
        block = f"transformer.resblocks.{number}"
        yield f"{block}.attn.in_proj_weight", (3 * config.width, config.width)
        yield f"{block}.attn.in_proj_bias", (3 * config.width,)
        yield from _linear(f"{block}.attn.out_proj", config.width, config.width)
        yield from _linear(f"{block}.mlp.c_fc", 4 * config.width, config.width)
        yield from _linear(f"{block}.mlp.c_proj", config.width, 4 * config.width)
        yield from _norm(f"{block}.ln_1", config.width)
        yield from _norm(f"{block}.ln_2", config.width)
    yield from _norm("ln_final", config.width)


def ldm_vae(width: int, multipliers: Sequence[int] = (1, 2, 4, 4), latent: int = 4) -> Items:
    """The autoencoder of Stable Diffusion in the names of the latent diffusion code."""
    top = width * multipliers[-1]
    yield from _conv("encoder.conv_in", width, 3)
    into = width
    for level, multiplier in enumerate(multipliers):
        for block in range(2):
            yield from _vae_resnet(f"encoder.down.{level}.block.{block}", into, width * multiplier)
            into = width * multiplier
        if level < len(multipliers) - 1:
            yield from _conv(f"encoder.down.{level}.downsample.conv", into, into)
    yield from _vae_middle("encoder.mid", top)
    yield from _norm("encoder.norm_out", top)
    yield from _conv("encoder.conv_out", 2 * latent, top)
    yield from _conv("decoder.conv_in", top, latent)
    yield from _vae_middle("decoder.mid", top)
    into = top
    for level in reversed(range(len(multipliers))):
        for block in range(3):
            yield from _vae_resnet(f"decoder.up.{level}.block.{block}", into, width * multipliers[level])
            into = width * multipliers[level]
        if level:
            yield from _conv(f"decoder.up.{level}.upsample.conv", into, into)
    yield from _norm("decoder.norm_out", width)
    yield from _conv("decoder.conv_out", 3, width)
    yield from _conv("quant_conv", 2 * latent, 2 * latent, 1)
    yield from _conv("post_quant_conv", latent, latent, 1)


def _vae_resnet(name: str, into: int, out: int) -> Items:
    yield from _norm(f"{name}.norm1", into)
    yield from _conv(f"{name}.conv1", out, into)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out)
    if into != out:
        yield from _conv(f"{name}.nin_shortcut", out, into, 1)


def _vae_middle(name: str, width: int) -> Items:
    yield from _vae_resnet(f"{name}.block_1", width, width)
    yield from _norm(f"{name}.attn_1.norm", width)
    for projection in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.attn_1.{projection}", width, width, 1)
    yield from _vae_resnet(f"{name}.block_2", width, width)
