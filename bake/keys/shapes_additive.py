"""Which tensor an update fits, from the shapes of its factors: additive algorithms and the simple transforms.

Every rule takes {factor: shape} and returns (rows, columns) of the tensor seen as a matrix, (out, in * kernel);
None where the factors do not say. Every rule raises ValueError, with a plain sentence, if the factors contradict
each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Fit = tuple[int | None, int | None]


def lora_shape(shapes: Shapes) -> Fit:
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


def full_shape(shapes: Shapes) -> Fit:
    """(rows, columns) of a stored difference seen as a matrix."""
    return _as_matrix(shapes["diff"])


def loha_shape(shapes: Shapes) -> Fit:
    """(out, in * kernel) of the elementwise product of w1_a, w1_b[, t1] and w2_a, w2_b[, t2]."""
    if ("t1" in shapes) != ("t2" in shapes):
        raise ValueError("LoHa has only one of t1 and t2")
    first, second = _product(shapes, "w1_a", "w1_b", "t1"), _product(shapes, "w2_a", "w2_b", "t2")
    if first != second:
        raise ValueError(f"the two products of LoHa have different shapes, {list(first)} and {list(second)}")
    return first


def lokr_shape(shapes: Shapes) -> Fit:
    """(out, in * kernel) of the Kronecker product of w1 and w2, each whole or as two factors."""
    small, large = _kron_side(shapes, "w1", None), _kron_side(shapes, "w2", "kron_t2")
    return small[0] * large[0], small[1] * large[1]


def glora_shape(shapes: Shapes) -> Fit:
    """(out, in * kernel) of the part that does not depend on the weight, b1 @ b2, in either spelling."""
    a1, a2, b1, b2 = _glora_factors(shapes)
    if _kernel(a1) != 1 or _kernel(a2) != 1:
        raise ValueError(f"a1 {list(a1)} and a2 {list(a2)} have a kernel, which GLoRA does not")
    inner = shapes.get("bm", (b2[0], b2[0]))
    if len(inner) < 2 or b1[1] != inner[0] or inner[1] != b2[0]:
        raise ValueError(f"the ranks of {_named(shapes, 'b1', 'bm', 'b2')} differ")
    if _kernel(b1) != 1 or ("bm" in shapes and _kernel(b2) != 1):
        raise ValueError(f"the kernel of {_named(shapes, 'b1', 'bm', 'b2')} is not where GLoRA has it")
    if a1[0] != b2[1] or a2[1] != b2[1]:
        raise ValueError(f"the inputs of {_named(shapes, 'a1', 'a2', 'b1', 'b2')} differ")
    return b1[0], math.prod(b2[1:]) * _kernel(inner)


def glora_rank(shapes: Shapes) -> int:
    """The rank that alpha is divided by, in either spelling."""
    return _glora_factors(shapes)[1][0]


def ia3_shape(shapes: Shapes) -> Fit:
    """(None, None): whether the channels of LyCORIS' (IA)3 are outputs or inputs is a value, `on_input`."""
    stored = shapes["ia3_weight"]
    if math.prod(stored) != max(stored, default=1) or math.prod(shapes["on_input"]) != 1:
        raise ValueError(f"{_named(shapes, 'ia3_weight', 'on_input')} are no channels and a switch")
    return None, None


def ia3_peft_shape(shapes: Shapes) -> Fit:
    """(out, None) or (None, in) of a linear layer; (None, None) of a convolution, where the shape tells neither."""
    stored = shapes["ia3_l"]
    if len(stored) < 2 or math.prod(stored) != max(stored[:2]):
        raise ValueError(f"{_named(shapes, 'ia3_l')} is no list of channels")
    if len(stored) > 2 or stored == (1, 1):
        return None, None
    return (stored[0], None) if stored[1] == 1 else (None, stored[1])


def vera_shape(shapes: Shapes) -> Fit:
    """(out, None): the shared matrices are as wide as the widest layer."""
    out, rank = math.prod(shapes["vera_lambda_b"]), math.prod(shapes["vera_lambda_d"])
    shared_a, shared_b = shapes["vera_a"], shapes["vera_b"]
    if len(shared_a) != 2 or len(shared_b) != 2 or not shared_a[0] == rank == shared_b[1] or shared_b[0] < out:
        names = _named(shapes, "vera_lambda_b", "vera_lambda_d", "vera_a", "vera_b")
        raise ValueError(f"{names} do not belong together")
    return out, None


def adalora_shape(shapes: Shapes) -> Fit:
    """(out, in * kernel) of up @ (lora_e * down)."""
    if math.prod(shapes["lora_e"]) != shapes["down"][0]:
        raise ValueError(f"the ranks of {_named(shapes, 'lora_e', 'down')} differ")
    return _product(shapes, "up", "down", None)


def sparse_bias_shape(shapes: Shapes) -> Fit:
    """(None, None): the size of the update is a value, `bias_size`."""
    positions, values = shapes["bias_indices"], shapes["bias_values"]
    if len(values) != 1 or positions != (2, values[0]) or shapes["bias_size"] != (2,):
        raise ValueError(f"{_named(shapes, 'bias_indices', 'bias_values', 'bias_size')} are no sparse matrix")
    return None, None


def replacement_shape(shapes: Shapes) -> Fit:
    """(rows, columns) of the stored values seen as a matrix; a vector is one column."""
    return _as_matrix(shapes["value"])


def _as_matrix(shape: Shape) -> Fit:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _product(shapes: Shapes, a: str, b: str, t: str | None) -> tuple[int, int]:
    """(out, in * kernel) of a (out, rank) @ b (rank, in * kernel); Tucker: a (rank, out), b (rank, in), t between."""
    up, down, middle = shapes[a], shapes[b], shapes.get(t) if t is not None else None
    names = _named(shapes, a, b) if t is None or middle is None else _named(shapes, a, t, b)
    if len(up) < 2 or len(down) < 2 or _kernel(up) != 1 or (middle is not None and len(middle) < 3):
        raise ValueError(f"{names} are no factors of a product")
    if middle is None:
        if up[1] != down[0]:
            raise ValueError(f"the ranks of {names} differ")
        return up[0], math.prod(down[1:])
    if middle[:2] != (up[0], down[0]) or _kernel(down) != 1:
        raise ValueError(f"the ranks of {names} differ")
    return up[1], down[1] * _kernel(middle)


def _kron_side(shapes: Shapes, side: str, t: str | None) -> tuple[int, int]:
    """(rows, columns) of w1 or w2."""
    whole, pair = f"kron_{side}", (f"kron_{side}_a", f"kron_{side}_b")
    if whole not in shapes:
        if not shapes.keys() >= set(pair):
            raise ValueError(f"LoKr needs {side}, whole or as two factors")
        return _product(shapes, *pair, t)
    if shapes.keys() & {*pair, t}:
        raise ValueError(f"LoKr has {side} twice, whole and as factors")
    stored = shapes[whole]
    if len(stored) < 2:
        raise ValueError(f"{_named(shapes, whole)} is no matrix")
    return stored[0], math.prod(stored[1:])


def _glora_factors(shapes: Shapes) -> tuple[Shape, Shape, Shape, Shape]:
    """Shapes in the order of today's spelling: a1 (in, rank), a2 (rank, in), b1 (out, rank), b2 (rank, in)."""
    a1, a2, b1, b2 = factors = tuple(shapes[name] for name in ("a1", "a2", "b1", "b2"))
    new = first = False
    if min(map(len, factors)) >= 2:
        new = b2[0] == b1[1] == a1[1] == a2[0]
        first = b2[1] == b1[0] == a1[0] == a2[1]
    if not new and not first:
        raise ValueError(f"the ranks of {_named(shapes, 'a1', 'a2', 'b1', 'b2')} differ")
    # A square layer chains both ways; its rank is the smaller size, for no trainer means a larger one.
    if first and (not new or a2[0] > a2[1]):
        return a2, a1, b2, b1
    return a1, a2, b1, b2


def _kernel(shape: Shape) -> int:
    return math.prod(shape[2:])


def _named(shapes: Shapes, *names: str) -> str:
    return ", ".join(f"{name.removeprefix('kron_')} {list(shapes[name])}" for name in names if name in shapes)
