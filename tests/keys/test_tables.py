"""The tables of the DiT families against diffusers' own converters, and the engine by itself."""

from __future__ import annotations

import dits
import numpy as np
import pytest
from covering import converted, cover, flat_collisions, gather, modules_of

from bake.identify.checkpoint import _components_of_file
from bake.keys.modules import TABLES, Component, ModuleIndex
from bake.keys.places import Place
from bake.keys.tables import Table, aliases, fused, same, swapped, within

MODELS = list(dits.MODELS)
# Tensors that one layout has and the other has not.
UNPAIRED = {
    "norm_final.weight",  # Lumina 2: never used
    *("pos_embed", "y_embedder.y_embedding"),  # Sana: computed, and for training only
}


def index_of(shapes) -> ModuleIndex:
    return ModuleIndex(tuple(_components_of_file("", shapes)), shapes)


def spellings_of(shapes):
    return index_of(shapes).spellings[index_of(shapes).components[0].name]


def original_of(name: str, true_width: bool):
    _, _, build, _, width = dits.MODELS[name]
    if not true_width:
        return build()
    return build(width, 768) if name == "lumina2" else build(width)


@pytest.mark.parametrize("name", MODELS)
def test_rows_meet_where_diffusers_converter_puts_them(name: str) -> None:
    original = original_of(name, true_width=True)
    diffusers, rows, their_rows = converted(name, original)
    for base, base_rows, other, other_rows in (
        (original, rows, diffusers, their_rows),
        (diffusers, their_rows, original, rows),
    ):
        spellings = spellings_of(base)
        homeless, unreached = cover(spellings, base, other)
        assert homeless | unreached <= UNPAIRED
        for module, tensors in modules_of(other).items():
            for parameter, tensor in tensors.items():
                if tensor not in homeless:
                    found = gather(spellings[module][parameter], base_rows, base)
                    np.testing.assert_array_equal(found, other_rows[tensor], err_msg=tensor)


def meta_model(name: str, **config):
    """Names and shapes of one of diffusers' models."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config)
    return {tensor: tuple(values.shape) for tensor, values in model.state_dict().items()}


def test_pixart_has_the_names_of_diffusers_model() -> None:
    """diffusers converts PixArt in a script of its own, so only names and shapes are compared."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 4, "cross_attention_dim": 8, "num_layers": 2}
    sizes = {"in_channels": dits.CHANNELS, "out_channels": dits.CHANNELS, "caption_channels": 6, "sample_size": 8}
    diffusers = meta_model("PixArtTransformer2DModel", **heads, **sizes)
    for base, other in ((dits.pixart(), diffusers), (diffusers, dits.pixart())):
        assert cover(spellings_of(base), base, other) == (set(), set())


TINY = {"num_attention_heads": 2, "attention_head_dim": 4}
LATER = [
    ("HunyuanImageTransformer2DModel", "hunyuan-video", {**TINY, "num_layers": 2, "num_single_layers": 2}),
    ("HunyuanVideo15Transformer3DModel", "hunyuan-video", {**TINY, "num_layers": 2}),
    ("WanVACETransformer3DModel", "wan", {**TINY, "num_layers": 2, "vace_layers": [0], "ffn_dim": 8}),
    ("PixArtTransformer2DModel", "pixart", {**TINY, "num_layers": 2, "caption_channels": 6, "sample_size": 128}),
]
SAME_IN_BOTH = {"patch_embedding", "vace_patch_embedding", "caption_projection.y_embedding"}


@pytest.mark.parametrize(("model", "family", "config"), LATER, ids=[model for model, _, _ in LATER])
def test_every_module_of_later_models_is_in_the_familys_table(model: str, family: str, config) -> None:
    shapes = meta_model(model, **config)
    index = index_of(shapes)
    assert index.components[0].naming == family
    own = modules_of(shapes)
    others = {path: places for path, places in index.spellings["transformer"].items() if path not in own}
    reached = {place.tensor for parameters in others.values() for places in parameters.values() for place in places}
    assert {module for module, tensors in own.items() if not set(tensors.values()) <= reached} <= SAME_IN_BOTH


@pytest.mark.parametrize("name", MODELS)
def test_both_layouts_are_recognised_at_any_width(name: str) -> None:
    original = original_of(name, true_width=False)
    assert _components_of_file("", original)[0].naming == dits.MODELS[name][0]
    if dits.MODELS[name][4] == 8:
        diffusers, _, _ = converted(name, original)
        assert _components_of_file("", diffusers)[0].naming == dits.MODELS[name][0]


@pytest.mark.parametrize("name", [*MODELS, "hunyuan-comfy"])
def test_no_two_modules_flatten_alike(name: str) -> None:
    flat_collisions(index_of(dits.hunyuan_comfy() if name == "hunyuan-comfy" else original_of(name, False)))


def test_comfyui_and_tencent_spell_hunyuans_modules_for_each_other() -> None:
    tencent, comfy = dits.hunyuan(), dits.hunyuan_comfy()
    for base, other in ((tencent, comfy), (comfy, tencent)):
        assert cover(spellings_of(base), base, other) == (set(), set())


KNOWN = """
flux       transformer_blocks.1.attn.to_k                weight  double_blocks.1.img_attn.qkv.weight[8:16]
flux       transformer_blocks.1.attn.add_v_proj          bias    double_blocks.1.txt_attn.qkv.bias[16:24]
flux       transformer_blocks.0.attn.to_out              weight  double_blocks.0.img_attn.proj.weight
flux       transformer_blocks.0.attn.norm_q              weight  double_blocks.0.img_attn.norm.query_norm.scale
flux       double_blocks.0.img_attn.norm.query_norm      weight  double_blocks.0.img_attn.norm.query_norm.scale
flux       single_transformer_blocks.0.proj_mlp          weight  single_blocks.0.linear1.weight[24:56]
flux       single_blocks.0.processor.qkv_lora            weight  single_blocks.0.linear1.weight[0:24]
auraflow   norm_out.linear                               weight  modF.1.weight[8:16] modF.1.weight[0:8]
sd3        transformer_blocks.0.norm1_context.linear     bias    joint_blocks.0.context_block.adaLN_modulation.1.bias
lumina2    layers.1.attn.to_q                            weight  layers.1.attention.qkv.weight[0:12]
lumina2    layers.1.attn.to_v                            weight  layers.1.attention.qkv.weight[16:20]
z-image    layers.1.attention.to_v                       weight  layers.1.attention.qkv.weight[16:24]
hunyuan    double_blocks.0.img_attn.qkv                  weight  double_blocks.0.img_attn_qkv.weight
wan        blocks.1.norm2                                bias    blocks.1.norm3.bias
cascade-c  down_blocks.0.2.attention.to_k                bias    down_blocks.0.2.attention.attn.in_proj_bias[8:16]
cascade-c  up_blocks.0.2.attention.attn.in_proj_weight   weight  up_blocks.0.2.attention.attn.in_proj_weight
"""


@pytest.mark.parametrize("line", KNOWN.strip().splitlines(), ids=lambda line: " ".join(line.split()[:2]))
def test_known_places(line: str) -> None:
    """Written down by hand, from what Black Forest Labs, Stability and the others publish; places in update order."""
    name, module, parameter, *expected = line.split()
    places = spellings_of(original_of(name, true_width=False))[module][parameter]
    assert [place.tensor + (f"[{place.rows[0]}:{place.rows[1]}]" if place.rows else "") for place in places] == expected
    assert (len(places) == 1) == (places[0].part is None)


def test_only_the_last_context_block_of_sd3_is_exchanged() -> None:
    tensor = "joint_blocks.1.context_block.adaLN_modulation.1.weight"
    places = spellings_of(dits.sd3())["transformer_blocks.1.norm1_context.linear"]["weight"]
    assert places == (Place(tensor, (8, 16), False, (0, 8)), Place(tensor, (0, 8), False, (8, 16)))


SPLIT = Table(*within("a.#", "b.#", fused("qkv", "q", "k", "v")), swapped("mod", "norm"), same("in other", "first"))


def test_a_fused_name_on_a_split_base_takes_its_rows_one_after_the_other() -> None:
    own = {f"b.7.{leaf}": {"weight": (Place(leaf),)} for leaf in "qkv"}
    found = aliases(SPLIT, own, {"q": (4, 4), "k": (2, 4), "v": (2, 4)})
    assert found == {"a.7.qkv": {"weight": (
        Place("q", None, False, (0, 4)), Place("k", None, False, (4, 6)), Place("v", None, False, (6, 8)),
    )}}  # fmt: skip


def test_a_name_is_only_made_where_all_its_parts_are() -> None:
    own = {f"b.7.{leaf}": {"weight": (Place(leaf),)} for leaf in "qk"}
    assert aliases(SPLIT, own, {"q": (4, 4), "k": (4, 4)}) == {}


def test_a_bias_that_only_some_parts_have_is_left_out() -> None:
    own = {f"b.7.{leaf}": {"weight": (Place(leaf),)} for leaf in "qkv"}
    own["b.7.q"]["bias"] = (Place("q_bias"),)
    found = aliases(SPLIT, own, {"q": (4, 4), "k": (4, 4), "v": (4, 4), "q_bias": (4,)})
    assert set(found["a.7.qkv"]) == {"weight"}


@pytest.mark.parametrize("shapes", [{"w": (10, 4)}, {"w": (12,)}, {"w": ()}, {"w": (12, 4), "b": (9,)}])
def test_a_fused_tensor_of_another_shape_has_only_its_own_name(shapes) -> None:
    own = {"a.7.qkv": {"weight": (Place("w"),)} | ({"bias": (Place("b"),)} if "b" in shapes else {})}
    assert aliases(SPLIT, own, shapes) == {}


def test_all_names_of_a_module_lead_to_it() -> None:
    assert aliases(SPLIT, {"other": {"weight": (Place("w"),)}}, {"w": (2, 2)}) == {
        "in": {"weight": (Place("w"),)},
        "first": {"weight": (Place("w"),)},
    }


def test_exchanged_halves_come_back() -> None:
    own = {"norm": {"weight": (Place("w"),)}}
    (first, second) = aliases(SPLIT, own, {"w": (6, 2)})["mod"]["weight"]
    assert (first.rows, first.part, second.rows, second.part) == ((3, 6), (0, 3), (0, 3), (3, 6))


def test_a_scale_beside_a_weight_is_a_module_of_its_own() -> None:
    index = ModuleIndex((Component("model", "", "plain"),), {"a.weight": (2, 2), "a.scale": (1,), "b.scale": (2,)})
    assert index.spellings["model"] == {
        "a": {"weight": (Place("a.weight"),)},
        "a.scale": {"weight": (Place("a.scale"),)},
        "b": {"weight": (Place("b.scale"),)},
    }


def test_a_t5_keeps_both_copies_of_its_embedding_equal() -> None:
    shapes = {"shared.weight": (4, 2), "encoder.embed_tokens.weight": (4, 2), "encoder.final_layer_norm.weight": (2,)}
    spellings = ModuleIndex((Component("te3", "", "t5"),), shapes).spellings["te3"]
    both = (Place("shared.weight"), Place("encoder.embed_tokens.weight"))
    assert spellings["shared"]["weight"] == spellings["encoder.embed_tokens"]["weight"] == both
    only = ModuleIndex((Component("te3", "", "t5"),), {"shared.weight": (4, 2)}).spellings["te3"]
    assert only["encoder.embed_tokens"]["weight"] == (Place("shared.weight"),)


def test_tables_name_every_row_once_in_each_layout() -> None:
    """A pattern listed twice means the same part, or is told apart by its shape."""
    for family, table in TABLES.items():
        for pattern, entries in table.by_pattern.items():
            assert len(entries) == len({place for place, _ in entries}), (family, pattern)
            assert len(entries) == 1 or all(table.rules[place] for place, _ in entries[:-1]), (family, pattern)
