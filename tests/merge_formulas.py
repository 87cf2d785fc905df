"""The definition of every merge method in plain NumPy, written from the papers and the formulas of the peers.

Nothing here knows how bake computes: means are iterated on whole tensors, quantiles are taken of sorted ones, filters
are sums over neighbours. Each takes the models and the values of the parameters by name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray


def lerp(x: Array, y: Array, t: object) -> Array:
    return (1 - t) * x + t * y


def norm(x: Array) -> float:
    return float(np.sqrt((x**2).sum()))


def cos(x: Array, y: Array) -> float:
    return float((x * y).sum() / (norm(x) * norm(y)))


def geometric_sum(models: Sequence[Array], alpha: float) -> Array:
    a, b = (model.astype(complex) for model in models)
    return (a ** (1 - alpha) * b**alpha).real


def multiply_quotient(models: Sequence[Array], alpha: float) -> Array:
    a, b, c = models
    la, lb = np.log(abs(a)) - np.log(abs(c)), np.log(abs(b)) - np.log(abs(c))
    m = np.maximum(0, -(la * lb) / np.maximum(abs(la), abs(lb)) ** 2)
    return (a * ((b / c).astype(complex)) ** (alpha * m)).real


def slerp(models: Sequence[Array], alpha: float, norms: str = "raw") -> Array:
    a, b = models
    t = math.acos(cos(a, b))
    if norms == "raw":
        return (math.sin((1 - alpha) * t) * a + math.sin(alpha * t) * b) / math.sin(t)
    unit = (math.sin((1 - alpha) * t) * a / norm(a) + math.sin(alpha * t) * b / norm(b)) / math.sin(t)
    return unit * lerp(norm(a), norm(b), alpha)


def nearswap(models: Sequence[Array], t: float) -> Array:
    a, b = models
    return lerp(a, b, np.clip(t / np.maximum(abs(a - b), 1e-300), 0, 1))


def region_mask(width: float, offset: float, n: int) -> Array:
    if width < 0:
        width, offset = -width, offset + width
    offset = offset - math.floor(offset)
    mask = np.zeros(n, bool)
    if width + offset <= 1:
        mask[round(offset * n) : round((width + offset) * n)] = True
    else:
        mask[:] = True
        mask[round((width + offset - 1) * n) : round(offset * n)] = False
    return mask


def tensor_sum(models: Sequence[Array], width: float, offset: float) -> Array:
    a, b = models
    mask = region_mask(width, offset, len(a)).reshape(-1, *[1] * (a.ndim - 1))
    return np.where(mask, b, a)


def top_k_tensor_sum(models: Sequence[Array], width: float, offset: float) -> Array:
    a, b = (model.flatten() for model in models)
    ordered = np.sort(a)
    # Magnitudes by rank: those of equal size are in together.
    sizes = np.sort(abs(a))
    inside = set(sizes[region_mask(width, offset, a.size)].tolist())
    result = a.copy()
    for rank, place in enumerate(np.argsort(b, kind="stable")):
        if abs(ordered[rank]) in inside:
            result[place] = ordered[rank]
    return result.reshape(models[0].shape)


def unit_columns(x: Array) -> Array:
    return x / np.sqrt((x**2).sum(0, keepdims=True))


def column_cosines(a: Array, b: Array) -> Array:
    return (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))


def cosine_statistics(models: Sequence[Array], directions: bool) -> tuple[Array, Array]:
    """(what lo and hi are taken of, the similarity), by column."""
    a, b = (unit_columns(model) if directions else model for model in models)
    columns = column_cosines(a, b)
    similarity = (columns + cos(a, b)) / 2
    return (columns if directions else similarity), similarity


def cosine_limits(statistics: Sequence[Array]) -> tuple[float, float]:
    values = np.concatenate([np.atleast_1d(one).flatten() for one in statistics])
    values = values[values >= np.percentile(values, 1, method="midpoint")]
    values = values[values <= np.percentile(values, 99, method="midpoint")]
    return values.min(), values.max()


def cosine(models: Sequence[Array], alpha: float, directions: bool, limits: tuple[float, float] | None = None) -> Array:
    a, b = models
    statistic, similarity = cosine_statistics(models, directions)
    lo, hi = limits or cosine_limits([statistic])
    k = np.clip(((similarity - lo) / (hi - lo) if hi > lo else 1.0) - alpha, 0, 1)
    return k * a + (1 - k) * b


def add_cosine(models: Sequence[Array], alpha: float, overall: bool) -> Array:
    a, b = models
    similarity = column_cosines(a, b)
    if overall:
        similarity = (similarity + cos(a, b)) / 2
    return lerp(a, b, 1 - np.clip(similarity - alpha, 0, 1))


def crossover(models: Sequence[Array], alpha: float, tilt: float) -> Array:
    """By the full complex transform, whose negative frequencies have the same share as the positive ones."""
    a, b = models
    height = np.zeros(a.shape)
    for place in itertools.product(*map(range, a.shape)):
        squares = 0.0
        for k, n in zip(place, a.shape, strict=True):
            squares += 0.0 if n == 1 else (min(k, n - k) / (n // 2)) ** 2
        height[place] = math.sqrt(squares / a.ndim)
    high = crossover_share(height, alpha, tilt)
    mixed = (1 - high) * np.fft.fftn(a) + high * np.fft.fftn(b)
    return np.fft.ifftn(mixed).real


def crossover_share(height: Array, alpha: float, tilt: float) -> Array:
    """A line through (1 - alpha, alpha) for tilts up to 1, through (alpha, alpha) from there to 2."""
    if tilt > 2:
        return 1 - crossover_share(height, 1 - alpha, tilt - 2)
    if tilt in (0, 2):
        return (height > 1 - alpha) * 1.0 if tilt == 0 else (height < alpha) * 1.0
    slope = math.cos(math.pi / 2 * tilt) / math.sin(math.pi / 2 * tilt)
    return np.clip((height - (1 - alpha if tilt <= 1 else alpha)) * slope + alpha, 0, 1)


def distribution_crossover(models: Sequence[Array], cut: float, slope: float) -> Array:
    a, b, c = (model.flatten() for model in models)
    order = np.argsort(c, kind="stable")
    fa, fb = np.fft.rfft(a[order]), np.fft.rfft(b[order])
    f = np.arange(len(fa)) / len(fa)
    high = np.clip((f - cut) / slope + 0.5, 0, 1) if slope else (f >= cut) * 1.0
    result = np.empty_like(a)
    result[order] = np.fft.irfft((1 - high) * fa + high * fb, len(a))
    return result.reshape(models[0].shape)


def add_perpendicular(models: Sequence[Array], alpha: float) -> Array:
    a, b, c = models
    da, db = a - c, b - c
    return a + alpha * (db - da * (da * db).sum() / (da**2).sum())


def train_difference(models: Sequence[Array], alpha: float, mask: str = "train") -> Array:
    a, b, c = models
    if mask == "train":
        scale = 1.8 * abs(b - a) / (abs(b - c) + abs(b - a))
    elif mask == "opposite":
        scale = 2 * abs(a - b) / (abs(a - b) + abs(a + b - 2 * c))
    else:
        scale = 2 * np.maximum(0, (c - a) * (b - c) / np.maximum(abs(a - c), abs(b - c)) ** 2)
    return a + alpha * scale * (b - c)


def smooth_add(models: Sequence[Array], alpha: float) -> Array:
    a, b, c = models
    return a + alpha * gaussian(median(b - c))


def median(values: Array) -> Array:
    padded = np.pad(values, 1, mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3,) * values.ndim)
    return np.median(windows.reshape(*values.shape, -1), axis=-1)


def gaussian(values: Array) -> Array:
    weights = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    weights /= weights.sum()
    for axis in range(values.ndim):
        padded = np.pad(values, [(4, 4) if one == axis else (0, 0) for one in range(values.ndim)], mode="symmetric")
        values = np.lib.stride_tricks.sliding_window_view(padded, 9, axis=axis) @ weights
    return values


def multiply_difference(models: Sequence[Array], alpha: float, beta: float) -> Array:
    a, b, c = models
    return c + np.sign(lerp(a, b, beta) - c) * abs(a - c) ** (1 - alpha) * abs(b - c) ** alpha


def euclidean_add_difference(models: Sequence[Array], alpha: float) -> Array:
    a, b, c = models
    u, v = (a - c) / norm(a - c), (b - c) / norm(b - c)
    s = lerp(a, b, alpha) - c
    q = np.sign(s) * np.sqrt((1 - alpha) * u**2 + alpha * v**2)
    return c + q / norm(q) * norm(s)


def similarity_add_difference(models: Sequence[Array], alpha: float, beta: float) -> Array:
    a, b, c = models
    k = beta * (a * b / np.maximum(abs(a), abs(b)) ** 2 + 1) / 2
    return (1 - k) * (a + alpha * (b - c)) + k * ((1 - alpha / 2) * a + alpha / 2 * b)


def extract_features(models: Sequence[Array], alpha: float, beta: float, gamma: float) -> Array:
    base, b, c = models
    db, dc = b - base, c - base
    c = (db * dc).sum(-1) / np.sqrt((db**2).sum(-1) * (dc**2).sum(-1))
    d = (((np.clip(c, -1, 1) + 1) / 2) ** gamma)[..., None]
    return base + lerp(db, dc, alpha) * lerp(d, 1 - d, beta)


def rotate(models: Sequence[Array], alpha: float, alignment: float, centralization: float = 1.0) -> Array:
    """For tall matrices, whose rotation is unique; by an eigendecomposition where the power is not whole."""
    a, b = models
    if a.ndim < 2:
        return lerp(a, b, alpha)
    rows = (-1, math.prod(a.shape[2:])) if math.prod(a.shape[2:]) > 1 else (a.shape[0], -1)
    a2, b2 = a.reshape(rows), b.reshape(rows)
    ma, mb = a2.mean(0) * centralization, b2.mean(0) * centralization
    u, _, vt = np.linalg.svd((a2 - ma).T @ (b2 - mb))
    if alignment not in (0, 1) and np.linalg.det(u @ vt) < 0:
        u[:, -1] *= -1
    q = u @ vt
    values, vectors = np.linalg.eig(q)
    power = (vectors @ np.diag(values.astype(complex) ** alignment) @ np.linalg.inv(vectors)).real
    return ((lerp(a2 - ma, (b2 - mb) @ q.T, alpha)) @ power + lerp(ma, mb, alignment)).reshape(a.shape)


def linear(models: Sequence[Array], weight: Sequence[float], normalize: bool = True) -> Array:
    total = sum(w * model for w, model in zip(weight, models, strict=True))
    return total / sum(weight) if normalize else total


def task_arithmetic(models: Sequence[Array], weight: Sequence[float], normalize: bool = False, **more: float) -> Array:
    return models[0] + more["lambda"] * linear([model - models[0] for model in models[1:]], weight, normalize)


def nuslerp(models: Sequence[Array], weight: Sequence[float], along: str = "tensor") -> Array:
    if len(models) == 3:
        return models[0] + nuslerp([model - models[0] for model in models[1:]], weight, along)
    share = weight[1] / (weight[0] + weight[1])
    if along == "tensor" or models[0].ndim == 1:
        return slerp(models, share)
    a, b = (model.reshape(len(model), -1) for model in models)
    if along == "row":
        result = np.stack([slerp(pair, share) for pair in zip(a, b, strict=True)])
    else:
        result = np.stack([slerp(pair, share) for pair in zip(a.T, b.T, strict=True)]).T
    return result.reshape(models[0].shape)


def multislerp(
    models: Sequence[Array], weight: Sequence[float] = (1, 1, 1), normalize: bool = True, with_base: bool = False
) -> Array:
    """mergekit's steps, with the one that comes to nothing."""
    if with_base:
        base = models[0]
        return base + multislerp([model - base for model in models[1:]], weight, normalize)
    weight = np.array(weight) / (sum(weight) if normalize else 1)
    units = [model / norm(model) for model in models]
    mean = sum(w * u for w, u in zip(weight, units, strict=True))
    mean = mean / norm(mean)
    tangents = [u - (u * mean).sum() * mean for u in units]
    v = sum(w * t for w, t in zip(weight, tangents, strict=True))
    size = norm(v) + 1e-300
    result = mean * math.cos(size) + v * math.sin(size) / size
    return result * sum(w * norm(model) for w, model in zip(weight, models, strict=True))


def karcher(models: Sequence[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    """By steps on the sphere, on whole tensors."""
    units = [model / norm(model) for model in models if norm(model) > tol]
    scale = sum(norm(model) for model in models) / len(models)
    if not units:
        return np.zeros_like(models[0])
    u = sum(units) / len(units)
    u = units[0] if norm(u) < tol else u / norm(u)
    for _ in range(max_iter):
        step = np.zeros_like(u)
        for unit in units:
            c = min(1.0, max(-1.0, float((unit * u).sum())))
            angle = math.acos(c)
            if angle >= tol:
                step = step + angle / math.sin(angle) * (unit - c * u) / len(units)
        if norm(step) < tol:
            break
        u = u * math.cos(norm(step)) + step / norm(step) * math.sin(norm(step))
        u = u / norm(u)
    return scale * u


def geometric_median(models: Sequence[Array], eps: float = 1e-6, maxiter: int = 100, ftol: float = 1e-20) -> Array:
    """By Weiszfeld's steps, on whole tensors."""
    m = sum(models) / len(models)
    objective = sum(norm(model - m) for model in models)
    for _ in range(maxiter):
        weights = [1 / max(norm(model - m), eps) for model in models]
        m = sum(w * model for w, model in zip(weights, models, strict=True)) / sum(weights)
        before, objective = objective, sum(norm(model - m) for model in models)
        if abs(before - objective) <= ftol * objective:
            break
    return m


def top(d: Array, density: float) -> Array:
    k = max(1, int(density * d.size))
    return np.where(abs(d) >= np.sort(abs(d), axis=None)[-k], d, 0)


def middle(d: Array, density: float, gamma: float) -> Array:
    if density == 1:
        return d
    k, largest = max(1, int(density * d.size)), int(gamma * d.size)
    first = max(0, d.size - k - largest)
    kept = np.sort(abs(d), axis=None)[first : first + k]
    return np.where((abs(d) >= kept[0]) & (abs(d) <= kept[-1]), d, 0)


def row_ranks(d: Array) -> Array:
    """0 for the smallest of a row, 1 for the largest, the mean for equal ones."""
    rows = abs(d).reshape(len(d), -1) if d.ndim > 1 else abs(d).reshape(1, -1)
    if rows.shape[1] == 1:
        return np.full(d.shape, 0.5)
    below = (rows[:, None, :] < rows[:, :, None]).sum(-1)
    equal = (rows[:, None, :] == rows[:, :, None]).sum(-1)
    return ((below + (equal - 1) / 2) / (rows.shape[1] - 1)).reshape(d.shape)


def task_sum(
    base: Array,
    deltas: Sequence[Array],
    weight: Sequence[float],
    *,
    consensus: bool,
    normalize: bool,
    scale: float = 1.0,
    vote: str = "sum",
) -> Array:
    """W0 + what the trimmed differences come to."""
    weight = np.array(weight).reshape(-1, *[1] * base.ndim)
    weighted = weight * np.stack(deltas)
    mask = np.ones(weighted.shape, bool)
    if consensus:
        votes = weighted if vote == "sum" else np.sign(weighted)
        mask = np.sign(weighted) == np.where(votes.sum(0) >= 0, 1, -1)
    divisor = (weight * mask).sum(0) if normalize else np.ones(base.shape)
    return base + scale * (weighted * mask).sum(0) / np.where(divisor == 0, 1, divisor)


def model_stock(models: Sequence[Array], filter_wise: bool = False) -> Array:
    if filter_wise and models[0].ndim > 1:
        rows = [model.reshape(len(model), -1) for model in models]
        return np.stack([model_stock(row) for row in zip(*rows, strict=True)]).reshape(models[0].shape)
    base, *others = models
    cosines = [cos(x - base, y - base) for x, y in itertools.combinations(others, 2)]
    c, n = sum(cosines) / len(cosines), len(others)
    t = n * c / (1 + (n - 1) * c)
    return t * sum(others) / n + (1 - t) * base


def sce(models: Sequence[Array], select_topk: float) -> Array:
    base = models[0]
    deltas = np.stack([model - base for model in models[1:]])
    if select_topk < 1:
        variance = deltas.var(0)
        k = int((variance > 0).sum() * select_topk)
        least = np.sort(variance, axis=None)[-k] if k else np.inf
        # NumPy's variance may differ in the last place between equal elements.
        deltas = deltas * (variance >= least * (1 - 1e-12))
    squares = (deltas**2).reshape(len(deltas), -1).mean(1)
    weights = squares / squares.sum() if squares.sum() else np.ones(len(deltas)) / len(deltas)
    weights = weights.reshape(-1, *[1] * base.ndim)
    counted = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    divisor = (weights * counted).sum(0)
    return base + (weights * counted * deltas).sum(0) / np.where(divisor == 0, 1, divisor)


def ram(models: Sequence[Array], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Array:
    base = models[0]
    deltas = np.stack([model - base for model in models[1:]])
    touched = abs(deltas) > epsilon
    count = touched.sum(0)
    result = base.copy()
    for delta, here in zip(deltas, touched, strict=True):
        own, shared = here & (count == 1), here & (count > 1)
        rho = shared.sum() / max(own.sum(), epsilon)
        result = result + delta * own * (1 + r * min(rho, alpha)) + delta * shared / np.maximum(count, 1)
    return result


def arcee_fusion(models: Sequence[Array]) -> Array:
    base, other = (model.reshape(len(model), -1) if model.ndim > 1 else model.reshape(1, -1) for model in models)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) + 1e-8 for x in (other, base))
    importance = abs(other - base) * (p * np.log(p / q)).sum(1, keepdims=True)
    low, mid, high = (np.sort(importance, axis=None)[int(q * (importance.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(importance >= mid + 1.5 * (high - low), other, base).reshape(models[0].shape)


FORMULAS: dict[str, Callable[..., Array]] = {
    "weighted_sum": lambda m, alpha: lerp(m[0], m[1], alpha),
    "slerp": slerp,
    "geometric_sum": geometric_sum,
    "nearswap": nearswap,
    "weighted_subtraction": lambda m, alpha, beta: (m[0] - alpha * beta * m[1]) / (1 - alpha * beta),
    "tensor_sum": tensor_sum,
    "top_k_tensor_sum": top_k_tensor_sum,
    "cosine_a": lambda m, alpha: cosine(m, alpha, directions=True),
    "cosine_b": lambda m, alpha: cosine(m, alpha, directions=False),
    "add_cosine_a": lambda m, alpha: add_cosine(m, alpha, overall=False),
    "add_cosine_b": lambda m, alpha: add_cosine(m, alpha, overall=True),
    "crossover": crossover,
    "rotate": rotate,
    "add_difference": lambda m, alpha: m[0] + alpha * (m[1] - m[2]),
    "add_perpendicular": add_perpendicular,
    "train_difference": train_difference,
    "smooth_add": smooth_add,
    "sum_twice": lambda m, alpha, beta: lerp(lerp(m[0], m[1], alpha), m[2], beta),
    "triple_sum": lambda m, alpha, beta: (1 - alpha - beta) * m[0] + alpha * m[1] + beta * m[2],
    "multiply_difference": multiply_difference,
    "multiply_quotient": multiply_quotient,
    "euclidean_add_difference": euclidean_add_difference,
    "similarity_add_difference": similarity_add_difference,
    "distribution_crossover": distribution_crossover,
    "extract_features": extract_features,
    "passthrough": lambda m, scale: scale * m[0],
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "geometric_median": geometric_median,
    "model_stock": model_stock,
    "sce": sce,
    "ram": ram,
    "ram_plus": lambda m, epsilon: ram(m, epsilon, r=0.1, alpha=0.2),
    "arcee_fusion": arcee_fusion,
}
