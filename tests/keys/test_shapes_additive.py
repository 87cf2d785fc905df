"""Which tensor a set of factors fits, and which sets contradict themselves."""

from __future__ import annotations

import math
from pathlib import Path

import layouts
import pytest
from support import load

from bake.keys import shapes_additive as rules
from bake.keys.factors import split_key
from bake.keys.unet import translate

FITS = [
    (rules.loha_shape, {"w1_a": (8, 2), "w1_b": (2, 6), "w2_a": (8, 3), "w2_b": (3, 6)}, (8, 6)),
    (
        rules.loha_shape,
        {"w1_a": (8, 2, 1, 1), "w1_b": (2, 6, 3, 3), "w2_a": (8, 2), "w2_b": (2, 54)},
        (8, 54),
    ),
    (
        rules.loha_shape,
        {"w1_a": (2, 8), "w1_b": (3, 6), "t1": (2, 3, 3, 3), "w2_a": (2, 8), "w2_b": (2, 6), "t2": (2, 2, 3, 3)},
        (8, 54),
    ),
    (rules.lokr_shape, {"kron_w1": (2, 3), "kron_w2": (4, 5)}, (8, 15)),
    (rules.lokr_shape, {"kron_w1": (2, 3), "kron_w2": (4, 5, 3, 3)}, (8, 135)),
    (rules.lokr_shape, {"kron_w1_a": (2, 1), "kron_w1_b": (1, 3), "kron_w2_a": (4, 2), "kron_w2_b": (2, 5)}, (8, 15)),
    (rules.lokr_shape, {"kron_w1": (20, 60), "kron_w2_a": (16, 4), "kron_w2_b": (4, 48)}, (320, 2880)),
    (
        rules.lokr_shape,
        {"kron_w1": (2, 3), "kron_w2_a": (2, 4), "kron_w2_b": (2, 5), "kron_t2": (2, 2, 3, 3)},
        (8, 135),
    ),
    (rules.glora_shape, {"a1": (6, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6)}, (8, 6)),
    (rules.glora_shape, {"a1": (2, 6), "a2": (6, 2), "b1": (2, 6), "b2": (8, 2)}, (8, 6)),
    (rules.glora_shape, {"a1": (8, 2), "a2": (2, 8), "b1": (8, 2), "b2": (2, 8)}, (8, 8)),
    (rules.glora_shape, {"a1": (2, 8), "a2": (8, 2), "b1": (2, 8), "b2": (8, 2)}, (8, 8)),
    (
        rules.glora_shape,
        {"a1": (8, 2, 1, 1), "a2": (2, 8, 1, 1), "b1": (8, 2, 1, 1), "b2": (2, 8, 3, 3)},
        (8, 72),
    ),
    (
        rules.glora_shape,
        {"a1": (6, 2, 1, 1), "a2": (2, 6, 1, 1), "b1": (8, 2, 1, 1), "b2": (2, 6, 1, 1), "bm": (2, 2, 3, 3)},
        (8, 54),
    ),
    (rules.ia3_shape, {"ia3_weight": (8,), "on_input": ()}, (None, None)),
    (rules.ia3_shape, {"ia3_weight": (1, 8, 1, 1), "on_input": (1,)}, (None, None)),
    (rules.ia3_peft_shape, {"ia3_l": (8, 1)}, (8, None)),
    (rules.ia3_peft_shape, {"ia3_l": (1, 6)}, (None, 6)),
    (rules.ia3_peft_shape, {"ia3_l": (1, 1)}, (None, None)),
    (rules.ia3_peft_shape, {"ia3_l": (1, 8, 1, 1)}, (None, None)),
    (rules.vera_shape, {"vera_lambda_b": (6,), "vera_lambda_d": (3,), "vera_a": (3, 9), "vera_b": (8, 3)}, (6, None)),
    (rules.adalora_shape, {"up": (8, 3), "down": (3, 6), "lora_e": (3, 1)}, (8, 6)),
    (rules.adalora_shape, {"up": (8, 0), "down": (0, 6), "lora_e": (0, 1)}, (8, 6)),
    (rules.sparse_bias_shape, {"bias_indices": (2, 5), "bias_values": (5,), "bias_size": (2,)}, (None, None)),
    (rules.replacement_shape, {"value": (8, 6, 3, 3)}, (8, 54)),
    (rules.replacement_shape, {"value": (8,)}, (8, 1)),
    (rules.replacement_shape, {"value": ()}, (1, 1)),
]

CONTRADICTIONS = [
    (rules.loha_shape, {"w1_a": (8, 2), "w1_b": (3, 6), "w2_a": (8, 3), "w2_b": (3, 6)}, "ranks of w1_a"),
    (rules.loha_shape, {"w1_a": (8, 2), "w1_b": (2, 6), "w2_a": (8, 3), "w2_b": (3, 7)}, "different shapes"),
    (rules.loha_shape, {"w1_a": (8, 2), "w1_b": (2, 6), "w2_a": (8,), "w2_b": (3, 6)}, "no factors"),
    (rules.loha_shape, {"w1_a": (8, 2, 3, 3), "w1_b": (2, 6), "w2_a": (8, 2), "w2_b": (2, 6)}, "no factors"),
    (
        rules.loha_shape,
        {"w1_a": (2, 8), "w1_b": (2, 6), "t1": (2, 2, 3, 3), "w2_a": (2, 8), "w2_b": (2, 6)},
        "only one of t1 and t2",
    ),
    (
        rules.loha_shape,
        {"w1_a": (2, 8), "w1_b": (2, 6), "t1": (2, 3, 3), "w2_a": (2, 8), "w2_b": (2, 6), "t2": (2, 2, 3)},
        "ranks of w1_a .* t1",
    ),
    (
        rules.loha_shape,
        {"w1_a": (2, 8), "w1_b": (2, 6), "t1": (2, 2), "w2_a": (2, 8), "w2_b": (2, 6), "t2": (2, 2)},
        "no factors",
    ),
    (rules.lokr_shape, {"kron_w1": (2, 3)}, "needs w2"),
    (rules.lokr_shape, {"kron_w1_a": (2, 3), "kron_w2": (4, 5)}, "needs w1"),
    (rules.lokr_shape, {"kron_w1": (2,), "kron_w2": (4, 5)}, "no matrix"),
    (rules.lokr_shape, {"kron_w1": (2, 3), "kron_w2": (4, 5), "kron_w2_a": (4, 1)}, "w2 twice"),
    (rules.lokr_shape, {"kron_w1": (2, 3), "kron_w2": (4, 5), "kron_t2": (1, 1, 3, 3)}, "w2 twice"),
    (rules.lokr_shape, {"kron_w1": (2, 3), "kron_w2_a": (4, 2), "kron_w2_b": (1, 5)}, "ranks of w2_a"),
    (rules.glora_shape, {"a1": (6, 3), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6)}, "ranks"),
    (rules.glora_shape, {"a1": (6,), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6)}, "ranks"),
    (rules.glora_shape, {"a1": (5, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6)}, "inputs"),
    (rules.glora_shape, {"a1": (6, 2), "a2": (2, 6, 3, 3), "b1": (8, 2), "b2": (2, 6, 3, 3)}, "have a kernel"),
    (rules.glora_shape, {"a1": (6, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6), "bm": (3, 2, 3, 3)}, "ranks of b1"),
    (
        rules.glora_shape,
        {"a1": (6, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6, 3, 3), "bm": (2, 2, 3, 3)},
        "kernel of b1",
    ),
    (rules.ia3_shape, {"ia3_weight": (8, 6), "on_input": ()}, "no channels"),
    (rules.ia3_shape, {"ia3_weight": (8,), "on_input": (2,)}, "switch"),
    (rules.ia3_peft_shape, {"ia3_l": (8,)}, "no list"),
    (rules.ia3_peft_shape, {"ia3_l": (8, 6)}, "no list"),
    (rules.vera_shape, {"vera_lambda_b": (6,), "vera_lambda_d": (2,), "vera_a": (3, 9), "vera_b": (8, 3)}, "together"),
    (rules.vera_shape, {"vera_lambda_b": (9,), "vera_lambda_d": (3,), "vera_a": (3, 9), "vera_b": (8, 3)}, "together"),
    (rules.adalora_shape, {"up": (8, 3), "down": (3, 6), "lora_e": (2, 1)}, "ranks of lora_e"),
    (rules.adalora_shape, {"up": (8, 2), "down": (3, 6), "lora_e": (3, 1)}, "ranks of up"),
    (rules.sparse_bias_shape, {"bias_indices": (2, 5), "bias_values": (4,), "bias_size": (2,)}, "sparse"),
    (rules.sparse_bias_shape, {"bias_indices": (2, 5), "bias_values": (5,), "bias_size": (4,)}, "sparse"),
]


@pytest.mark.parametrize(("rule", "shapes", "fit"), FITS)
def test_factors_say_which_tensor_they_fit(rule, shapes, fit) -> None:
    assert rule(shapes) == fit


@pytest.mark.parametrize(("rule", "shapes", "message"), CONTRADICTIONS)
def test_factors_that_contradict_each_other_are_named(rule, shapes, message) -> None:
    with pytest.raises(ValueError, match=message):
        rule(shapes)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("out", "ins"), [(8, 6), (8, 8), (2, 2)])
def test_the_rank_of_glora_is_found_in_either_spelling(first: bool, out: int, ins: int) -> None:
    shapes = {"a1": (ins, 2), "a2": (2, ins), "b1": (out, 2), "b2": (2, ins)}
    if first:
        shapes = {"a1": shapes["a2"], "a2": shapes["a1"], "b1": shapes["b2"], "b2": shapes["b1"]}
    assert rules.glora_rank(shapes) == 2
    assert rules.glora_shape(shapes) == (out, ins)


def test_a_published_early_lokr_fits_the_family_it_was_made_for(shared: Path) -> None:
    """Its convolutions share the kernel between the columns of w1 and w2, so only the products tell."""
    tensors, unet, clip = layouts.sd1(), "model.diffusion_model.", "cond_stage_model.transformer."
    weights = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    names = translate(name.removeprefix(unet) for name in weights if name.startswith(unet))
    targets = {f"lora_unet_{theirs.replace('.', '_')}": f"{unet}{ours}.weight" for ours, theirs in names.items()}
    for name in weights:
        if name.startswith(clip):
            targets[f"lora_te_{name.removeprefix(clip).replace('.', '_')}"] = f"{name}.weight"
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, values in load(shared / "data" / "lokr_kohya_sd15" / "smart_falcon_4_lokr.safetensors").items():
        module, suffix = split_key(key) or pytest.fail(key)
        if suffix.factor != "alpha":
            factors.setdefault(module, {})[suffix.factor] = values.shape
    assert len(factors) == 350
    for module, shapes in factors.items():
        out, *rest = tensors[targets[module]]
        assert rules.lokr_shape(shapes) == (out, math.prod(rest)), module
