"""Small diffusion transformers in their original layouts: names and shapes, a few lines for each family."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Shapes = dict[str, tuple[int, ...]]
CHANNELS = 4


def linear(path: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{path}.weight": (rows, columns)} | ({f"{path}.bias": (rows,)} if bias else {})


def norms(*paths: str, width: int = 2, leaf: str = "weight") -> Shapes:
    return {f"{path}.{leaf}": (width,) for path in paths}


def below(block: str, *parts: Shapes) -> Shapes:
    return {f"{block}.{name}": shape for part in parts for name, shape in part.items()}


def stack(name: str, count: int, *parts: Shapes) -> Shapes:
    return merged(below(f"{name}.{number}", *parts) for number in range(count))


def merged(parts: Iterable[Shapes]) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def two_layers(path: str, first: str, second: str, width: int, columns: int) -> Shapes:
    return linear(f"{path}.{first}", width, columns) | linear(f"{path}.{second}", width, width)


def _flux_streams(h: int, modulated: bool, gate: int = 1, bias: bool = True) -> Shapes:
    def stream(kind: str) -> Shapes:
        return {
            **linear(f"{kind}_attn.qkv", 3 * h, h, bias),
            **linear(f"{kind}_attn.proj", h, h, bias),
            **norms(f"{kind}_attn.norm.query_norm", f"{kind}_attn.norm.key_norm", leaf="scale"),
            **linear(f"{kind}_mlp.0", 4 * h * gate, h, bias),
            **linear(f"{kind}_mlp.2", h, 4 * h, bias),
            **(linear(f"{kind}_mod.lin", 6 * h, h) if modulated else {}),
        }

    single = {
        **linear("linear1", 3 * h + 4 * h * gate, h, bias),
        **linear("linear2", h, 5 * h, bias),
        **norms("norm.query_norm", "norm.key_norm", leaf="scale"),
        **(linear("modulation.lin", 3 * h, h) if modulated else {}),
    }
    return {
        **stack("double_blocks", 2, stream("img"), stream("txt")),
        **stack("single_blocks", 2, single),
        **linear("img_in", h, CHANNELS, bias),
        **linear("txt_in", h, 6, bias),
        **linear("final_layer.linear", CHANNELS, h, bias),
    }


def flux(h: int = 8) -> Shapes:
    return {
        **_flux_streams(h, True),
        **merged(two_layers(f"{path}_in", "in_layer", "out_layer", h, 6) for path in ("time", "vector", "guidance")),
        **linear("final_layer.adaLN_modulation.1", 2 * h, h),
    }


def chroma(h: int = 8) -> Shapes:
    guide = "distilled_guidance_layer"
    return {
        **_flux_streams(h, False),
        **stack(f"{guide}.layers", 2, linear("in_layer", 6, 6), linear("out_layer", 6, 6)),
        **norms(f"{guide}.norms.0", f"{guide}.norms.1", leaf="scale"),
        **linear(f"{guide}.in_proj", 6, 4),
        **linear(f"{guide}.out_proj", h, 6),
    }


def flux2(h: int = 8) -> Shapes:
    modulations = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    return {
        **_flux_streams(h, False, 2, bias=False),
        **merged(linear(f"{path}.lin", 6 * h, h, False) for path in modulations),
        **merged(linear(f"{path}_in.in_layer", h, 6, False) for path in ("time", "guidance")),
        **merged(linear(f"{path}_in.out_layer", h, h, False) for path in ("time", "guidance")),
        **linear("final_layer.adaLN_modulation.1", 2 * h, h, False),
    }


def sd3(h: int = 8, dual: bool = False, normed: bool = False) -> Shapes:
    def attention(name: str, out: bool = True) -> Shapes:
        normed_names = norms(f"{name}.ln_q", f"{name}.ln_k") if normed else {}
        return linear(f"{name}.qkv", 3 * h, h) | (linear(f"{name}.proj", h, h) if out else {}) | normed_names

    mlp = linear("mlp.fc1", 4 * h, h) | linear("mlp.fc2", h, 4 * h)
    both = attention("attn") | (attention("attn2") if dual else {})
    x = below("x_block", both, mlp, linear("adaLN_modulation.1", (9 if dual else 6) * h, h))
    context = below("context_block", attention("attn"), mlp, linear("adaLN_modulation.1", 6 * h, h))
    last = below("context_block", attention("attn", out=False), linear("adaLN_modulation.1", 2 * h, h))
    return {
        **below("joint_blocks.0", x, context),
        **below("joint_blocks.1", x, last),
        **two_layers("t_embedder.mlp", "0", "2", h, 6),
        **two_layers("y_embedder.mlp", "0", "2", h, 6),
        **{"x_embedder.proj.weight": (h, CHANNELS, 2, 2), "x_embedder.proj.bias": (h,), "pos_embed": (1, 4, h)},
        **linear("context_embedder", h, 6),
        **linear("final_layer.linear", 4 * CHANNELS, h),
        **linear("final_layer.adaLN_modulation.1", 2 * h, h),
    }


def auraflow(h: int = 8) -> Shapes:
    def weights(*paths: str, rows: int = h) -> Shapes:
        return merged(linear(path, rows, h, False) for path in paths)

    attention = {kind: weights(*(f"attn.w{kind}{leaf}" for leaf in "qkvo")) for kind in (1, 2)}
    double = [
        weights("modX.1", "modC.1", rows=6 * h),
        weights("mlpX.c_fc1", "mlpX.c_fc2", "mlpX.c_proj", "mlpC.c_fc1", "mlpC.c_fc2", "mlpC.c_proj"),
    ]
    single = [weights("modCX.1", rows=6 * h), weights("mlp.c_fc1", "mlp.c_fc2", "mlp.c_proj")]
    return {
        **stack("double_layers", 2, attention[1], attention[2], *double),
        **stack("single_layers", 2, attention[1], *single),
        **{"positional_encoding": (1, 4, h), "register_tokens": (1, 2, h)},
        **linear("init_x_linear", h, 6),
        **linear("cond_seq_linear", h, 6, False),
        **two_layers("t_embedder.mlp", "0", "2", h, 6),
        **linear("final_linear", CHANNELS, h, False),
        **linear("modF.1", 2 * h, h, False),
    }


def pixart(h: int = 8) -> Shapes:
    block = {
        **linear("attn.qkv", 3 * h, h),
        **merged(linear(path, h, h) for path in ("attn.proj", "cross_attn.q_linear", "cross_attn.proj")),
        **linear("cross_attn.kv_linear", 2 * h, h),
        **linear("mlp.fc1", 4 * h, h),
        **linear("mlp.fc2", h, 4 * h),
        **{"scale_shift_table": (6, h)},
    }
    return {
        **stack("blocks", 2, block),
        **{"x_embedder.proj.weight": (h, CHANNELS, 2, 2), "x_embedder.proj.bias": (h,)},
        **two_layers("t_embedder.mlp", "0", "2", h, 256),
        **two_layers("y_embedder.y_proj", "fc1", "fc2", h, 6),
        **linear("t_block.1", 6 * h, h),
        **linear("final_layer.linear", 4 * CHANNELS, h),
        **{"final_layer.scale_shift_table": (2, h)},
    }


def sana(h: int = 8) -> Shapes:
    block = {
        **linear("attn.qkv", 3 * h, h, False),
        **merged(linear(path, h, h) for path in ("attn.proj", "cross_attn.q_linear", "cross_attn.proj")),
        **linear("cross_attn.kv_linear", 2 * h, h),
        **{"scale_shift_table": (6, h), "mlp.inverted_conv.conv.weight": (2 * h, h, 1, 1)},
        **{"mlp.inverted_conv.conv.bias": (2 * h,), "mlp.point_conv.conv.weight": (h, h, 1, 1)},
        **{"mlp.depth_conv.conv.weight": (2 * h, 1, 3, 3), "mlp.depth_conv.conv.bias": (2 * h,)},
    }
    return {
        **stack("blocks", 2, block),
        **{"pos_embed": (1, 4, h), "y_embedder.y_embedding": (4, 6), "final_layer.scale_shift_table": (2, h)},
        **{"x_embedder.proj.weight": (h, CHANNELS, 1, 1), "x_embedder.proj.bias": (h,)},
        **two_layers("t_embedder.mlp", "0", "2", h, 6),
        **two_layers("y_embedder.y_proj", "fc1", "fc2", h, 6),
        **linear("t_block.1", 6 * h, h),
        **norms("attention_y_norm"),
        **linear("final_layer.linear", CHANNELS, h),
    }


def _lumina(h: int, kv: int, adaln: str, *parts: Shapes) -> Shapes:
    block = {
        **linear("attention.qkv", h + 2 * kv, h, False),
        **linear("attention.out", h, h, False),
        **norms("attention.q_norm", "attention.k_norm", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
        **linear("feed_forward.w1", 2 * h, h, False),
        **linear("feed_forward.w2", h, 2 * h, False),
        **linear("feed_forward.w3", 2 * h, h, False),
    }
    modulation = linear(adaln, 4 * h, 4)
    return {
        **stack("layers", 2, block, modulation),
        **stack("noise_refiner", 2, block, modulation),
        **stack("context_refiner", 2, block),
        **norms("cap_embedder.0"),
        **linear("cap_embedder.1", h, 6),
        **two_layers("t_embedder.mlp", "0", "2", 4, 6),
        **linear("x_embedder", h, CHANNELS),
        **linear("final_layer.linear", CHANNELS, h),
        **linear("final_layer.adaLN_modulation.1", h, 4),
        **merged(parts),
    }


def lumina2(h: int = 12, kv: int = 4) -> Shapes:
    return _lumina(h, kv, "adaLN_modulation.1", norms("norm_final"))


def z_image(h: int = 8) -> Shapes:
    return _lumina(h, h, "adaLN_modulation.0", {"x_pad_token": (1, h), "cap_pad_token": (1, h)})


def hunyuan(h: int = 8) -> Shapes:
    def stream(kind: str) -> Shapes:
        return {
            **linear(f"{kind}_attn_qkv", 3 * h, h),
            **linear(f"{kind}_attn_proj", h, h),
            **norms(f"{kind}_attn_q_norm", f"{kind}_attn_k_norm"),
            **linear(f"{kind}_mlp.fc1", 4 * h, h),
            **linear(f"{kind}_mlp.fc2", h, 4 * h),
            **linear(f"{kind}_mod.linear", 6 * h, h),
        }

    single = {
        **linear("linear1", 7 * h, h),
        **linear("linear2", h, 5 * h),
        **norms("q_norm", "k_norm"),
        **linear("modulation.linear", 3 * h, h),
    }
    refiner = {
        **linear("self_attn_qkv", 3 * h, h),
        **linear("self_attn_proj", h, h),
        **merged({f"{path}.weight": (h,), f"{path}.bias": (h,)} for path in ("norm1", "norm2")),
        **linear("mlp.fc1", 4 * h, h),
        **linear("mlp.fc2", h, 4 * h),
        **linear("adaLN_modulation.1", 2 * h, h),
    }
    return {
        **stack("double_blocks", 2, stream("img"), stream("txt")),
        **stack("single_blocks", 2, single),
        **stack("txt_in.individual_token_refiner.blocks", 2, refiner),
        **linear("txt_in.input_embedder", h, 6),
        **two_layers("txt_in.t_embedder.mlp", "0", "2", h, 6),
        **two_layers("txt_in.c_embedder", "linear_1", "linear_2", h, 6),
        **two_layers("time_in.mlp", "0", "2", h, 6),
        **two_layers("guidance_in.mlp", "0", "2", h, 6),
        **two_layers("vector_in", "in_layer", "out_layer", h, 6),
        **{"img_in.proj.weight": (h, CHANNELS, 1, 2, 2), "img_in.proj.bias": (h,)},
        **linear("final_layer.linear", 4 * CHANNELS, h),
        **linear("final_layer.adaLN_modulation.1", 2 * h, h),
    }


# Tencent's names -> ComfyUI's, in the order of replacing.
_COMFY_HUNYUAN = (
    *(("_attn_q_norm.weight", "_attn.norm.query_norm.scale"), ("_attn_k_norm.weight", "_attn.norm.key_norm.scale")),
    *((".q_norm.weight", ".norm.query_norm.scale"), (".k_norm.weight", ".norm.key_norm.scale")),
    *(("_attn_qkv.", "_attn.qkv."), ("_attn_proj.", "_attn.proj."), ("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.2.")),
    *(("_mod.linear.", "_mod.lin."), ("modulation.linear.", "modulation.lin.")),
    *(("c_embedder.linear_1.", "c_embedder.in_layer."), ("c_embedder.linear_2.", "c_embedder.out_layer.")),
    *(("t_embedder.mlp.0.", "t_embedder.in_layer."), ("t_embedder.mlp.2.", "t_embedder.out_layer.")),
    *(("time_in.mlp.0.", "time_in.in_layer."), ("time_in.mlp.2.", "time_in.out_layer.")),
    *(("guidance_in.mlp.0.", "guidance_in.in_layer."), ("guidance_in.mlp.2.", "guidance_in.out_layer.")),
)


def hunyuan_comfy(h: int = 8) -> Shapes:
    renamed = {}
    for name, shape in hunyuan(h).items():
        for theirs, ours in _COMFY_HUNYUAN:
            name = name.replace(theirs, ours)
        renamed[name] = shape
    return renamed


def wan(h: int = 8, images: bool = False) -> Shapes:
    def attention(kind: str, more: tuple[str, ...] = ()) -> Shapes:
        return merged(linear(f"{kind}.{leaf}", h, h) for leaf in (*"qkvo", *more)) | norms(
            f"{kind}.norm_q", f"{kind}.norm_k"
        )

    block = {
        **attention("self_attn"),
        **attention("cross_attn", ("k_img", "v_img") if images else ()),
        **(norms("cross_attn.norm_k_img") if images else {}),
        **linear("ffn.0", 4 * h, h),
        **linear("ffn.2", h, 4 * h),
        **{"modulation": (1, 6, h), "norm3.weight": (h,), "norm3.bias": (h,)},
    }
    image = {
        **{"img_emb.proj.0.weight": (6,), "img_emb.proj.0.bias": (6,)},
        **{"img_emb.proj.4.weight": (h,), "img_emb.proj.4.bias": (h,)},
        **linear("img_emb.proj.1", 6, 6),
        **linear("img_emb.proj.3", h, 6),
    }
    return {
        **stack("blocks", 2, block),
        **(image if images else {}),
        **two_layers("time_embedding", "0", "2", h, 6),
        **two_layers("text_embedding", "0", "2", h, 6),
        **linear("time_projection.1", 6 * h, h),
        **{"patch_embedding.weight": (h, CHANNELS * (2 if images else 1), 1, 2, 2), "patch_embedding.bias": (h,)},
        **{"head.modulation": (1, 2, h)},
        **linear("head.head", 4 * CHANNELS, h),
    }


def qwen_image(h: int = 8) -> Shapes:
    streams = merged(
        linear(f"attn.{name}", h, h)
        for name in (
            *("to_q", "to_k", "to_v", "to_out.0"),
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        )
    )
    block = {
        **streams,
        **norms("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
        **merged(
            linear(f"{kind}_mlp.net.0.proj", 4 * h, h)
            | linear(f"{kind}_mlp.net.2", h, 4 * h)
            | linear(f"{kind}_mod.1", 6 * h, h)
            for kind in ("img", "txt")
        ),
    }
    return {
        **stack("transformer_blocks", 2, block),
        **linear("img_in", h, CHANNELS),
        **linear("txt_in", h, 6),
        **norms("txt_norm", width=6),
        **linear("norm_out.linear", 2 * h, h),
        **linear("proj_out", CHANNELS, h),
    }


def ltx_video(h: int = 8) -> Shapes:
    def attention(kind: str) -> Shapes:
        return merged(linear(f"{kind}.{leaf}", h, h) for leaf in ("to_q", "to_k", "to_v", "to_out.0")) | norms(
            f"{kind}.q_norm", f"{kind}.k_norm"
        )

    feed = linear("ff.net.0.proj", 4 * h, h) | linear("ff.net.2", h, 4 * h) | {"scale_shift_table": (6, h)}
    return {
        **stack("transformer_blocks", 2, attention("attn1"), attention("attn2"), feed),
        **linear("patchify_proj", h, CHANNELS),
        **linear("adaln_single.linear", 6 * h, h),
        **two_layers("adaln_single.emb.timestep_embedder", "linear_1", "linear_2", h, 6),
        **two_layers("caption_projection", "linear_1", "linear_2", h, 6),
        **linear("proj_out", CHANNELS, h),
        **{"scale_shift_table": (2, h)},
    }


def mochi(h: int = 8, context: int = 4, layers: int = 48) -> Shapes:
    x = {
        **linear("mod_x", 4 * h, h),
        **linear("attn.qkv_x", 3 * h, h, False),
        **linear("attn.qkv_y", 3 * h, context, False),
        **linear("attn.proj_x", h, h),
        **norms("attn.q_norm_x", "attn.k_norm_x", "attn.q_norm_y", "attn.k_norm_y"),
        **linear("mlp_x.w1", 4 * h, h, False),
        **linear("mlp_x.w2", h, 2 * h, False),
    }
    y = {
        **linear("mod_y", 4 * context, h),
        **linear("attn.proj_y", context, h),
        **linear("mlp_y.w1", 4 * context, context, False),
        **linear("mlp_y.w2", context, 2 * context, False),
    }
    return {
        **stack("blocks", layers - 1, x, y),
        **below(f"blocks.{layers - 1}", x, linear("mod_y", context, h)),
        **{"x_embedder.proj.weight": (h, CHANNELS, 2, 2), "x_embedder.proj.bias": (h,), "pos_frequencies": (3, 2, 2)},
        **two_layers("t_embedder.mlp", "0", "2", h, 6),
        **merged(linear(f"t5_y_embedder.{leaf}", h, 6) for leaf in ("to_kv", "to_q", "to_out")),
        **linear("t5_yproj", context, 6),
        **linear("final_layer.linear", CHANNELS, h),
        **linear("final_layer.mod", 2 * h, h),
    }


def _cascade(h: int) -> Shapes:
    attention = {
        **{"attention.attn.in_proj_weight": (3 * h, h), "attention.attn.in_proj_bias": (3 * h,)},
        **linear("attention.attn.out_proj", h, h),
        **linear("kv_mapper.1", h, h),
    }
    resnet = {**linear("channelwise.0", 4 * h, h), "depthwise.weight": (h, 1, 3, 3), "depthwise.bias": (h,)}
    return {
        **merged(
            {**below(f"{side}_blocks.0.0", resnet), **below(f"{side}_blocks.0.2", attention)} for side in ("down", "up")
        ),
        **{"clf.1.weight": (CHANNELS, h, 1, 1), "clf.1.bias": (CHANNELS,)},
        **{"embedding.1.weight": (h, CHANNELS, 1, 1), "embedding.1.bias": (h,)},
    }


def cascade_c(h: int = 8) -> Shapes:
    return _cascade(h) | linear("clip_txt_mapper", h, 6) | linear("clip_txt_pooled_mapper", 4 * h, 6)


def cascade_b(h: int = 8) -> Shapes:
    return _cascade(h) | linear("clip_mapper", 4 * h, 6)


# name -> (family, variant, original layout, diffusers' own converter, width it takes for granted)
MODELS: dict[str, tuple[str, str | None, Callable[..., Shapes], str, int]] = {
    "flux": ("flux", None, flux, "convert_flux_transformer_checkpoint_to_diffusers", 3072),
    "chroma": ("chroma", None, chroma, "convert_chroma_transformer_checkpoint_to_diffusers", 3072),
    "flux2": ("flux2", None, flux2, "convert_flux2_transformer_checkpoint_to_diffusers", 8),
    "sd3": ("sd3", "medium", sd3, "convert_sd3_transformer_checkpoint_to_diffusers", 8),
    "sd35-large": (
        *("sd3", "3.5-large"),
        *(lambda h=8: sd3(h, normed=True), "convert_sd3_transformer_checkpoint_to_diffusers", 8),
    ),
    "sd35-medium": (
        *("sd3", "3.5-medium"),
        *(lambda h=8: sd3(h, True, True), "convert_sd3_transformer_checkpoint_to_diffusers", 8),
    ),
    "auraflow": ("auraflow", None, auraflow, "convert_auraflow_transformer_checkpoint_to_diffusers", 8),
    "sana": ("sana", None, sana, "convert_sana_transformer_to_diffusers", 8),
    "lumina2": ("lumina2", None, lumina2, "convert_lumina2_to_diffusers", 2304),
    "z-image": ("z-image", None, z_image, "convert_z_image_transformer_checkpoint_to_diffusers", 8),
    "hunyuan": ("hunyuan-video", None, hunyuan, "convert_hunyuan_video_transformer_to_diffusers", 3072),
    "wan": ("wan", None, wan, "convert_wan_transformer_to_diffusers", 8),
    "wan-i2v": (
        *("wan", "image-to-video"),
        *(lambda h=8: wan(h, images=True), "convert_wan_transformer_to_diffusers", 8),
    ),
    "ltx": ("ltxv", None, ltx_video, "convert_ltx_transformer_checkpoint_to_diffusers", 8),
    "mochi": ("mochi", None, mochi, "convert_mochi_transformer_checkpoint_to_diffusers", 8),
    "cascade-c": ("stable-cascade", "stage-c", cascade_c, "convert_stable_cascade_unet_single_file_to_diffusers", 8),
    "cascade-b": ("stable-cascade", "stage-b", cascade_b, "convert_stable_cascade_unet_single_file_to_diffusers", 8),
}
