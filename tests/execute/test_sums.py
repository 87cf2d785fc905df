"""Sums against their definition, element by element and bit by bit: docs/numerics.md in NumPy.

Both parts of bake that make them are held against it: torch's, and NumPy's where it takes the tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import save, save_torch

from bake.api import fuse
from bake.errors import NonFinite
from bake.execute import kernels, sums
from bake.execute.chunk import Chunk, chunk_height
from bake.execute.device import Desk, Device
from bake.execute.plain import sums as plain
from bake.execute.plain.desk import Desk as PlainDesk
from bake.execute.plain.pipeline import _is_plain
from bake.execute.plain.rounding import TooLarge
from bake.execute.rounding import Nearest
from bake.execute.sums import Sum
from bake.execute.survival import NOTHING, Survival
from bake.io.fileset import Expected, FileSet
from bake.plan.model import Stored, TensorPlan, Term
from bake.verify.rounding import round_once

TAGS = {"F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
STORED = {**TAGS, "F32": torch.float32, "F64": torch.float64}
PAIRS = ((1, 1), (2, -1))
KINDS = ((), ("compiled",), ("compiled", "products"))  # of loops in C, where they were built
TOO_LARGE = {"F16": 2.0**15, "BF16": 2.0**100}  # what NumPy may leave to torch


@dataclass(frozen=True)
class Update:
    """One term: factors (up, down), or one stored difference, for a region of the tensor."""

    arrays: tuple[NDArray[Any], ...]
    weight: float = 0.7
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    transposed: bool = False
    tag: str | None = None  # they are stored as; None: as they are
    first: int = 0  # row of the update that goes to the first row of the region
    rank_limit: int | None = None
    expert: tuple[int, int] | None = None  # number, of how many

    def pair(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(left, right), not scaled, of which the region gets rows."""
        up, down = (array.astype(np.float64) for array in self.arrays)
        if self.expert is not None:
            up, down = up[:, self.expert[0] :: self.expert[1]], np.split(down, self.expert[1])[self.expert[0]]
        up, down = up[:, : self.rank_limit], down[: self.rank_limit]
        return (down.T, up.T) if self.transposed else (up, down)


class Bench:
    """A tensor and its updates, stored as a run finds them."""

    def __init__(
        self, folder: Path, base: NDArray[Any], updates: Sequence[Update], tag: str = "F16", source: str | None = None
    ) -> None:
        """source: the dtype that the base is stored in, which can hold it; None: its own."""
        self.base, self.updates, self.tag = base, updates, tag
        self.source = source or {2: "F16", 4: "F32", 8: "F64"}[base.dtype.itemsize]
        tensors = {
            f"{place}.{name}": stored(array, update.tag)
            for place, update in enumerate(updates)
            for name, array in zip(("up", "down"), update.arrays, strict=False)
        }
        path = save_torch(folder / "factors.safetensors", tensors)
        status = path.stat()
        self.files = FileSet([Expected(path, status.st_size, status.st_mtime_ns)])
        with self.files.using(0) as file:
            info = dict(file.tensors)

        def place_of(name: str) -> Stored:
            return Stored(0, name, info[name].dtype, info[name].shape, (info[name].begin, info[name].end))

        height, width = base.shape
        terms = []
        for place, update in enumerate(updates):
            rows, columns = update.rows or (0, height), update.columns or (0, width)
            names = ("up", "down") if len(update.arrays) == 2 else ("diff",)
            factors = {name: place_of(f"{place}.{key}") for name, key in zip(names, ("up", "down"), strict=False)}
            count = rows[1] - rows[0]
            terms.append(
                Term(
                    algorithm="lora" if len(names) == 2 else "full",
                    factors=factors,
                    scale=0.5,
                    weight=update.weight,
                    rows=rows,
                    columns=columns,
                    part=(update.first, update.first + count),
                    height=count,
                    transposed=update.transposed,
                    adapter=0,
                    module="a",
                    rank_limit=update.rank_limit,
                    settings=dict(zip(("expert", "experts"), update.expert or (), strict=False)),
                )
            )
        place = Stored(0, "base", self.source, base.shape, (0, 0))
        self.plan = TensorPlan("a.weight", base.shape, tag, (0, 0), place, "unet", tuple(terms))

    def check(self, steps: Sequence[int] = (13, 96)) -> None:
        """Compare what both parts of bake write, in blocks of so many rows, with the definition."""
        due, width = self.due(), self.base.shape[1]
        if self.updates and self.base.size:  # the others only convert, or have nothing to do
            for step in steps:
                assert self.run(step * width) == due
        if _is_plain(self.plan):
            for step, kind in itertools.product(steps, KINDS):
                try:
                    assert self.run_plain(step, kind=kind)[0] == due
                except TooLarge:
                    assert self.largest() >= TOO_LARGE[self.tag]

    def largest(self) -> float:
        """The largest magnitude of what is read and written."""
        return max(float(np.abs(each).max(initial=0)) for each in (self.base, self.exact()))

    def run_plain(self, step: int, is_fast: bool = False, kind: Sequence[str] = ()) -> tuple[bytes, Survival]:
        """The bytes that the part without torch writes, in blocks of so many rows, and what survived.

        kind: the loops in C that it may use.
        """
        work, desk = plain.Sum(self.plan, self.files, is_fast), PlainDesk()
        out = np.empty(self.base.shape, np.uint16)
        raw = stored(self.base, self.source)
        lying = raw.view(torch.int16).numpy().view(np.uint16) if self.source == "BF16" else raw.numpy()
        survival = NOTHING
        with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
            for name in {"compiled", "products"} - set(kind):
                patch.setattr(kernels, name, None)
            for first in range(0, len(out), step):
                rows = slice(first, first + step)
                survival += work.fuse(lying[rows], out[rows], first, desk)
        return out.tobytes(), survival

    def run(self, elements: int | None = None, device: Device | None = None) -> bytes:
        """The bytes that a run writes, in chunks of so many elements."""
        device = device or Device("cpu")
        work, desk = Sum(self.plan, self.files, device, Nearest(self.tag)), Desk(device)
        out = torch.empty(self.base.shape, dtype=TAGS[self.tag])
        raw = stored(self.base, self.source)
        height, width = self.base.shape
        step = chunk_height(width, elements)
        for first in range(0, height, step):
            chunk = Chunk(first, min(height, first + step), width)
            rows = slice(chunk.first, chunk.last)
            work.fuse(raw[rows].contiguous(), part := torch.empty_like(out[rows]), chunk, desk)
            out[rows] = part
        return bytes(out.flatten().view(torch.uint8).numpy().data)

    def exact(self) -> NDArray[np.float64]:
        """W + ((g_1 + g_2) + ...), as docs/numerics.md defines it."""
        update = np.zeros(self.base.shape)
        groups: list[tuple[Any, list[NDArray[np.float64]]]] = []
        for each in self.updates:
            region = (each.rows or (0, self.base.shape[0]), each.columns or (0, self.base.shape[1]))
            factor = 0.5 * each.weight
            if len(each.arrays) == 1:
                values = each.arrays[0].astype(np.float64)
                groups.append(
                    ((region, len(groups)), [((values.T if each.transposed else values) * factor)[..., None]])
                )
                continue
            left, right = each.pair()
            left = left[each.first :][: region[0][1] - region[0][0]] * factor
            products = left[:, None, :] * right.T[None, :, :]
            if groups and groups[-1][0] == (region, "products"):
                groups[-1][1].append(products)
            else:
                groups.append(((region, "products"), [products]))
        for (region, _), products in groups:
            joined = np.concatenate(products, axis=2)
            size = 1 << max(0, math.ceil(math.log2(max(1, joined.shape[2]))))
            joined = np.concatenate([joined, np.zeros((*joined.shape[:2], size - joined.shape[2]))], axis=2)
            while joined.shape[2] > 1:
                half = joined.shape[2] // 2
                joined = joined[:, :, :half] + joined[:, :, half:]
            update[slice(*region[0]), slice(*region[1])] += joined[:, :, 0]
        found: NDArray[np.float64] = self.base.astype(np.float64)
        return found + update if self.updates else found

    def due(self) -> bytes:
        """The bytes that are right."""
        rounded = torch.from_numpy(round_once(self.exact(), self.tag))
        return bytes(rounded.to(TAGS[self.tag]).flatten().view(torch.uint8).numpy().data)


def stored(values: NDArray[Any], tag: str | None) -> torch.Tensor:
    """`values` as a tensor of the stored dtype `tag`, which can hold them; None: of their own."""
    tensor = torch.from_numpy(np.array(values, order="C"))  # in memory of its own
    found = tensor if tag is None else tensor.to(STORED[tag])
    assert torch.equal(found.to(tensor.dtype), tensor)
    return found


def normal(seed: int, *shape: int, spread: float = 1.0, dtype: type = np.float16) -> NDArray[Any]:
    values: NDArray[Any] = (np.random.default_rng(seed).standard_normal(shape) * spread).astype(dtype)
    return values


def lora(seed: int, rank: int, rows: int = 96, columns: int = 160, spread: float = 0.1) -> tuple[NDArray[Any], ...]:
    return normal(seed, rows, rank, spread=spread), normal(seed + 1, rank, columns, spread=spread)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("rank", [1, 3, 16, 128])
def test_every_element_is_the_float64_sum_rounded_once(tmp_path: Path, tag: str, rank: int) -> None:
    Bench(tmp_path, normal(0, 96, 160), [Update(lora(1, rank))], tag).check()


@pytest.mark.parametrize(
    "updates",
    {
        "several": [Update(lora(1, 4), 0.3), Update(lora(3, 9), -1.2), Update(lora(5, 1), 2.0)],
        "parts": [
            Update(lora(1, 4, rows=32), rows=(0, 32)),
            Update(lora(3, 4, rows=32), rows=(32, 64)),
            Update(lora(5, 5)),
            Update(lora(7, 6, columns=100), columns=(20, 120)),
            Update(lora(9, 4, rows=32), 0.1, rows=(0, 32)),
        ],
        "transposed": [Update(lora(1, 4, rows=160, columns=96), transposed=True)],
        "differences": [
            Update((normal(1, 96, 160),)),
            Update(lora(2, 8)),
            Update((normal(4, 160, 96),), transposed=True),
        ],
        "parts of updates": [
            Update(lora(1, 4, rows=90), rows=(10, 40), first=50),
            Update(lora(3, 4, rows=160, columns=70), rows=(40, 96), first=14, transposed=True),
        ],
        "the first ranks": [
            Update(lora(1, 8), rank_limit=3),
            Update(lora(3, 8, rows=160, columns=96), rank_limit=5, transposed=True),
            Update(lora(5, 8), rank_limit=20),
        ],
        "experts": [
            Update(lora(1, 12, rows=48), rows=(0, 48), expert=(0, 3)),
            Update(lora(3, 12, rows=160, columns=48), rows=(48, 96), expert=(2, 3), transposed=True),
            Update(lora(5, 12), expert=(1, 3), rank_limit=3),
        ],
        "a part of a difference": [Update((normal(1, 10, 160),), rows=(50, 60)), Update(lora(2, 8))],
        "factors out of balance": [
            Update((normal(1, 96, 4, spread=1e-4), normal(2, 4, 160, spread=100))),
            Update((normal(3, 96, 4, spread=100), normal(4, 4, 160, spread=1e-4))),
        ],
    }.items(),
    ids=lambda item: item[0],
)
def test_terms_of_every_kind(tmp_path: Path, updates: tuple[str, list[Update]]) -> None:
    Bench(tmp_path, normal(0, 96, 160), updates[1]).check()


def ties() -> tuple[NDArray[Any], Update]:
    """A base and an update whose sums lie exactly in the middle between two halves, every one."""
    base = 1 + np.arange(96 * 160).reshape(96, 160) % 1024 / 1024
    up, down = np.full((96, 2), 2.0**-6), np.full((2, 160), 2.0**-5)
    return base.astype(np.float16), Update((up.astype(np.float16), down.astype(np.float16)), 1.0)


def cancelling() -> tuple[NDArray[Any], Update]:
    """An update that takes almost everything away."""
    up, down = lora(1, 8, spread=1.0)
    base = -(0.5 * up.astype(np.float64) @ down.astype(np.float64))
    return base.astype(np.float16), Update((up, down), 1.0)


@pytest.mark.parametrize(
    ("base", "update"),
    [
        ties(),
        cancelling(),
        (np.zeros((96, 160), np.float16), Update(lora(1, 8))),
        (normal(0, 96, 160), Update((np.zeros((96, 4), np.float16), normal(1, 4, 160)))),
        (np.zeros((96, 160), np.float16), Update((np.zeros((96, 4), np.float16), normal(1, 4, 160)))),
        (normal(0, 96, 160, spread=1e-7), Update(lora(1, 8, spread=3e-4))),
        (normal(0, 96, 160, dtype=np.float32), Update(lora(1, 8, spread=1e-5))),
        (normal(0, 96, 160, dtype=np.float64), Update(lora(1, 8, spread=1e-5))),
        (normal(0, 96, 160), Update((np.ones((96, 64), np.float16), np.full((64, 160), 0.1, np.float16)))),
    ],
    ids=["ties", "cancelling", "zero base", "zero update", "zeros", "subnormal", "float32", "float64", "one-sided"],
)
@pytest.mark.parametrize("tag", ["F16", "BF16"])
def test_what_rounds_badly(tmp_path: Path, base: NDArray[Any], update: Update, tag: str) -> None:
    Bench(tmp_path, base, [update], tag).check()


def any_values(random: np.random.Generator, shape: tuple[int, int], tag: str) -> NDArray[np.float32]:
    """Numbers that the stored dtype `tag` holds: alike in size or of any, random or with few bits, some zero."""
    lowest, highest = {"F16": (-26, 13), "BF16": (-136, 13), "F32": (-60, 13)}[tag]
    spread = random.choice([0, 3, 200])
    exponents = random.integers(lowest, highest) + random.integers(-spread, spread + 1, shape)
    few_bits = random.choice([1, 1.5, *(one + sign * 2.0**-bits for bits in (7, 10) for one, sign in PAIRS)], shape)
    fractions = [random.uniform(1, 2, shape), few_bits, np.ones(shape)][random.integers(3)]
    values = np.ldexp(fractions * random.choice([-1, 1], shape), np.clip(exponents, lowest, highest))
    values *= random.random(shape) >= random.choice([0, 0, 0.5, 1])
    return round_once(values, tag).astype(np.float32)


def any_update(random: np.random.Generator, height: int, width: int) -> Update:
    """A LoRA for all or some rows and columns."""
    rows, columns = (
        (0, size)
        if size < 2 or random.random() < 0.5
        else tuple(np.sort(random.choice(size + 1, 2, replace=False)).tolist())
        for size in (height, width)
    )
    rank, tag = int(random.integers(0, 20)), str(random.choice(["F16", "BF16", "F32"]))
    tall, wide = rows[1] - rows[0], columns[1] - columns[0]
    is_transposed = bool(random.random() < 0.3)
    if is_transposed:
        tall, wide = wide, tall
    factors = any_values(random, (tall, rank), tag), any_values(random, (rank, wide), tag)
    return Update(factors, float(random.choice([2, 2, 0.7, -0.5])), rows, columns, is_transposed, tag)


@given(st.data())
def test_any_sum(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    seed, rows, columns = (data.draw(st.integers(1, limit)) for limit in (10**6, 40, 40))
    updates = []
    for number in range(data.draw(st.integers(1, 3))):
        rank = data.draw(st.integers(0, 20))
        spread = 2.0 ** data.draw(st.integers(-8, 3))
        dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
        up = normal(seed + number, rows, rank, spread=spread, dtype=dtype)
        factors = up, normal(seed + 100 + number, rank, columns)
        updates.append(Update(factors, data.draw(st.sampled_from([1.0, 0.7, -0.5, 1e-3]))))
    tag, steps = data.draw(st.sampled_from(sorted(TAGS))), data.draw(st.sampled_from([[40], [1], [3]]))
    Bench(tmp_path_factory.mktemp("sum"), normal(seed, rows, columns), updates, tag).check(steps)


@settings(max_examples=300)
@given(
    *(st.integers(0, 10**6), st.sampled_from([0, 1, 2, 9, 30]), st.sampled_from([1, 2, 7, 64])),
    *(st.sampled_from(["F16", "BF16", "F32"]), st.sampled_from(["F16", "BF16"]), st.sampled_from([None, 0, 1])),
)
def test_any_sum_of_numbers_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, seed: int, height: int, width: int, source: str, tag: str, share: int
) -> None:
    random = np.random.default_rng(seed)
    updates = [any_update(random, height, width) for _ in range(random.integers(0, 4))]
    base = any_values(random, (height, width), source)
    if random.random() < 0.5:  # nothing is left of the updates, or next to nothing
        updates += [replace(each, weight=-each.weight) for each in updates]
    bench = Bench(tmp_path_factory.mktemp("sum"), base, updates, tag, source)
    with pytest.MonkeyPatch.context() as patch:
        for module in (plain, sums) if share is not None else ():
            patch.setattr(module, "_DENSE_SHARE", share)
        patch.setattr(plain, "_PIECE_ELEMENTS", int(random.choice([1, 100, 1 << 16])))
        patch.setattr(plain, "_GATHERED", int(random.choice([1, 1 << 16])))
        if tag == "BF16" or bench.largest() < 60000:  # the others are refused
            bench.check([int(random.choice([1, 4, 30]))])


def test_where_only_the_defined_order_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    some = (10 ** random.uniform(-4, 0, (96, 8))).astype(np.float32)
    up = np.concatenate([some, np.full((96, 1), 2.0**-25, np.float32), -random.permuted(some, axis=1)], axis=1)
    down = np.repeat(random.uniform(0.5, 1, (1, 160)).astype(np.float32), 17, axis=0)
    down[8] = 1  # so that all of it adds up to 2**-25, half a last place, but for what float64 loses
    base = np.full((96, 160), 2.0**-14, np.float16)
    base[:, ::2] += np.float16(2.0**-24)
    bench = Bench(tmp_path, base, [Update((up, down), 2.0)])
    assert len(np.unique(np.frombuffer(bench.due(), np.uint16))) == 3  # down, up or down, up
    bench.check()
    monkeypatch.setattr(plain, "_sum_as_defined", plain._sum_in_any_order)
    assert bench.run_plain(96)[0] != bench.due()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(-40, 40), st.integers(-40, 40))
def test_the_norms_bound_the_magnitudes_of_all_products(seed: int, rank: int, tall: int, wide: int) -> None:
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(2):
        spread = np.exp(random.normal(0, random.choice([0, 1, 20]), rank))
        left = random.normal(size=(3, rank)) * 10.0**tall * spread
        right = np.float32(random.normal(size=(rank, 4)) / spread[:, None] * 10.0 ** min(wide, 15))
        pairs.append((left, right))
    bounds = [part.astype(np.float64) for part in plain._norms(pairs)]
    magnitudes = sum(np.abs(left) @ np.abs(right.astype(np.float64)) for left, right in pairs)
    assert (bounds[0] * bounds[1] >= magnitudes).all()


class TestTheSameBytes:
    def test_in_chunks_of_any_size(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, normal(0, 96, 160), [Update(lora(1, 16)), Update(lora(3, 2, rows=30), rows=(9, 39))])
        due = bench.due()
        for elements in (1, 17 * 160, 96 * 160):
            assert bench.run(elements) == due

    @pytest.mark.parametrize("share", [0, 1])
    def test_summed_in_float64_from_the_start_or_never(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int
    ) -> None:
        bench = Bench(tmp_path, normal(0, 96, 160, spread=1e-3), [Update(lora(1, 16)), Update(lora(3, 5))])
        for module in (sums, plain):
            monkeypatch.setattr(module, "_DENSE_SHARE", share)
        bench.check()  # with 0 the first chunk finds undecided elements, the others are dense

    @pytest.mark.parametrize("seed", range(5))
    def test_with_a_blas_that_sums_in_another_order(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
    ) -> None:
        bench = Bench(tmp_path, normal(0, 96, 160), [Update(lora(1, 64))])

        def shuffled(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
            order = torch.from_numpy(np.random.default_rng(seed).permutation(left.shape[1]))
            out.zero_()
            for place in order.tolist():
                out += left[:, place : place + 1] * right[place]

        assert bench.run() == bench.due()
        monkeypatch.setattr(torch, "mm", shuffled)
        assert bench.run() == bench.due()

    @pytest.mark.parametrize("is_dense", [False, True])
    @pytest.mark.parametrize("seed", range(3))
    def test_with_a_blas_that_makes_the_largest_errors_it_may(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, is_dense: bool
    ) -> None:
        random = np.random.default_rng(seed)
        up, down = (random.choice([-1, 1], shape).astype(np.float32) for shape in ((96, 32), (32, 160)))
        up *= 2.0 ** (np.arange(96) % 13 - 12)[:, None].astype(np.float32)  # each row has a bound of its own
        factors = up, down * np.float32(2.0**40 if is_dense else 1.0)
        # In float64 errors count only where next to nothing is left of large products.
        updates = [Update(factors, 0.7), Update(factors, -0.7)] if is_dense else [Update(factors, 0.7)]
        bench = Bench(tmp_path, normal(seed, 96, 160, dtype=np.float32), updates)
        unit = 2.0**-53 if is_dense else 2.0**-24

        def worst(left: NDArray[Any], right: NDArray[Any], out: NDArray[Any]) -> None:
            exact = matmul(left.astype(np.float64), right.astype(np.float64))
            bound = left.shape[1] * unit * matmul(np.abs(left), np.abs(right))
            out[:] = exact + bound * random.choice([-1, 1], out.shape)

        matmul = np.matmul
        monkeypatch.setattr(plain, "_PIECE_ELEMENTS", 2 * 160)
        monkeypatch.setattr(plain, "_DENSE_SHARE", -1 if is_dense else 1)
        monkeypatch.setattr(np, "matmul", worst)
        assert bench.run_plain(13)[0] == bench.due()

    def test_where_products_are_too_small_for_float32(self, tmp_path: Path) -> None:
        """All of them together lift the sum over a tie; each alone is nothing."""
        base = np.full((3, 5), 1.5 * 2.0**-133 - 2.0**-146, np.float32)
        factors = np.full((3, 64), 2.0**-75, np.float32), np.full((64, 5), 2.0**-75, np.float32)
        Bench(tmp_path, base, [Update(factors, 2.0)], "BF16").check()

    def test_a_base_beyond_float32_is_called_too_large_and_not_infinite(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, np.full((4, 5), 1e300), [Update(lora(1, 2, 4, 5))])
        with pytest.raises(NonFinite, match=r"the result reaches 1e\+300"):
            bench.run()

    def test_where_infinities_of_float32_cancel(self, tmp_path: Path) -> None:
        up, down = normal(1, 96, 4, dtype=np.float32) * np.float32(1e30), normal(2, 4, 160, dtype=np.float32)
        factors = up, down * np.float32(1e9)
        bench = Bench(tmp_path, normal(0, 96, 160), [Update(factors, 1.0), Update(factors, -1.0)], "BF16")
        assert bench.run() == bench.due()

    def test_float32_is_tried_once_where_it_decides_too_little(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench = Bench(tmp_path, normal(0, 96, 160, spread=1e-3), [Update(lora(1, 128, spread=1.0))])
        tried: list[int] = []
        original = Sum._in_float32

        def counted(self: Sum, raw: torch.Tensor, *rest: Any) -> Any:
            tried.append(raw.shape[0])
            return original(self, raw, *rest)

        monkeypatch.setattr(Sum, "_in_float32", counted)
        monkeypatch.setattr(sums, "_DENSE_SHARE", 1 / 1000)
        assert bench.run(160 * 8) == bench.due()
        assert tried == [8]

    def test_float64_leaves_next_to_nothing_open_once_float32_left_too_much(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench = Bench(tmp_path, normal(0, 96, 160, spread=1e-3), [Update(lora(1, 128, spread=1.0))])
        open_places: list[int] = []
        original = plain.Sum._recompute

        def counted(self: plain.Sum, places: NDArray[np.intp], *rest: Any) -> None:
            open_places.append(len(places))
            original(self, places, *rest)

        monkeypatch.setattr(plain.Sum, "_recompute", counted)
        assert bench.run_plain(8)[0] == bench.due()
        assert open_places[0] > 8 * 160 / 20
        assert max(open_places[1:]) < 8 * 160 / 20

    def test_float32_stays_in_use_where_it_decides_enough(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, normal(0, 96, 160), [Update(lora(1, 16))])
        work, out = plain.Sum(bench.plan, bench.files, False), np.empty(bench.base.shape, np.uint16)
        work.fuse(bench.base, out, 0, PlainDesk())
        assert out.tobytes() == bench.due()
        assert not work._is_dense

    def test_undecided_elements_are_summed_in_little_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, update = ties()
        products: list[int] = []

        def counted(values: NDArray[np.float64]) -> Any:
            products.append(values.size)
            return original(values)

        original = plain.sum_by_halves
        monkeypatch.setattr(plain, "sum_by_halves", counted)
        monkeypatch.setattr(plain, "_GATHERED", 1000)
        bench = Bench(tmp_path, base, [update])
        assert bench.run_plain(96)[0] == bench.due()
        assert sum(products) == base.size * 2
        assert max(products) <= 1000

    def test_where_float32_overflows_on_the_way(self, tmp_path: Path) -> None:
        up, down = normal(1, 96, 4, dtype=np.float32) * np.float32(1e30), normal(2, 4, 160, dtype=np.float32)
        update = Update((up, down * np.float32(1e-30)), 1e9)
        small = Update((up * np.float32(1e-9), down * np.float32(1e-30)), 1e9)
        for each in (update, small):
            bench = Bench(tmp_path, normal(0, 96, 160), [each], "BF16")
            assert bench.run() == bench.due()


@pytest.mark.parametrize("tag", ["F16", "BF16"])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_what_survives_is_measured_on_every_16th_row_of_the_tensor(tmp_path: Path, kind: type, tag: str) -> None:
    bench = Bench(tmp_path, normal(0, 96, 160, dtype=kind), [Update(lora(1, 8, spread=0.02))], tag)
    sampled = bench.exact()[::16]
    update = sampled - bench.base[::16]
    written = round_once(sampled, tag) - round_once(bench.base[::16].astype(np.float64), tag)
    due = [np.square(update).sum(), np.square(update - written).sum(), (update * written).sum()]
    for step in (5, 13, 16, 96):
        found = bench.run_plain(step)[1]
        assert [found.update, found.lost, found.along] == pytest.approx(due, rel=1e-3)


def test_pairs_out_of_balance_do_not_widen_the_bound() -> None:
    pairs = [(np.full((3, 2), high), np.full((2, 4), 1 / high)) for high in (1e6, 1e-6)]
    tall, wide = sums._norms([(torch.from_numpy(left), torch.from_numpy(right)) for left, right in pairs])
    assert 4 <= float((tall * wide).max()) < 9  # each pair alone: 2
    assert 4 <= float(np.multiply(*plain._norms(pairs)).max()) < 9


def test_fast_rounding_leaves_few_elements_wrong_and_verification_allows_that(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", {"a.weight": normal(0, 600, 500)})
    factors = {"a.lora_B.weight": normal(1, 600, 64), "a.lora_A.weight": normal(2, 64, 500)}
    lora_file = save(tmp_path / "lora.safetensors", factors)
    exact = fuse(base, [lora_file], tmp_path / "exact.safetensors", verify="full").report
    fast = fuse(base, [lora_file], tmp_path / "fast.safetensors", verify="full", rounding="fast").report
    assert exact is not None
    assert fast is not None
    assert exact.equal_share == 1
    assert 0.999 < fast.equal_share < 1
    assert fast.ok


def test_the_definition_is_the_true_sum_but_for_float64_s_own_rounding(tmp_path: Path) -> None:
    bench = Bench(tmp_path, normal(0, 6, 8), [Update(lora(1, 12, 6, 8)), Update(lora(3, 3, 6, 8), -1.5)])
    found = bench.exact()
    for row, column in np.ndindex(6, 8):
        true = Fraction(float(bench.base[row, column]))
        for update in bench.updates:
            up, down = update.arrays
            true += Fraction(0.5 * update.weight) * sum(
                Fraction(float(one)) * Fraction(float(two)) for one, two in zip(up[row], down[:, column], strict=True)
            )
        assert abs(Fraction(float(found[row, column])) - true) < 2.0**-48
