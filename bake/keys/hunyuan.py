"""HunyuanVideo and HunyuanImage: Tencent's names, ComfyUI's names <-> diffusers names."""

from __future__ import annotations

from bake.keys.tables import Table, fused, qkv_and_rest, same, swapped, within

# In the first column Tencent's name comes first, ComfyUI's second.
HUNYUAN = Table(
    *within(
        *("double_blocks.#", "transformer_blocks.#"),
        fused("img_attn_qkv img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
        fused("txt_attn_qkv txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        same("img_attn_proj img_attn.proj", "attn.to_out.0"),
        same("txt_attn_proj txt_attn.proj", "attn.to_add_out"),
        same("img_attn_q_norm img_attn.norm.query_norm", "attn.norm_q"),
        same("img_attn_k_norm img_attn.norm.key_norm", "attn.norm_k"),
        same("txt_attn_q_norm txt_attn.norm.query_norm", "attn.norm_added_q"),
        same("txt_attn_k_norm txt_attn.norm.key_norm", "attn.norm_added_k"),
        same("img_mod.linear img_mod.lin", "norm1.linear"),
        same("txt_mod.linear txt_mod.lin", "norm1_context.linear"),
        same("img_mlp.fc1 img_mlp.0", "ff.net.0.proj"),
        same("img_mlp.fc2 img_mlp.2", "ff.net.2"),
        same("txt_mlp.fc1 txt_mlp.0", "ff_context.net.0.proj"),
        same("txt_mlp.fc2 txt_mlp.2", "ff_context.net.2"),
    ),
    *within(
        *("single_blocks.#", "single_transformer_blocks.#"),
        fused("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", rule=qkv_and_rest),
        same("linear2", "proj_out"),
        same("modulation.linear modulation.lin", "norm.linear"),
        same("q_norm norm.query_norm", "attn.norm_q"),
        same("k_norm norm.key_norm", "attn.norm_k"),
    ),
    *within(
        *("txt_in.individual_token_refiner.blocks.#", "context_embedder.token_refiner.refiner_blocks.#"),
        fused("self_attn_qkv self_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
        same("self_attn_proj self_attn.proj", "attn.to_out.0"),
        same("norm1"),
        same("norm2"),
        same("mlp.fc1 mlp.0", "ff.net.0.proj"),
        same("mlp.fc2 mlp.2", "ff.net.2"),
        same("adaLN_modulation.1", "norm_out.linear"),
    ),
    same("txt_in.input_embedder", "context_embedder.proj_in"),
    *within(
        *("txt_in", "context_embedder.time_text_embed"),
        same("t_embedder.mlp.0 t_embedder.in_layer", "timestep_embedder.linear_1"),
        same("t_embedder.mlp.2 t_embedder.out_layer", "timestep_embedder.linear_2"),
        same("c_embedder.linear_1 c_embedder.in_layer", "text_embedder.linear_1"),
        same("c_embedder.linear_2 c_embedder.out_layer", "text_embedder.linear_2"),
    ),
    # diffusers calls the embeddings of time differently in HunyuanVideo, HunyuanImage and HunyuanVideo 1.5.
    same(
        "time_in.mlp.0 time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_1 time_guidance_embed.timestep_embedder.linear_1 "
        "time_embed.timestep_embedder.linear_1",
    ),
    same(
        "time_in.mlp.2 time_in.out_layer",
        "time_text_embed.timestep_embedder.linear_2 time_guidance_embed.timestep_embedder.linear_2 "
        "time_embed.timestep_embedder.linear_2",
    ),
    same(
        "guidance_in.mlp.0 guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_1 time_guidance_embed.guidance_embedder.linear_1",
    ),
    same(
        "guidance_in.mlp.2 guidance_in.out_layer",
        "time_text_embed.guidance_embedder.linear_2 time_guidance_embed.guidance_embedder.linear_2",
    ),
    same("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    same("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    same("img_in.proj", "x_embedder.proj"),
    same("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
    # HunyuanImage and HunyuanVideo 1.5 read glyphs; 1.5 also looks at a first image.
    same("byt5_in.layernorm", "context_embedder_2.norm"),
    same("byt5_in.fc1", "context_embedder_2.linear_1"),
    same("byt5_in.fc2", "context_embedder_2.linear_2"),
    same("byt5_in.fc3", "context_embedder_2.linear_3"),
    same("vision_in.proj.0", "image_embedder.norm_in"),
    same("vision_in.proj.1", "image_embedder.linear_1"),
    same("vision_in.proj.3", "image_embedder.linear_2"),
    same("vision_in.proj.4", "image_embedder.norm_out"),
    same("cond_type_embedding", "cond_type_embed"),
)
