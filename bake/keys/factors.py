"""The adapter algorithms bake knows by name, and every spelling of their factors.

An adapter key is MODULE + "." + SUFFIX. The suffix names a factor (`SUFFIXES`); the factors a module
has name its algorithm (`ALGORITHMS`). The maths lives in `bake.adapters`, one function per row with
a shape; rows without one are recognised so that they can be refused by name.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from bake.keys import shapes_additive as additive
from bake.keys import shapes_transforms as transforms
from bake.keys.shapes_additive import Fit, Shape, Shapes

ExtentRule = Callable[[Shapes], Fit]

RankRule = Callable[[Shapes], int | None]
# How many rows of an update hang together, so that they are changed together or not at all; None: all of them.
BlockRule = Callable[[Shapes], int | None]


class Suffix(NamedTuple):
    """What the end of an adapter key says."""

    factor: str
    parameter: str = "weight"  # which parameter of the module it updates
    transposed: bool = False  # the update is stored (in, out)
    part: int | None = None  # which of the module's projections it is for; see bake.keys.dialects.part_of


_UP, _DOWN, _MAGNITUDE = Suffix("up"), Suffix("down"), Suffix("magnitude")

SUFFIXES: dict[str, Suffix] = {
    # LoRA, LoCon                                     written by
    "lora_up.weight": _UP,  #                         kohya, LyCORIS, OneTrainer
    "lora_down.weight": _DOWN,
    "lora_mid.weight": Suffix("mid"),  #              LyCORIS, Tucker form
    "lora_B.weight": _UP,  #                          PEFT, diffusers since 0.26
    "lora_A.weight": _DOWN,
    "lora_B": _UP,  #                                 Mochi; PEFT's AdaLoRA
    "lora_A": _DOWN,
    "lora.up.weight": _UP,  #                         diffusers 0.18 to 0.25
    "lora.down.weight": _DOWN,
    "lora_linear_layer.up.weight": _UP,  #            diffusers, text encoders
    "lora_linear_layer.down.weight": _DOWN,
    "lora_embedding_B": Suffix("up", transposed=True),  # PEFT, on embeddings: update is (B @ A) transposed
    "lora_embedding_A": Suffix("down", transposed=True),
    "alpha": Suffix("alpha"),
    "scale": Suffix("scale"),  #                      A1111: replaces alpha / rank
    # beside a LoRA
    "lora_B.bias": Suffix("up_bias"),  #              PEFT lora_bias, BFL control LoRAs
    "lora_up.bias": Suffix("up_bias"),  #             ai-toolkit use_bias, outside its PEFT form
    "lora_bias": Suffix("up_bias"),
    "dora_scale": _MAGNITUDE,  #                      LyCORIS, OneTrainer
    "magnitude": _MAGNITUDE,  #                       ai-toolkit
    "lora_magnitude_vector": _MAGNITUDE,  #           PEFT: always along the output axis
    "lora_magnitude_vector.weight": _MAGNITUDE,  #    PEFT in a raw state dict, diffusers
    "reshape_weight": Suffix("reshape_weight"),  #    ComfyUI: the target grows to this shape
    "bias_indices": Suffix("bias_indices"),  #        LyCORIS extract, a sparse remainder
    "bias_values": Suffix("bias_values"),
    "bias_size": Suffix("bias_size"),
    "lora_E": Suffix("lora_e"),  #                    PEFT AdaLoRA
    "ranknum": Suffix("rank_num"),
    # full differences, norms, whole tensors
    "diff": Suffix("diff"),  #                        LyCORIS full, ComfyUI
    "diff_b": Suffix("diff", "bias"),
    "w_norm": Suffix("diff"),  #                      LyCORIS train_norm
    "b_norm": Suffix("diff", "bias"),
    "set_weight": Suffix("value"),  #                 ComfyUI
    "base_layer.weight": Suffix("value"),  #          PEFT, embeddings and heads that it saves whole
    "base_layer.bias": Suffix("value", "bias"),  #    PEFT, bias="lora_only"
    "modules_to_save.weight": Suffix("value"),
    "modules_to_save.bias": Suffix("value", "bias"),
    "ln_tuning_layers.weight": Suffix("value"),  #    PEFT LN tuning
    "ln_tuning_layers.bias": Suffix("value", "bias"),
    "trainable_tokens_delta": Suffix("token_rows"),  # PEFT: whole rows, despite the name
    "token_adapter.trainable_tokens_delta": Suffix("token_rows"),
    # LoHa, LoKr: LyCORIS, PEFT, OneTrainer
    "hada_w1_a": Suffix("w1_a"),
    "hada_w1_b": Suffix("w1_b"),
    "hada_w2_a": Suffix("w2_a"),
    "hada_w2_b": Suffix("w2_b"),
    "hada_t1": Suffix("t1"),
    "hada_t2": Suffix("t2"),
    "lokr_w1": Suffix("kron_w1"),
    "lokr_w1_a": Suffix("kron_w1_a"),
    "lokr_w1_b": Suffix("kron_w1_b"),
    "lokr_w2": Suffix("kron_w2"),
    "lokr_w2_a": Suffix("kron_w2_a"),
    "lokr_w2_b": Suffix("kron_w2_b"),
    "lokr_t2": Suffix("kron_t2"),
    # (IA)3; LyCORIS keeps the vector itself under `weight`, see split_key
    "on_input": Suffix("on_input"),
    "ia3_l": Suffix("ia3_l"),  #                      PEFT
    # GLoRA: LyCORIS
    "a1.weight": Suffix("a1"),
    "a2.weight": Suffix("a2"),
    "b1.weight": Suffix("b1"),
    "b2.weight": Suffix("b2"),
    "bm.weight": Suffix("bm"),
    # rotations and reflections
    "oft_blocks": Suffix("oft_blocks"),  #            kohya, LyCORIS; BOFT where it has 4 axes
    "oft_diag": Suffix("oft_diag"),  #                LyCORIS before 2.0
    "oft_R.weight": Suffix("oft_r"),  #               PEFT, OneTrainer
    "oft_R.scaled_oft": Suffix("scaled_oft"),  #      OneTrainer
    "rescale": Suffix("rescale"),
    "boft_R": Suffix("boft_r"),  #                    PEFT
    "boft_s": Suffix("boft_s"),
    "hra_u": Suffix("hra_u"),
    # VeRA: the two shared matrices stand under the module `base_model`
    "vera_lambda_b": Suffix("vera_lambda_b"),
    "vera_lambda_d": Suffix("vera_lambda_d"),
    "vera_A": Suffix("vera_a"),
    "vera_B": Suffix("vera_b"),
    # LyCORIS T-LoRA: a difference from factors that it makes out of the base by SVD and does not store
    "q_layer.weight": Suffix("tlora_q"),
    "p_layer.weight": Suffix("tlora_p"),
    "lambda_layer": Suffix("tlora_lambda"),
    # MLX: stored (in, rank) and (rank, out)
    "lora_a": Suffix("mlx_a"),
    "lora_b": Suffix("mlx_b"),
    "m": _MAGNITUDE,  #                               of its DoRA, along the outputs
}

# PEFT types that are only recognised, with the tensors they keep. Source: PEFT 0.21 tuners/*/layer.py
UNFUSED_PEFT = {
    "AdaMSS": ("adamss_A", "adamss_B"),
    "BEFT": ("beft_bias",),
    "C3A": ("c3a_kernel",),
    "DEFT": ("deft_P", "deft_R"),
    "DeLoRA": ("delora_A", "delora_B", "delora_lambda"),
    "FourierFT": ("fourierft_spectrum",),
    "FRoD": ("frod_lambda_l", "frod_lambda_s_values"),
    "GLoRA as PEFT stores it": ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E"),
    "GraLoRA": ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
    "HiRA": ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    "Lily": ("lily_A", "lily_B", "lily_router"),
    "MiSS": ("miss_block",),
    "OFT on an embedding": ("oft_embedding_R",),
    "PEANuT": ("peanut_A", "peanut_B"),
    "Poly": ("poly_lora_A", "poly_lora_B", "poly_router"),
    "PSOFT": ("psoft_R",),
    "PVeRA": ("pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B"),
    "RandLoRA": ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
    "RoAd": ("road_theta", "road_alpha"),
    "SHiRA": ("shira_weight", "shira_indices"),
    "SuperTuning": ("supertuning_values", "supertuning_lora_A", "supertuning_lora_B"),
    "TinyLoRA": ("tinylora_v",),
    "Uni-LoRA": ("unilora_theta_d", "unilora_indices_A", "unilora_indices_B"),
    "VB-LoRA": ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"),
    "WaveFT": ("waveft_spectrum",),
}
_PEFT_STARTS = (
    *(
        "lora_up",
        "lora_down",
        "lora_mid",
        "lora_A",
        "lora_B",
        "lora_E",
        "lora_embedding",
        "lora_magnitude",
        "lora_bias",
    ),
    *("hada_", "lokr_", "ia3_", "oft_R", "boft_", "hra_", "vera_"),
    *(parameter for row in UNFUSED_PEFT.values() for parameter in row),
)
SUFFIXES.update((parameter, Suffix(parameter)) for row in UNFUSED_PEFT.values() for parameter in row)
_LONGEST = max(suffix.count(".") for suffix in SUFFIXES) + 1

# Parameters behind which a raw state dict still carries the adapter's name: lora_A.default.weight
_WITH_NAME = {"modules_to_save", "ln_tuning_layers", "ranknum", "trainable_tokens_delta"} | {
    suffix.partition(".")[0] for suffix in SUFFIXES if suffix.startswith(_PEFT_STARTS)
}
# attn1.processor.to_q_lora.up.weight, ..._attn1_to_k_lora.down.weight, ..._to_k_lora_down.weight: joined by "_"
_JOINED = re.compile(r"(?P<module>.+)_lora[._](?P<factor>up|down)\.(?P<leaf>weight|alpha)")
_XLABS = re.compile(r"(?P<module>.+\.processor\.\w+_lora\d)\.(?P<factor>up|down)\.weight")
# diffusers' convert_state_dict_to_kohya on DoRA: it keeps the last dot of the path of a magnitude
_HALF_FLAT = re.compile(r"(?P<module>lora_(?:unet|te\d?)(?:_[^.]+)?\.[^.]+)\.lora_magnitude_vector")
# A replaced module with modules of its own: classifier.modules_to_save.default.dense.weight
_SAVED = re.compile(r"(?P<module>.+\.modules_to_save\.[^.]+\..+)\.(?P<leaf>weight|bias)")
# kohya, one set of factors for each of q, k and v: lora_up.0.weight, oft_blocks.2
_PART = re.compile(r"(?P<module>.+)\.(?P<factor>lora_up|lora_down|oft_blocks)\.(?P<part>\d{1,3})(?P<leaf>\.weight)?")
# LyCORIS (IA)3 on a flat module name: elsewhere `.weight` ends the names of ordinary tensors
_FLAT_WEIGHT = re.compile(r"(?P<module>(?:lora_(?:unet|te\d?|prior|transformer)|lycoris)_[^.]+)\.weight")
# Wan distillations: a difference to the block's bare parameter `modulation`
_MODULATION = "diff_m"
# Copies of the base, buffers, and slider settings that some tools store: they update nothing.
_NO_UPDATE = re.compile(r"(.*[._])?position_ids|(.*\.)?_aux\..+|(.*\.)?original_module\..+")
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<leaf>weight|bias|scale)")


def split_key(key: str) -> tuple[str, Suffix] | None:
    """(module name, suffix) of an adapter key; None if it ends in nothing that only adapters have."""
    return _split_by_pattern(key) or _split_by_table(_without_adapter_name(key))


def _without_adapter_name(key: str) -> str:
    parts = key.split(".")
    for place in (len(parts) - 3, len(parts) - 2):
        if place > 0 and parts[place] in _WITH_NAME and ".".join(parts[place:]) not in SUFFIXES:
            return ".".join(parts[: place + 1] + parts[place + 2 :])
    return key


def _split_by_table(key: str) -> tuple[str, Suffix] | None:
    parts = key.split(".")
    for count in range(min(_LONGEST, len(parts) - 1), 0, -1):
        suffix = SUFFIXES.get(".".join(parts[-count:]))
        if suffix is not None:
            # The weight of an RMS norm is called `scale` too; a norm has no alpha to replace.
            is_norm = suffix.factor == "scale" and parts[-2].endswith("norm")
            return None if is_norm else (".".join(parts[:-count]), suffix)
    return None


def _split_by_pattern(key: str) -> tuple[str, Suffix] | None:
    joined = _JOINED.fullmatch(key) or _XLABS.fullmatch(key)
    if joined is not None:
        is_alpha = joined.groupdict().get("leaf") == "alpha"
        return joined["module"], Suffix("alpha" if is_alpha else joined["factor"])
    part = _PART.fullmatch(key)
    if part is not None:
        suffix = SUFFIXES.get(part["factor"] + (part["leaf"] or ""))
        return None if suffix is None else (part["module"], suffix._replace(part=int(part["part"])))
    half_flat = _HALF_FLAT.fullmatch(key)
    if half_flat is not None:
        return half_flat["module"].replace(".", "_"), _MAGNITUDE
    vector = _FLAT_WEIGHT.fullmatch(key)
    if vector is not None:
        return vector["module"], Suffix("ia3_weight")
    if key.endswith("." + _MODULATION):
        return key.removesuffix(_MODULATION) + "modulation", SUFFIXES["diff"]
    saved = _SAVED.fullmatch(key)
    return None if saved is None else (saved["module"], Suffix("value", saved["leaf"]))


def split_value(key: str) -> tuple[str, Suffix] | None:
    """(module name, suffix) of an ordinary tensor name, as the whole new value of that parameter; or None.

    For tensors that stand beside factors: replaced heads, norms and biases. The name of such a tensor
    is that of a checkpoint's tensor, so whether it is one is for the file to say, not for the name.
    """
    tensor = _TENSOR.fullmatch(key)
    if tensor is None or split_key(key) is not None or updates_nothing(key):
        return None
    return tensor["module"], Suffix("value", "bias" if tensor["leaf"] == "bias" else "weight")


def updates_nothing(key: str) -> bool:
    """True for what adapter files carry without effect: position ids, copies of the base, slider settings."""
    return _NO_UPDATE.fullmatch(key) is not None


@dataclass(frozen=True, slots=True)
class Decomposition:
    """How DoRA normalises the updated weight before the stored magnitude scales it."""

    axis: int  # of the weight that the magnitude runs along: 0 output rows, 1 input channels
    epsilon: float  # added to the norms


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way of storing an update: the first row that a module's factors fit wins."""

    name: str  # short, stable: what plans and JSON documents say
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()  # tensors the maths also takes
    extent: ExtentRule | None = None  # of the tensor it fits; None: bake recognises but cannot fuse it
    rank: RankRule = lambda shapes: None  # what alpha is divided by, where it is
    block: BlockRule = lambda shapes: 1
    transforms: bool = False  # makes a new weight out of the old one: the order of adapters matters
    axes: int | None = None  # of the first required factor, where another row requires the same factors

    @property
    def factors(self) -> tuple[str, ...]:
        return self.required + self.optional

    def fits(self, shapes: Shapes) -> bool:
        """True if factors of these shapes are stored this way."""
        present = all(map(shapes.__contains__, self.required))
        return present and (self.axes is None or len(shapes[self.required[0]]) == self.axes)


# Products of thin matrices and stored differences: sums that are defined to the last bit (docs/numerics.md).
_PLAIN = {"lora", "adalora", "vera", "full"}


def is_plain(algorithm: str, factors: Collection[str]) -> bool:
    """True for updates that are summed exactly, if there is no DoRA magnitude around them."""
    return algorithm in _PLAIN and "magnitude" not in factors


# One-element tensors beside the factors, read while planning.
SCALARS = ("alpha", "scale", "rank_num")


def as_matrix(shape: Shape) -> tuple[int, int]:
    """(rows, columns) of a tensor whose trailing dimensions are flattened; a vector is one column."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _first_of(*factors: str) -> RankRule:
    """The first dimension of the first of `factors` that there is."""
    return lambda shapes: next((shapes[factor][0] for factor in factors if factor in shapes), None)


def _last_of(factor: str) -> BlockRule:
    return lambda shapes: shapes[factor][-1]


def _widest_stage(shapes: Shapes) -> int:
    stages, _, size, _ = shapes["oft_blocks"]
    return size << (stages - 1)


_KRON = (("kron_w1",), ("kron_w1_a", "kron_w1_b")), (("kron_w2",), ("kron_w2_a", "kron_w2_b"))

# name, required, optional factors; the tensor it fits; what alpha is divided by
ALGORITHMS = (
    Algorithm("adalora", ("up", "down", "lora_e"), (), additive.adalora_shape, _first_of("down")),
    Algorithm("lora", ("up", "down"), ("mid", "magnitude"), additive.lora_shape, _first_of("down")),
    Algorithm("full", ("diff",), (), additive.full_shape),
    Algorithm("set", ("value",), (), additive.replacement_shape, transforms=True),
    Algorithm(
        "loha", ("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2", "magnitude"), additive.loha_shape, _first_of("w1_b")
    ),
    *(
        Algorithm(
            "lokr", (*one, *two), ("kron_t2", "magnitude"), additive.lokr_shape, _first_of("kron_w2_b", "kron_w1_b")
        )
        for one, two in itertools.product(*_KRON)
    ),
    Algorithm("glora", ("a1", "a2", "b1", "b2"), ("bm",), additive.glora_shape, additive.glora_rank, transforms=True),
    Algorithm("ia3", ("ia3_weight", "on_input"), (), additive.ia3_shape, transforms=True),
    Algorithm("ia3-peft", ("ia3_l",), (), additive.ia3_peft_shape, transforms=True),
    Algorithm(
        *("oft", ("oft_blocks",), ("rescale",), transforms.oft_shape),
        block=_last_of("oft_blocks"),
        transforms=True,
        axes=3,
    ),
    Algorithm(
        *("boft", ("oft_blocks",), ("rescale",), transforms.boft_shape), block=_widest_stage, transforms=True, axes=4
    ),
    Algorithm("oft-diag", ("oft_diag",), (), transforms.oft_diag_shape, block=_last_of("oft_diag"), transforms=True),
    Algorithm("oft-peft", ("oft_r",), ("scaled_oft",), transforms.oft_peft_shape, transforms=True),
    Algorithm("boft-peft", ("boft_r", "boft_s"), (), transforms.boft_peft_shape, transforms=True),
    Algorithm("hra", ("hra_u",), (), transforms.hra_shape, transforms=True),
    Algorithm("vera", ("vera_lambda_b", "vera_lambda_d", "vera_a", "vera_b"), (), additive.vera_shape),
    Algorithm("sparse", ("bias_indices", "bias_values", "bias_size"), (), additive.sparse_bias_shape),
    Algorithm("T-LoRA as LyCORIS stores it", ("tlora_q", "tlora_p", "tlora_lambda")),
    *(Algorithm(name, (parameter,)) for name, parameters in UNFUSED_PEFT.items() for parameter in parameters),
)


def algorithm_of(shapes: Shapes) -> Algorithm | None:
    """The row that a module with factors of these shapes belongs to."""
    return next((row for row in ALGORITHMS if row.fits(shapes)), None)
