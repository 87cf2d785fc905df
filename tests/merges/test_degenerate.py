"""Where a formula divides by nothing or has no direction, the result is defined all the same."""

from __future__ import annotations

import numpy as np
import pytest
from merging import merge, models_for

A = np.array([[1.0, 2.0, 2.0], [0.0, -1.0, 0.5]])
ZERO = np.zeros_like(A)


@pytest.mark.parametrize("given", [{"alpha": 0.25}, {"alpha": 0.25, "norms": "interpolate"}], ids=str)
def test_slerp_goes_straight_where_there_is_no_arc(given: dict) -> None:
    for other in (2 * A, -A, ZERO):
        assert merge("slerp", [A, other], given) == pytest.approx(0.75 * A + 0.25 * other, rel=1e-15)
    assert merge("slerp", [ZERO, A], given) == pytest.approx(0.25 * A, rel=1e-15)


def test_slerp_on_a_right_angle() -> None:
    one, other = np.array([2.0, 0.0]), np.array([0.0, 4.0])
    assert merge("slerp", [one, other], {"alpha": 0.5}) == pytest.approx(np.array([2, 4]) / 2**0.5)
    assert merge("slerp", [one, other], {"alpha": 0.5, "norms": "interpolate"}) == pytest.approx([3 / 2**0.5] * 2)


@pytest.mark.parametrize("along", ["tensor", "row", "column"])
def test_nuslerp_of_rows_and_columns_of_zeros(along: str) -> None:
    one, other = A.copy(), A[::-1].copy()
    one[0], other[:, 1] = 0, 0
    assert np.isfinite(merge("nuslerp", [one, other], {"along": along})).all()
    assert merge("nuslerp", [ZERO, A], {"along": along}) == pytest.approx(A / 2)


def test_multislerp_of_directions_that_cancel_out() -> None:
    assert merge("multislerp", [A, -2 * A], {}) == pytest.approx(-A / 2)
    assert merge("multislerp", [ZERO, ZERO, ZERO], {}) == pytest.approx(ZERO)
    three = [np.array([1.0, 0.0]), np.array([-0.5, 0.75**0.5]), np.array([-0.5, -(0.75**0.5)])]
    with pytest.raises(ValueError, match="cancel out"):
        merge("multislerp", three, {})


def test_karcher_without_directions() -> None:
    assert merge("karcher", [ZERO, ZERO], {}) == pytest.approx(ZERO)
    assert merge("karcher", [A, ZERO], {}) == pytest.approx(A / 2)  # the direction of A, the mean of the lengths
    opposite = merge("karcher", [A, -A], {})
    assert np.isfinite(opposite).all()
    assert np.linalg.norm(opposite) == pytest.approx(np.linalg.norm(A))
    right_angle = merge("karcher", [np.array([1.0, 0.0]), np.array([0.0, 1.0])], {})
    assert right_angle == pytest.approx([0.5**0.5] * 2)


def test_geometric_median_is_where_most_models_are() -> None:
    result = merge("geometric_median", [A, A, A, 100 + A], {})
    assert result == pytest.approx(A, abs=1e-5)
    assert merge("geometric_median", [A, A], {}) == pytest.approx(A)


def test_add_perpendicular_where_one_model_learned_nothing() -> None:
    a, b, c = models_for(3, (4, 5))
    assert merge("add_perpendicular", [c, b, c], {}) == pytest.approx(b)  # all of it is new
    assert merge("add_perpendicular", [a, c, c], {}) == pytest.approx(a)
    assert merge("add_perpendicular", [a, a, c], {}) == pytest.approx(a)  # A knows it all


def test_train_difference_where_it_divides_by_nothing() -> None:
    a, b, _ = models_for(3, (4, 5))
    for mask in ("train", "opposite", "strict_opposite"):
        assert merge("train_difference", [a, b, b], {"mask": mask}) == pytest.approx(a)
        assert merge("train_difference", [a, a, a], {"mask": mask}) == pytest.approx(a)


def test_similarity_of_zeros_counts_as_likeness() -> None:
    _, _, c = models_for(3, (2, 3))
    assert merge("similarity_add_difference", [ZERO, ZERO, c], {"alpha": 1, "beta": 1}) == pytest.approx(ZERO)
    assert merge("similarity_add_difference", [ZERO, ZERO, c], {"alpha": 1, "beta": 0}) == pytest.approx(-c)
    tiny = np.full_like(ZERO, 1e-200)
    assert np.isfinite(merge("similarity_add_difference", [tiny, tiny, c], {})).all()


def test_euclidean_difference_without_one_or_both() -> None:
    a, b, c = models_for(3, (2, 3))
    assert merge("euclidean_add_difference", [c, c, c], {}) == pytest.approx(c)
    assert merge("euclidean_add_difference", [a, c, c], {"alpha": 0.5}) == pytest.approx((a + c) / 2)
    assert merge("euclidean_add_difference", [c, b, c], {"alpha": 0.5}) == pytest.approx((b + c) / 2)


def test_multiply_quotient_of_zeros_is_a() -> None:
    a, b, c = (np.array([row], float) for row in ([0, 1, 1, 2, -1], [1, 0, 1, 0, 2], [1, 1, 0, 0, 1]))
    assert merge("multiply_quotient", [a, b, c], {}) == pytest.approx(a)


def test_powers_of_zeros_and_negative_numbers() -> None:
    a, b = np.array([0.0, 0.0, -1.0, -4.0, 4.0]), np.array([0.0, 2.0, 0.0, -9.0, -9.0])
    assert merge("geometric_sum", [a, b], {"alpha": 0.5}) == pytest.approx([0, 0, 0, -6, 0], abs=1e-15)


def test_model_stock_of_differences_that_cancel_out_is_the_base() -> None:
    base = models_for(1, (3, 2))[0]
    three = [np.array([1.0, 0.0]), np.array([-0.5, 0.75**0.5]), np.array([-0.5, -(0.75**0.5)])]
    for filter_wise in (False, True):
        given = {"filter_wise": filter_wise}
        assert merge("model_stock", [base, base + 1, base - 1], given) == pytest.approx(base)
        assert merge("model_stock", [base] * 3, given) == pytest.approx(base)
        assert merge("model_stock", [np.zeros(2), *three], given) == pytest.approx(np.zeros(2), abs=1e-12)
        far = [base, base + 1, base + 1]
        assert merge("model_stock", far, given) == pytest.approx(base + 1)
        assert merge("model_stock", [base, base + 1e-7, base + 1e-7], given) == pytest.approx(base + 1e-7, rel=1e-12)


def test_sce_of_nothing_and_of_tiny_differences() -> None:
    base = models_for(1, (3, 2))[0]
    assert merge("sce", [base, base, base], {}) == pytest.approx(base)
    assert merge("sce", [base, base, base], {"select_topk": 0.5}) == pytest.approx(base)
    # The weights of mergekit would be equal here, as the squares add up to less than 1e-6.
    result = merge("sce", [np.zeros((1, 2)), np.array([[1e-4, 0]]), np.array([[3e-4, 0]])], {})
    assert result == pytest.approx(np.array([[2.8e-4, 0]]))


def test_cosines_of_zeros_and_of_equal_columns() -> None:
    for name in ("cosine_a", "cosine_b", "add_cosine_a", "add_cosine_b"):
        assert merge(name, [ZERO, A], {"alpha": 0}) == pytest.approx(A if name.startswith("add") else ZERO)
        assert merge(name, [A, A], {"alpha": 0}) == pytest.approx(A)


def test_tensor_sum_of_one_row_and_of_regions_that_round_to_nothing() -> None:
    a, b = models_for(2, (1, 6))
    assert np.array_equal(merge("tensor_sum", [a, b], {"width": 0.4}), a)
    assert np.array_equal(merge("tensor_sum", [a, b], {"width": 0.6}), b)


def test_rotate_of_what_is_no_matrix_equal_or_a_pure_rotation() -> None:
    vectors = models_for(2, (6,))
    assert merge("rotate", vectors, {"alpha": 0.3}) == pytest.approx(0.7 * vectors[0] + 0.3 * vectors[1])
    (a,) = models_for(1, (9, 4))
    assert np.array_equal(merge("rotate", [a, a], {}), a)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    turn[:, 0] *= np.sign(np.linalg.det(turn))
    for wide in (False, True):
        one = np.pad(a, ((0, 0), (0, 30))) if wide else a
        other = np.pad(a @ turn, ((0, 0), (0, 30))) if wide else a @ turn
        assert merge("rotate", [one, other], {}) == pytest.approx(other, abs=1e-13)
        halfway = merge("rotate", [one, other], {"alignment": 0.5})
        assert merge("rotate", [halfway, other], {"alignment": 1.0}) == pytest.approx(other, abs=1e-13)
        centred = [np.linalg.norm(x - x.mean(0)) for x in (one, halfway, other)]
        assert centred == pytest.approx([centred[0]] * 3)
        # The same distance on both sides of the middle.
        before, after = np.linalg.norm(halfway - one), np.linalg.norm(other - halfway)
        assert before == pytest.approx(after, rel=1e-9)


def test_rotate_goes_no_part_of_the_way_to_a_mirror_image() -> None:
    """Nothing lies between: part of the way leads to the nearest rotation, all of it to the mirror image."""
    (a,) = models_for(1, (12, 4))
    a = a - a.mean(0)
    mirrored = a * [1, 1, 1, -1]
    assert merge("rotate", [a, mirrored], {}) == pytest.approx(mirrored, abs=1e-13)
    halfway = merge("rotate", [a, mirrored], {"alignment": 0.5})
    turn = np.linalg.lstsq(a, halfway, rcond=None)[0]
    assert turn @ turn.T == pytest.approx(np.eye(4), abs=1e-10)
    assert np.linalg.det(turn) == pytest.approx(1)


def test_rotate_of_wide_matrices_is_nearest() -> None:
    """Against any orthogonal matrix of all columns; sd-mecha's wide form leaves parts of A beside B."""
    a, b = models_for(2, (5, 40), apart=1.0)
    result = merge("rotate", [a, b], {"centralization": 0.0})
    u, _, vt = np.linalg.svd(a.T @ b)
    assert np.linalg.norm(result - b) == pytest.approx(np.linalg.norm(a @ (u @ vt) - b), rel=1e-10)
    assert np.linalg.norm(result) == pytest.approx(np.linalg.norm(a), rel=1e-10)


def test_smooth_add_of_tensors_smaller_than_the_filter() -> None:
    for shape in ((1, 1), (2, 1), (1, 3), (1,), (2, 2, 1, 1)):
        a, b, c = models_for(3, shape)
        assert np.isfinite(merge("smooth_add", [a, b, c], {})).all()
    constant = merge("smooth_add", [ZERO, np.full_like(A, 0.3), ZERO], {})
    assert constant == pytest.approx(np.full_like(A, 0.3))


def test_arcee_fusion_of_equal_rows_takes_the_other_model_where_nothing_tells_them_apart() -> None:
    base = models_for(1, (4, 5))[0]
    assert merge("arcee_fusion", [base, base], {}) == pytest.approx(base)


def test_dropping_everything_leaves_the_base() -> None:
    base, model = models_for(2, (1, 2))
    given = {"density": 1e-9, "rescale": "l1"}
    assert np.array_equal(merge("dare_linear", [base, model], given), base)
