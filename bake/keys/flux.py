"""Flux: Black Forest Labs' names (also ComfyUI's) <-> diffusers names, for Flux.1, Chroma and Flux.2."""

from __future__ import annotations

from bake.keys.tables import Table, also, fused, qkv_and_rest, same, swapped, within

_ATTENTION = (
    fused("img_attn.qkv processor.qkv_lora1", "attn.to_q", "attn.to_k", "attn.to_v"),  # the second is XLabs' name
    fused("txt_attn.qkv processor.qkv_lora2", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    same("img_attn.proj processor.proj_lora1", "attn.to_out.0"),
    same("txt_attn.proj processor.proj_lora2", "attn.to_add_out"),
    same("img_attn.norm.query_norm", "attn.norm_q"),
    same("img_attn.norm.key_norm", "attn.norm_k"),
    same("txt_attn.norm.query_norm", "attn.norm_added_q"),
    same("txt_attn.norm.key_norm", "attn.norm_added_k"),
)
_SINGLE_NORMS = (
    same("norm.query_norm", "attn.norm_q"),
    same("norm.key_norm", "attn.norm_k"),
)
_ENDS = (
    same("img_in", "x_embedder"),
    same("txt_in", "context_embedder"),
    same("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)

FLUX = Table(
    *within("double_blocks.#", "transformer_blocks.#", *_ATTENTION),
    *within(
        *("double_blocks.#", "transformer_blocks.#"),
        same("img_mod.lin", "norm1.linear"),
        same("txt_mod.lin", "norm1_context.linear"),
        same("img_mlp.0", "ff.net.0.proj"),
        same("img_mlp.2", "ff.net.2"),
        same("txt_mlp.0", "ff_context.net.0.proj"),
        same("txt_mlp.2", "ff_context.net.2"),
    ),
    *within("single_blocks.#", "single_transformer_blocks.#", *_SINGLE_NORMS),
    *within(
        *("single_blocks.#", "single_transformer_blocks.#"),
        also(
            fused("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", rule=qkv_and_rest),
            *("processor.qkv_lora", "abc"),  # XLabs trains q, k and v of a single block without its MLP
        ),
        same("linear2", "proj_out"),
        same("modulation.lin", "norm.linear"),
    ),
    *_ENDS,
    same("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    same("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    same("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    same("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    same("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    same("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    # Chroma has this in place of all modulations.
    same("distilled_guidance_layer.layers.#.in_layer", "distilled_guidance_layer.layers.#.linear_1"),
    same("distilled_guidance_layer.in_proj"),
    same("distilled_guidance_layer.out_proj"),
    same("distilled_guidance_layer.layers.#.out_layer", "distilled_guidance_layer.layers.#.linear_2"),
)

FLUX2 = Table(
    *within("double_blocks.#", "transformer_blocks.#", *_ATTENTION),
    *within(
        *("double_blocks.#", "transformer_blocks.#"),
        same("img_mlp.0", "ff.linear_in"),
        same("img_mlp.2", "ff.linear_out"),
        same("txt_mlp.0", "ff_context.linear_in"),
        same("txt_mlp.2", "ff_context.linear_out"),
    ),
    *within("single_blocks.#", "single_transformer_blocks.#", *_SINGLE_NORMS),
    *within(
        *("single_blocks.#", "single_transformer_blocks.#"),
        same("linear1", "attn.to_qkv_mlp_proj"),
        same("linear2", "attn.to_out"),
    ),
    *_ENDS,
    same("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    same("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    same("single_stream_modulation.lin", "single_stream_modulation.linear"),
    same("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    same("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    same("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
    same("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
)
