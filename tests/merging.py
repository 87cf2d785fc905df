"""Runs a merge method on one tensor as an engine would: its passes, then its chunks, in any pieces and any order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from bake.merges import METHODS, Role
from bake.merges.merge import Chunk, Job, Merge

# One of each kind of tensor that models have: more and fewer rows than columns, odd sizes, kernels, vectors.
SHAPES = ((7, 5), (4, 11), (16, 6, 3, 3), (5, 8, 1, 1), (13,))

# What a method needs to be given, or a value that shows more of it than its default does.
GIVEN: dict[str, dict[str, object]] = {
    "weighted_sum": {"alpha": 0.3},
    "slerp": {"alpha": 0.3},
    "geometric_sum": {"alpha": 0.3},
    "nearswap": {"t": 0.01},
    "weighted_subtraction": {"alpha": 0.4, "beta": 0.7},
    "tensor_sum": {"width": 0.4, "offset": 0.3},
    "top_k_tensor_sum": {"width": 0.4, "offset": 0.3},
    "cosine_a": {"alpha": 0.2},
    "cosine_b": {"alpha": 0.2},
    "add_cosine_a": {"alpha": 0.2},
    "add_cosine_b": {"alpha": 0.2},
    "crossover": {"alpha": 0.4, "tilt": 0.3},
    "rotate": {"alignment": 1.0, "alpha": 0.3},
    "add_difference": {"alpha": 0.7},
    "add_perpendicular": {"alpha": 0.7},
    "train_difference": {"alpha": 0.7},
    "smooth_add": {"alpha": 0.7},
    "sum_twice": {"alpha": 0.3, "beta": 0.6},
    "triple_sum": {"alpha": 0.3, "beta": 0.2},
    "multiply_difference": {"alpha": 0.3, "beta": 0.6},
    "multiply_quotient": {"alpha": 0.7},
    "euclidean_add_difference": {"alpha": 0.3},
    "similarity_add_difference": {"alpha": 0.7, "beta": 0.6},
    "distribution_crossover": {"cut": 0.4, "slope": 0.2},
    "extract_features": {"alpha": 0.3, "beta": 0.2, "gamma": 1.5},
    "passthrough": {"scale": 0.7},
    "linear": {"weight": [0.5, 1.5, -0.25]},
    "nuslerp": {"weight": [0.5, 1.5]},
    "multislerp": {"weight": [0.5, 1.5, 0.25]},
    "task_arithmetic": {"weight": [0.5, 0.7, -0.25], "lambda": 0.9},
    "ties": {"density": [0.3, 0.5, 0.6], "weight": [0.5, 0.7, 0.25]},
    "dare_linear": {"density": 0.6, "weight": [0.5, 0.7, 0.25]},
    "dare_ties": {"density": 0.6, "weight": [0.5, 0.7, 0.25]},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
    "della": {"density": 0.6, "epsilon": 0.2},
    "della_linear": {"density": 0.6, "epsilon": 0.2},
    "dropout": {"density": 0.6},
    "sce": {"select_topk": 0.6},
    "ram": {"epsilon": 0.02},
    "ram_plus": {"epsilon": 0.02},
}


def count_of(name: str) -> int:
    """How many models a test gives a method."""
    method = METHODS[name]
    return method.least if method.most is not None else 3 + (method.roles[0] == Role("base"))


def models_for(count: int, shape: Sequence[int], *, seed: int = 0, apart: float = 0.3) -> list[np.ndarray]:
    """Models as they are after fine-tuning: what they have in common, and what each has learned, in half precision."""
    generator = np.random.default_rng(seed)
    common = generator.normal(0, 0.05, shape)
    return [
        (common + generator.normal(0, 0.05 * apart, shape)).astype(np.float16).astype(np.float64) for _ in range(count)
    ]


def job_for(name: str, models: Sequence[np.ndarray], given: Mapping[str, object], **more: object) -> Job:
    method = METHODS[name]
    roles = method.roles_of(len(models), bool(more.pop("with_base", False)))
    values = method.values(given, roles)
    return Job(str(more.get("tensor", "layer.weight")), models[0].shape, roles, values, int(more.get("seed", 0)))


def merge(
    name: str,
    models: Sequence[np.ndarray],
    given: Mapping[str, object] | None = None,
    *,
    height: int | None = None,
    shuffled: bool = False,
    threads: int = 1,
    **more: object,
) -> np.ndarray:
    """The merged tensor. height: of chunks, in rows; None: one chunk. shuffled: passes see them in random order."""
    work = METHODS[name].load()(job_for(name, models, GIVEN.get(name, {}) if given is None else given, **more))
    chunks = chunks_of(work, models, height)
    survey(work, chunks, shuffled, threads)
    type(work).agree([work])
    return blended(work, chunks, models[0].shape)


def chunks_of(work: Merge, models: Sequence[np.ndarray], height: int | None = None) -> list[Chunk]:
    rows, _ = work.view
    seen = [torch.from_numpy(np.ascontiguousarray(model)).reshape(work.view) for model in models]
    step = rows if work.whole or height is None else height
    return [Chunk(first, [model[first : first + step] for model in seen]) for first in range(0, rows, step)]


def survey(work: Merge, chunks: Sequence[Chunk], shuffled: bool = False, threads: int = 1) -> int:
    """Make the passes of a merge, and return their number."""
    order = list(chunks)
    count = 0
    for one in work.passes():
        if shuffled:
            random.Random(count).shuffle(order)
        if threads == 1:
            for chunk in order:
                one.add(chunk)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(one.add, order))
        count += 1
    return count


def blended(work: Merge, chunks: Sequence[Chunk], shape: Sequence[int]) -> np.ndarray:
    before = [[model.clone() for model in chunk.models] for chunk in chunks]
    found: list[Tensor] = [work.blend(chunk) for chunk in chunks]
    for chunk, models in zip(chunks, before, strict=True):
        assert all(itertools.starmap(torch.equal, zip(chunk.models, models, strict=True))), "a chunk was changed"
    return torch.cat(found).reshape(tuple(shape)).numpy()


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()
