"""Sums against their definition, element by element and bit by bit: docs/numerics.md in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import save

from bake.api import fuse
from bake.errors import NonFinite
from bake.execute import sums
from bake.execute.chunk import Chunk, chunk_height
from bake.execute.device import Desk, Device
from bake.execute.rounding import Nearest
from bake.execute.sums import Sum
from bake.io.fileset import Expected, FileSet
from bake.plan.model import Stored, TensorPlan, Term
from bake.verify.rounding import round_once

TAGS = {"F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass(frozen=True)
class Update:
    """One term: factors (up, down), or one stored difference, for a region of the tensor."""

    arrays: tuple[NDArray[Any], ...]
    weight: float = 0.7
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    transposed: bool = False


class Bench:
    """A tensor and its updates, stored as a run finds them."""

    def __init__(self, folder: Path, base: NDArray[Any], updates: Sequence[Update], tag: str = "F16") -> None:
        self.base, self.updates, self.tag = base, updates, tag
        named = [
            {f"{place}.{name}": array for name, array in zip(("up", "down"), update.arrays, strict=False)}
            for place, update in enumerate(updates)
        ]
        path = save(folder / "factors.safetensors", {name: array for each in named for name, array in each.items()})
        status = path.stat()
        self.files = FileSet([Expected(path, status.st_size, status.st_mtime_ns)])
        with self.files.using(0) as file:
            info = dict(file.tensors)

        def stored(name: str) -> Stored:
            return Stored(0, name, info[name].dtype, info[name].shape, (info[name].begin, info[name].end))

        height, width = base.shape
        terms = []
        for place, update in enumerate(updates):
            rows, columns = update.rows or (0, height), update.columns or (0, width)
            names = ("up", "down") if len(update.arrays) == 2 else ("diff",)
            factors = {name: stored(f"{place}.{key}") for name, key in zip(names, ("up", "down"), strict=False)}
            count = rows[1] - rows[0]
            terms.append(
                Term(
                    algorithm="lora" if len(names) == 2 else "full",
                    factors=factors,
                    scale=0.5,
                    weight=update.weight,
                    rows=rows,
                    columns=columns,
                    part=(0, count),
                    height=count,
                    transposed=update.transposed,
                    adapter=0,
                    module="a",
                )
            )
        source = Stored(0, "base", {2: "F16", 4: "F32", 8: "F64"}[base.dtype.itemsize], base.shape, (0, 0))
        self.plan = TensorPlan("a.weight", base.shape, tag, (0, 0), source, "unet", tuple(terms))

    def run(self, elements: int | None = None, device: Device | None = None) -> bytes:
        """The bytes that a run writes, in chunks of so many elements."""
        device = device or Device("cpu")
        work, desk = Sum(self.plan, self.files, device, Nearest(self.tag)), Desk(device)
        out = torch.empty(self.base.shape, dtype=TAGS[self.tag])
        raw = torch.from_numpy(self.base)
        height, width = self.base.shape
        step = chunk_height(width, elements)
        for first in range(0, height, step):
            chunk = Chunk(first, min(height, first + step), width)
            rows = slice(chunk.first, chunk.last)
            work.fuse(raw[rows].contiguous(), part := torch.empty_like(out[rows]), chunk, desk)
            out[rows] = part
        return bytes(out.view(torch.uint8).numpy().data)

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
            up, down = (array.astype(np.float64) for array in each.arrays)
            left, right = (down.T * factor, up.T) if each.transposed else (up * factor, down)
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
        found: NDArray[np.float64] = self.base.astype(np.float64) + update
        return found

    def due(self) -> bytes:
        """The bytes that are right."""
        rounded = round_once(torch.from_numpy(self.exact()), self.tag)
        return bytes(rounded.to(TAGS[self.tag]).view(torch.uint8).numpy().data)


def normal(seed: int, *shape: int, spread: float = 1.0, dtype: type = np.float16) -> NDArray[Any]:
    values: NDArray[Any] = (np.random.default_rng(seed).standard_normal(shape) * spread).astype(dtype)
    return values


def lora(seed: int, rank: int, rows: int = 96, columns: int = 160, spread: float = 0.1) -> tuple[NDArray[Any], ...]:
    return normal(seed, rows, rank, spread=spread), normal(seed + 1, rank, columns, spread=spread)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("rank", [1, 3, 16, 128])
def test_every_element_is_the_float64_sum_rounded_once(tmp_path: Path, tag: str, rank: int) -> None:
    bench = Bench(tmp_path, normal(0, 96, 160), [Update(lora(1, rank))], tag)
    assert bench.run() == bench.due()


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
        "a part of a difference": [Update((normal(1, 10, 160),), rows=(50, 60)), Update(lora(2, 8))],
        "factors out of balance": [
            Update((normal(1, 96, 4, spread=1e-4), normal(2, 4, 160, spread=100))),
            Update((normal(3, 96, 4, spread=100), normal(4, 4, 160, spread=1e-4))),
        ],
    }.items(),
    ids=lambda item: item[0],
)
def test_terms_of_every_kind(tmp_path: Path, updates: tuple[str, list[Update]]) -> None:
    bench = Bench(tmp_path, normal(0, 96, 160), updates[1])
    assert bench.run() == bench.due()


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
    bench = Bench(tmp_path, base, [update], tag)
    assert bench.run() == bench.due()


@given(st.data())
def test_any_sum(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    seed, rows, columns = (data.draw(st.integers(1, limit)) for limit in (10**6, 40, 40))
    updates = []
    for number in range(data.draw(st.integers(1, 3))):
        rank = data.draw(st.integers(0, 20))
        spread = 2.0 ** data.draw(st.integers(-8, 3))
        dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
        factors = normal(seed + number, rows, rank, spread=spread, dtype=dtype), normal(seed - number, rank, columns)
        updates.append(Update(factors, data.draw(st.sampled_from([1.0, 0.7, -0.5, 1e-3]))))
    bench = Bench(
        tmp_path_factory.mktemp("sum"), normal(seed, rows, columns), updates, data.draw(st.sampled_from(sorted(TAGS)))
    )
    assert bench.run(data.draw(st.sampled_from([None, 1, 100]))) == bench.due()


class TestTheSameBytes:
    def test_in_chunks_of_any_size(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, normal(0, 96, 160), [Update(lora(1, 16)), Update(lora(3, 2, rows=30), rows=(9, 39))])
        due = bench.due()
        for elements in (1, 17 * 160, 96 * 160):
            assert bench.run(elements) == due

    def test_summed_in_float64_from_the_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = Bench(tmp_path, normal(0, 96, 160), [Update(lora(1, 16))])
        monkeypatch.setattr(sums, "_DENSE_SHARE", 0)
        assert bench.run(160 * 8) == bench.due()  # the first chunk finds undecided elements, the others are dense

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

    def test_where_float32_overflows_on_the_way(self, tmp_path: Path) -> None:
        up, down = normal(1, 96, 4, dtype=np.float32) * np.float32(1e30), normal(2, 4, 160, dtype=np.float32)
        update = Update((up, down * np.float32(1e-30)), 1e9)
        small = Update((up * np.float32(1e-9), down * np.float32(1e-30)), 1e9)
        for each in (update, small):
            bench = Bench(tmp_path, normal(0, 96, 160), [each], "BF16")
            assert bench.run() == bench.due()


def test_pairs_out_of_balance_do_not_widen_the_bound() -> None:
    pairs = [(torch.full((3, 2), high), torch.full((2, 4), 1 / high)) for high in (1e6, 1e-6)]
    tall, wide = sums._norms(pairs)
    assert 4 <= float((tall * wide).max()) < 9  # each pair alone: 2


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
