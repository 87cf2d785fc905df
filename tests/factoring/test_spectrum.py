"""Singular values and factors, against LAPACK's SVD in NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import random

from bake.errors import NonFinite
from bake.factoring.factors import Dense, Product, clamped, residual, squares, stored
from bake.factoring.spectrum import exact, of_product, sketched, spectrum_of


def matrix(rows: int, columns: int, rank: int = 6, noise: float = 1e-3) -> NDArray[np.float64]:
    """A matrix of falling singular values over noise."""
    left, right = random(1, rows, rank), random(2, rank, columns)
    return (left * 2.0 ** -np.arange(rank)) @ right + random(3, rows, columns, spread=noise)


def best(values: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    left, sizes, right = np.linalg.svd(values, full_matrices=False)
    found: NDArray[np.float64] = (left[:, :rank] * sizes[:rank]) @ right[:rank]
    return found


@pytest.mark.parametrize(("rows", "columns"), [(40, 17), (17, 40), (20, 20), (1, 9), (9, 1)])
def test_the_exact_spectrum_is_lapacks(rows: int, columns: int) -> None:
    values = matrix(rows, columns)
    found = exact(torch.from_numpy(values))
    np.testing.assert_allclose(found.values, np.linalg.svd(values, compute_uv=False), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(found.left @ found.right, values, atol=1e-12)
    for rank in range(1, min(rows, columns) + 1):
        np.testing.assert_allclose(found.left[:, :rank] @ found.right[:rank], best(values, rank), atol=1e-8)


def test_a_matrix_of_zeros_has_zeros() -> None:
    found = exact(torch.zeros((5, 3), dtype=torch.float64))
    assert not found.values.any()
    assert torch.isfinite(found.left).all()
    assert torch.isfinite(found.right).all()


def test_both_factors_are_of_one_size() -> None:
    found = exact(torch.from_numpy(matrix(30, 20)))
    torch.testing.assert_close(
        torch.linalg.vector_norm(found.left, dim=0), torch.linalg.vector_norm(found.right, dim=1)
    )
    torch.testing.assert_close(torch.linalg.vector_norm(found.left, dim=0).square(), found.values)


@pytest.mark.parametrize(("rows", "columns"), [(300, 200), (200, 300)])
def test_a_sketch_is_nearly_as_good_as_the_best(rows: int, columns: int) -> None:
    values = matrix(rows, columns)
    found = sketched(Dense(torch.from_numpy(values).float()), 8, 0, "module")
    error = np.linalg.norm(values - (found.left[:, :8] @ found.right[:8]).numpy())
    assert error <= 1.01 * np.linalg.norm(values - best(values, 8))
    np.testing.assert_allclose(found.values[:6], np.linalg.svd(values, compute_uv=False)[:6], rtol=1e-5)


def test_a_sketch_of_rows_in_blocks_is_of_all_of_them() -> None:
    class Blocks(Dense):
        def blocks(self) -> Iterator[tuple[range, torch.Tensor]]:
            for first in range(0, len(self.values), 7):
                yield range(first, min(first + 7, len(self.values))), self.values[first : first + 7]

    values = torch.from_numpy(matrix(90, 80)).float()
    once, again = (sketched(kind(values), 4, 0, "module") for kind in (Dense, Blocks))
    torch.testing.assert_close(
        once.left[:, :4] @ once.right[:4], again.left[:, :4] @ again.right[:4], atol=1e-5, rtol=0
    )


def test_a_sketch_depends_on_the_seed_and_the_name_alone() -> None:
    dense = Dense(torch.from_numpy(matrix(90, 80, noise=0.1)).float())
    once, again = (sketched(dense, 4, 3, "a") for _ in range(2))
    assert torch.equal(once.left, again.left)
    assert not torch.equal(once.left, sketched(dense, 4, 3, "b").left)
    assert not torch.equal(once.left, sketched(dense, 4, 4, "a").left)


def test_auto_sketches_what_is_large_only() -> None:
    small, large = (Dense(torch.from_numpy(matrix(size, size)).float()) for size in (40, 600))
    assert len(spectrum_of(small, 4, "auto", 0, "m").values) == 40
    assert len(spectrum_of(large, 4, "auto", 0, "m").values) < 600
    assert len(spectrum_of(large, 200, "auto", 0, "m").values) == 600
    assert len(spectrum_of(small, 4, "randomised", 0, "m").values) < 40


def test_the_spectrum_of_a_product_needs_no_product() -> None:
    left, right = random(1, 50, 7), random(2, 7, 30)
    found = of_product(torch.from_numpy(left), torch.from_numpy(right))
    np.testing.assert_allclose(found.values, np.linalg.svd(left @ right, compute_uv=False)[:7], rtol=1e-12)
    np.testing.assert_allclose(found.left[:, :3] @ found.right[:3], best(left @ right, 3), atol=1e-10)


def test_the_signs_that_lapack_happens_to_choose_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, left, right = (torch.from_numpy(random(seed, 8, 8)) for seed in range(3))
    before = exact(dense), of_product(left, right)
    eigh, svd = torch.linalg.eigh, torch.linalg.svd

    def other_svd(core: torch.Tensor, full_matrices: bool) -> tuple[torch.Tensor, ...]:
        one, values, two = svd(core, full_matrices=full_matrices)
        return -one, values, -two

    monkeypatch.setattr(torch.linalg, "eigh", lambda core: (eigh(core)[0], -eigh(core)[1]))
    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    for one, two in zip(before, (exact(dense), of_product(left, right)), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


def test_a_product_of_more_ranks_than_the_matrix_has() -> None:
    left, right = random(1, 4, 9), random(2, 9, 30)
    found = of_product(torch.from_numpy(left), torch.from_numpy(right))
    assert len(found.values) == 4
    np.testing.assert_allclose(found.left @ found.right, left @ right, atol=1e-12)


def test_the_residual_is_measured_on_the_stored_factors() -> None:
    values = matrix(33, 21)
    found = exact(torch.from_numpy(values))
    left, right = (stored(half, torch.float16, "m") for half in (found.left[:, :4], found.right[:4]))
    measured = np.linalg.norm(values - left.double().numpy() @ right.double().numpy())
    assert residual(Dense(torch.from_numpy(values)), left, right) ** 0.5 == pytest.approx(measured, rel=1e-12)


@pytest.mark.parametrize("value", [65520.0, np.inf, np.nan])
def test_factors_that_the_dtype_cannot_hold_are_refused(value: float) -> None:
    values = torch.tensor([1.0, value], dtype=torch.float64)
    with pytest.raises(NonFinite, match="too large for float16; use --dtype fp32 or bf16"):
        stored(values, torch.float16, "m")
    assert stored(torch.tensor([65519.0]), torch.float16, "m").tolist() == [65504.0]


def test_a_product_comes_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bake.factoring.factors._BLOCK_ELEMENTS", 50)
    left, right = torch.from_numpy(random(1, 23, 3)), torch.from_numpy(random(2, 3, 11))
    product = Product(left, right)
    rows = [rows for rows, _ in product.blocks()]
    assert len(rows) == 6
    assert [number for each in rows for number in each] == list(range(23))
    assert squares(product) == pytest.approx(float((left @ right).square().sum()))
    assert residual(product, left, right) < 1e-20


def test_clamping_cuts_at_the_quantile_of_magnitudes() -> None:
    left, right = torch.from_numpy(random(1, 40, 5)), torch.from_numpy(random(2, 5, 60))
    entries = np.abs(np.concatenate([left.numpy().ravel(), right.numpy().ravel()]))
    limit = np.sort(entries)[round(0.9 * len(entries)) - 1]
    for before, after in zip((left, right), clamped(left, right, 0.9), strict=True):
        np.testing.assert_array_equal(after.numpy(), np.clip(before.numpy(), -limit, limit))
    assert all(torch.equal(*pair) for pair in zip((left, right), clamped(left, right, 1.0), strict=True))
