"""The adapter algorithms bake knows by name, and every spelling of their factors.

An adapter key is MODULE + "." + SUFFIX. The suffix names a factor (`SUFFIXES`); the factors a module
has name its algorithm (`ALGORITHMS`). The maths lives in `bake.adapters`, one function per row with
a shape; rows without one are recognised so that they can be refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, ...]
ShapeRule = Callable[[Mapping[str, Shape]], tuple[int, int]]


class Suffix(NamedTuple):
    """What the end of an adapter key says."""

    factor: str
    parameter: str = "weight"  # which parameter of the module it updates
    transposed: bool = False  # the update is stored (in, out)


_UP, _DOWN, _MAGNITUDE = Suffix("up"), Suffix("down"), Suffix("magnitude")

SUFFIXES: dict[str, Suffix] = {
    # LoRA, LoCon                                     written by
    "lora_up.weight": _UP,  #                         kohya, LyCORIS, OneTrainer
    "lora_down.weight": _DOWN,
    "lora_mid.weight": Suffix("mid"),  #              LyCORIS, Tucker form
    "lora_B.weight": _UP,  #                          PEFT, diffusers since 0.26
    "lora_A.weight": _DOWN,
    "lora.up.weight": _UP,  #                         diffusers 0.18 to 0.25
    "lora.down.weight": _DOWN,
    "lora_linear_layer.up.weight": _UP,  #            diffusers, text encoders
    "lora_linear_layer.down.weight": _DOWN,
    "lora_embedding_B": Suffix("up", transposed=True),  # PEFT, on embeddings: update is (B @ A) transposed
    "lora_embedding_A": Suffix("down", transposed=True),
    "alpha": Suffix("alpha"),
    "scale": Suffix("scale"),  #                      A1111: replaces alpha / rank
    # full differences, norms
    "diff": Suffix("diff"),  #                        LyCORIS full, ComfyUI
    "diff_b": Suffix("diff", "bias"),
    "w_norm": Suffix("diff"),  #                      LyCORIS train_norm
    "b_norm": Suffix("diff", "bias"),
    # recognised only
    "dora_scale": _MAGNITUDE,  #                      LyCORIS, OneTrainer
    "lora_magnitude_vector": _MAGNITUDE,  #           PEFT
    "lora_magnitude_vector.weight": _MAGNITUDE,
    "magnitude": _MAGNITUDE,
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
    "on_input": Suffix("on_input"),
    "ia3_l": Suffix("ia3_l"),
    "set_weight": Suffix("set_weight"),
    "a1.weight": Suffix("a1"),
    "a2.weight": Suffix("a2"),
    "b1.weight": Suffix("b1"),
    "b2.weight": Suffix("b2"),
    "bm.weight": Suffix("bm"),
    "oft_blocks": Suffix("oft_blocks"),
    "oft_diag": Suffix("oft_diag"),
    "oft_R.weight": Suffix("oft_r"),
    "oft_R.scaled_oft": Suffix("scaled_oft"),
    "rescale": Suffix("rescale"),
    "lora_B.bias": Suffix("up_bias"),
    "lora_E": Suffix("lora_e"),
    "lora_a": Suffix("mlx_a"),
    "lora_b": Suffix("mlx_b"),
    "reshape_weight": Suffix("reshape_weight"),
    "bias_indices": Suffix("bias_indices"),
    "bias_values": Suffix("bias_values"),
    "bias_size": Suffix("bias_size"),
    "vera_lambda_b": Suffix("vera_lambda_b"),
    "vera_lambda_d": Suffix("vera_lambda_d"),
    "hra_u": Suffix("hra_u"),
    "boft_R": Suffix("boft_r"),
    "boft_s": Suffix("boft_s"),
    "trainable_tokens_delta": Suffix("token_rows"),
    "token_adapter.trainable_tokens_delta": Suffix("token_rows"),
    "base_layer.weight": Suffix("replacement"),  #    PEFT, embeddings and heads that it saves whole
}
_LONGEST = max(suffix.count(".") for suffix in SUFFIXES) + 1

# attn1.processor.to_q_lora.up.weight, ..._attn1_to_k_lora.down.weight: joined to the module by "_"
_JOINED = re.compile(r"(?P<module>.+)_lora\.(?P<factor>up|down)\.weight")
# lora_A.default.weight: a raw state dict still carries the name of the adapter
_NAMED = re.compile(
    r"(?P<before>.+\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector))\.[^.]+(?P<after>\.weight)?"
)


def split_key(key: str) -> tuple[str, Suffix] | None:
    """(module name, suffix) of an adapter key; None if it ends in nothing known."""
    parts = key.split(".")
    for count in range(min(_LONGEST, len(parts) - 1), 0, -1):
        suffix = SUFFIXES.get(".".join(parts[-count:]))
        if suffix is not None:
            return ".".join(parts[:-count]), suffix
    joined = _JOINED.fullmatch(key)
    if joined is not None:
        return joined["module"], Suffix(joined["factor"])
    named = _NAMED.fullmatch(key)
    if named is not None:
        return split_key(named["before"] + (named["after"] or ""))
    return None


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way of storing an update: the first row whose required factors are all present wins."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()  # tensors the maths also takes
    shape: ShapeRule | None = None  # (rows, columns) of the update; None: bake recognises but cannot fuse it
    rank_of: str | None = None  # factor whose first dimension is the rank that alpha is divided by
    by_rows: bool = False  # rows of the update need only the same rows of every factor

    @property
    def factors(self) -> tuple[str, ...]:
        return self.required + self.optional


# One-element tensors beside the factors, read while planning.
SCALARS = ("alpha", "scale")


def lora_shape(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """(out, in * kernel) of up @ down, or of the Tucker form with a mid factor between them.

    Raises ValueError if the factors do not chain.
    """
    up, down, mid = shapes["up"], shapes["down"], shapes.get("mid")
    if len(up) < 2 or len(down) < 2 or math.prod(up[2:]) != 1:
        raise ValueError(f"up {list(up)} and down {list(down)} are no pair of factors")
    inner = mid if mid is not None else (down[0], down[0])
    if len(inner) < 2 or up[1] != inner[0] or inner[1] != down[0]:
        middle = f", mid {list(mid)}" if mid is not None else ""
        raise ValueError(f"the ranks of up {list(up)}{middle} and down {list(down)} differ")
    return up[0], math.prod(down[1:]) * math.prod(inner[2:])


def full_shape(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """(rows, columns) of a stored difference seen as a matrix."""
    return as_matrix(shapes["diff"])


def as_matrix(shape: Shape) -> tuple[int, int]:
    """(rows, columns) of a tensor whose trailing dimensions are flattened; a vector is one column."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


ALGORITHMS = (
    Algorithm("DoRA", ("up", "down", "magnitude"), ("mid",)),
    Algorithm("lora", ("up", "down"), ("mid",), lora_shape, rank_of="down"),
    Algorithm("full", ("diff",), (), full_shape, by_rows=True),
    Algorithm("LoHa", ("w1_a", "w1_b", "w2_a", "w2_b")),
    Algorithm("LoKr", ("kron_w1", "kron_w2")),
    Algorithm("LoKr", ("kron_w1", "kron_w2_a", "kron_w2_b")),
    Algorithm("LoKr", ("kron_w1_a", "kron_w1_b", "kron_w2")),
    Algorithm("LoKr", ("kron_w1_a", "kron_w1_b", "kron_w2_a", "kron_w2_b")),
    Algorithm("(IA)3", ("on_input",)),
    Algorithm("(IA)3", ("ia3_l",)),
    Algorithm("a full replacement (set_weight)", ("set_weight",)),
    Algorithm("GLoRA", ("a1", "a2", "b1", "b2")),
    Algorithm("OFT or BOFT", ("oft_blocks",)),
    Algorithm("OFT", ("oft_diag",)),
    Algorithm("OFT", ("oft_r",)),
    Algorithm("BOFT", ("boft_r",)),
    Algorithm("VeRA", ("vera_lambda_b", "vera_lambda_d")),
    Algorithm("HRA", ("hra_u",)),
    Algorithm("MLX LoRA", ("mlx_a", "mlx_b")),
    Algorithm("trainable tokens", ("token_rows",)),
    Algorithm("a whole replaced tensor (base_layer)", ("replacement",)),
)


def algorithm_of(factors: Iterable[str]) -> Algorithm | None:
    """The row that a module with these factors belongs to."""
    present = set(factors)
    return next((row for row in ALGORITHMS if present.issuperset(row.required)), None)


def supported(name: str) -> Algorithm:
    """The row of an algorithm that has maths, by its name."""
    return next(row for row in ALGORITHMS if row.name == name and row.shape is not None)
