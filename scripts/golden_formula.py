"""Golden cases of trainers that are no libraries: their keys, and their formulas in float64.

kohya OFT                       sd-scripts networks/oft.py, oft_flux.py
kohya with one LoRA for each part of a fused projection
OneTrainer OFT                  modules/module/LoRAModule.py, oft_utils.py
XLabs                           x-flux, src/flux/modules/layers.py
MLX                             mlx-lm tuner/lora.py
ComfyUI                         comfy/lora.py: set_weight, diff, diff_b, diff_m
LyCORIS extract                 lycoris/utils/__init__.py: the sparse remainder of a layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from golden_bases import Arrays, random, values_of
from golden_case import Case, Outcome, expected_of
from numpy.typing import NDArray
from safetensors.numpy import save

Array = NDArray[np.float64]
Values = dict[tuple[str, str], Array]

_BLOCK = "down_blocks.0.attentions.0."
_QUERY, _KEY = (_BLOCK + "transformer_blocks.0." + name for name in ("attn1.to_q", "attn2.to_k"))
_POINT, _OUT = _BLOCK + "proj_in", _BLOCK + "transformer_blocks.0.attn1.to_out.0"
_QKV, _LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"


class Built(NamedTuple):
    """What makes up a case."""

    arrays: Arrays  # the adapter's tensors
    outcome: Outcome
    modules: int  # parts of fused projections count one by one
    base: str = "sd1"
    metadata: dict[str, str] | None = None
    config: dict[str, Any] | None = None


def cases() -> Iterator[Case]:
    """Every case by formula. Needs NumPy alone."""
    for name, (program, build) in _CASES.items():
        built = build(name)
        yield Case(
            name=name,
            base=built.base,
            tool="formula",
            expected_from="the formula in float64 NumPy",
            settings={"keys of": program},
            modules=built.modules,
            adapter=save(
                {key: np.ascontiguousarray(array).reshape(array.shape) for key, array in built.arrays.items()},
                built.metadata,
            ),
            expected=expected_of(built.base, built.outcome),
            config=built.config,
        )


def _factor(name: str, *shape: int, dtype: Any = np.float16) -> NDArray[Any]:
    return np.asarray((0.4 * random(name, *shape)).astype(dtype))


def _base(base: str, path: str, parameter: str = "weight") -> Array:
    found = values_of(base, path, parameter)
    assert found is not None, path
    return found


def _flat(prefix: str, path: str) -> str:
    return prefix + path.replace(".", "_")


def _product(up: NDArray[Any], down: NDArray[Any]) -> Array:
    return np.asarray(up.astype(np.float64) @ down.astype(np.float64))


# kohya OFT: Q = B - B^T, no longer than alpha * out; R = (I + Q)(I - Q)^-1; rows of each block: R_s^T W


def _kohya_rotated(weight: Array, blocks: NDArray[Any], alpha: float, strength: float) -> Array:
    stored = blocks.astype(np.float64)
    skew = stored - stored.transpose(0, 2, 1)
    length, limit = np.sqrt((skew**2).sum()), alpha * len(weight)
    skew *= (min(length, limit) + 1e-8) / (length + 1e-8)
    unit = np.eye(skew.shape[-1])
    rotation = strength * ((unit + skew) @ np.linalg.inv(unit - skew)) + (1 - strength) * unit
    rows = weight.reshape(len(blocks), skew.shape[-1], -1)
    return np.asarray(np.einsum("knm,kni->kmi", rotation, rows).reshape(weight.shape))


def _kohya_oft(case: str) -> Built:
    # Of the two, only the first is longer than its limit.
    alphas = {_QUERY: np.float16(0.0625), _KEY: np.float16(8)}
    blocks = {path: _factor(f"{case} {path}", 2, 4, 4) for path in alphas}
    arrays: Arrays = {}
    for path in alphas:
        arrays[_flat("oft_unet_", path) + ".oft_blocks"] = blocks[path]
        arrays[_flat("oft_unet_", path) + ".alpha"] = np.array(alphas[path])

    def at(weight: float) -> Values:
        return {
            (path, "weight"): _kohya_rotated(_base("sd1", path), blocks[path], float(alpha), weight)
            for path, alpha in alphas.items()
        }

    return Built(arrays, at, 2, metadata={"ss_network_module": "networks.oft"})


def _kohya_oft_flux(case: str) -> Built:
    """One rotation for each of q, k, v and the MLP, each with its own limit and norm."""
    parts = {_QKV: (4, 4, 4), _LINEAR1: (4, 4, 4, 8)}
    alpha = np.float16(0.0625)
    blocks = {
        (path, part): _factor(f"{case} {path} {part}", 2, rows // 2, rows // 2)
        for path, heights in parts.items()
        for part, rows in enumerate(heights)
    }
    arrays: Arrays = {
        f"{_flat('oft_unet_', path)}.oft_blocks.{part}": array for (path, part), array in blocks.items()
    } | {_flat("oft_unet_", path) + ".alpha": np.array(alpha) for path in parts}

    def at(weight: float) -> Values:
        found: Values = {}
        for path, heights in parts.items():
            pieces = np.split(_base("flux", path), np.cumsum(heights)[:-1])
            rotated = [
                _kohya_rotated(piece, blocks[path, part], float(alpha), weight) for part, piece in enumerate(pieces)
            ]
            found[path, "weight"] = np.concatenate(rotated)
        return found

    return Built(arrays, at, 7, "flux", {"ss_network_module": "networks.oft_flux"})


def _kohya_parts(case: str) -> Built:
    """lora_up.0, lora_up.1, ...: W + s alpha / r (up_i @ down_i) in the rows of part i."""
    parts = {_QKV: (4, 4, 4), _LINEAR1: (4, 4, 4, 8)}
    arrays: Arrays = {}
    deltas: dict[str, Array] = {}
    for path, heights in parts.items():
        pieces = []
        for part, rows in enumerate(heights):
            up, down = _factor(f"{case} {path} up {part}", rows, 2), _factor(f"{case} {path} down {part}", 2, 4)
            arrays[f"{_flat('lora_unet_', path)}.lora_up.{part}.weight"] = up
            arrays[f"{_flat('lora_unet_', path)}.lora_down.{part}.weight"] = down
            pieces.append(_product(up, down))
        arrays[_flat("lora_unet_", path) + ".alpha"] = np.array(3, np.float16)
        deltas[path] = 3 / 2 * np.concatenate(pieces)
    return Built(arrays, _added("flux", deltas), 7, "flux", {"ss_network_module": "networks.lora_flux"})


def _added(base: str, deltas: dict[str, Array]) -> Outcome:
    """W + s delta."""

    def at(weight: float) -> Values:
        return {(path, "weight"): _base(base, path) + weight * delta for path, delta in deltas.items()}

    return at


# OneTrainer OFT: Q / (2 sqrt(b - 1)), R = I + 2Q + 2Q^2 + 2Q^3 + Q^4; columns: W R_s^T, of convolutions W R_s


def _onetrainer_oft(case: str) -> Built:
    shapes = {_QUERY: (2, 6), _KEY: (2, 3), _POINT: (2, 6)}  # (blocks, numbers above the diagonal)
    factors = {path: _factor(f"{case} {path}", *shape, dtype=np.float32) for path, shape in shapes.items()}
    arrays: Arrays = {}
    for path, factor in factors.items():
        arrays[_flat("lora_unet_", path) + ".oft_R.weight"] = factor
        arrays[_flat("lora_unet_", path) + ".oft_R.scaled_oft"] = np.array(True)

    def at(weight: float) -> Values:
        return {
            (path, "weight"): _onetrainer_rotated(_base("sd1", path), factor.astype(np.float64), weight)
            for path, factor in factors.items()
        }

    return Built(arrays, at, 3)


def _onetrainer_rotated(weight: Array, numbers: Array, strength: float) -> Array:
    size = (1 + int((1 + 8 * numbers.shape[1]) ** 0.5)) // 2
    skew = np.zeros((len(numbers), size, size))
    above = np.triu_indices(size, 1)
    skew[:, above[0], above[1]] = numbers / (2 * (size - 1) ** 0.5)
    skew -= skew.transpose(0, 2, 1)
    unit, square = np.eye(size), skew @ skew
    rotation = unit + 2 * skew + 2 * square + 2 * skew @ square + square @ square
    rotation = strength * rotation + (1 - strength) * unit
    columns = weight.reshape(len(weight), len(numbers), size)
    indices = "okb,kbc->okc" if weight.ndim > 2 else "okb,kcb->okc"
    return np.asarray(np.einsum(indices, columns, rotation).reshape(weight.shape))


def _xlabs(case: str) -> Built:
    """W + s up @ down; a single block's qkv is the first rows of linear1, its proj the first columns of linear2."""
    targets = {
        "double_blocks.0.processor.qkv_lora1": (_QKV, np.s_[:, :]),
        "double_blocks.0.processor.proj_lora1": ("double_blocks.0.img_attn.proj", np.s_[:, :]),
        "double_blocks.0.processor.qkv_lora2": ("double_blocks.0.txt_attn.qkv", np.s_[:, :]),
        "single_blocks.0.processor.qkv_lora": (_LINEAR1, np.s_[:12, :]),
        "single_blocks.0.processor.proj_lora": ("single_blocks.0.linear2", np.s_[:, :4]),
    }
    arrays: Arrays = {}
    deltas: dict[str, Array] = {}
    for module, (path, place) in targets.items():
        deltas[path] = np.zeros_like(_base("flux", path))
        rows, columns = deltas[path][place].shape
        up, down = _factor(f"{case} {module} up", rows, 2), _factor(f"{case} {module} down", 2, columns)
        arrays[f"{module}.up.weight"], arrays[f"{module}.down.weight"] = up, down
        deltas[path][place] = _product(up, down)
    return Built(arrays, _added("flux", deltas), len(targets), "flux")


def _mlx(case: str) -> Built:
    """W + s scale (lora_a @ lora_b)^T, where scale is not divided by the rank."""
    layer = "model.layers.0."
    arrays: Arrays = {}
    deltas: dict[str, Array] = {}
    for path in (layer + "self_attn.q_proj", layer + "mlp.down_proj"):
        rows, columns = _base("qwen2", path).shape
        a, b = (_factor(f"{case} {path} {name}", *shape) for name, shape in (("a", (columns, 2)), ("b", (2, rows))))
        arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"] = a, b
        deltas[path] = 0.625 * _product(a, b).T
    scale = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 0.625, "dropout": 0.0}}
    return Built(arrays, _added("qwen2", deltas), 2, "qwen2", config=scale)


def _comfy(case: str) -> Built:
    """set_weight takes the place of the tensor at any weight; diff and diff_b are added: W + s diff."""
    norm = "double_blocks.0.img_attn.norm.key_norm"
    proj = "double_blocks.0.img_attn.proj"
    value, diff, bias = _factor(f"{case} set", 2), _factor(f"{case} diff", 4, 4), _factor(f"{case} bias", 4)
    arrays: Arrays = {
        f"diffusion_model.{norm}.set_weight": value,
        f"diffusion_model.{proj}.diff": diff,
        f"diffusion_model.{proj}.diff_b": bias,
    }

    def at(weight: float) -> Values:
        return {
            (norm, "scale"): value.astype(np.float64),
            (proj, "weight"): _base("flux", proj) + weight * diff.astype(np.float64),
            (proj, "bias"): _base("flux", proj, "bias") + weight * bias.astype(np.float64),
        }

    return Built(arrays, at, 2, "flux")


def _modulation(case: str) -> Built:
    """diff_m is added to the bare parameter `modulation` of a Wan block."""
    query = "blocks.0.self_attn.q"
    diff, up, down = (
        _factor(f"{case} {name}", *shape) for name, shape in (("m", (1, 6, 8)), ("up", (8, 2)), ("down", (2, 8)))
    )
    arrays: Arrays = {
        "diffusion_model.blocks.0.diff_m": diff,
        f"diffusion_model.{query}.lora_up.weight": up,
        f"diffusion_model.{query}.lora_down.weight": down,
    }

    def at(weight: float) -> Values:
        return {
            ("blocks.0", "modulation"): _base("wan", "blocks.0", "modulation") + weight * diff.astype(np.float64),
            (query, "weight"): _base("wan", query) + weight * _product(up, down),
        }

    return Built(arrays, at, 2, "wan")


def _sparse(case: str) -> Built:
    """A LoRA and the largest of what it leaves over: W + s (alpha / r up @ down + coo(indices, values))."""
    rows, columns = _base("sd1", _OUT).shape
    up, down = _factor(f"{case} up", rows, 2), _factor(f"{case} down", 2, columns)
    indices, values = np.array([[0, 3, 7, 3], [1, 2, 0, 5]], np.int16), _factor(f"{case} values", 4)
    module = _flat("lora_unet_", _OUT)
    arrays: Arrays = {
        f"{module}.lora_up.weight": up,
        f"{module}.lora_down.weight": down,
        f"{module}.alpha": np.array(2, np.float16),
        f"{module}.bias_indices": indices,
        f"{module}.bias_values": values,
        f"{module}.bias_size": np.array([rows, columns], np.int16),
    }
    delta = _product(up, down)
    delta[indices[0], indices[1]] += values.astype(np.float64)
    return Built(arrays, _added("sd1", {_OUT: delta}), 1)


_CASES: dict[str, tuple[str, Callable[[str], Built]]] = {
    "kohya-oft": ("kohya sd-scripts networks/oft.py", _kohya_oft),
    "kohya-oft-flux": ("kohya sd-scripts networks/oft_flux.py", _kohya_oft_flux),
    "kohya-parts": ("kohya sd-scripts networks/lora_flux.py, before the parts are joined", _kohya_parts),
    "onetrainer-oft": ("OneTrainer", _onetrainer_oft),
    "xlabs": ("XLabs x-flux", _xlabs),
    "mlx": ("mlx-lm", _mlx),
    "comfy-set": ("ComfyUI", _comfy),
    "comfy-modulation": ("ComfyUI, Wan distillations", _modulation),
    "lycoris-sparse": ("LyCORIS extract", _sparse),
}
