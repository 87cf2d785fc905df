"""Which tensor a transform fits, and which axis a DoRA magnitude belongs to, told from shapes."""

from __future__ import annotations

import pytest

from bake.keys import shapes_transforms as rules


@pytest.mark.parametrize(
    ("rule", "shapes", "fit"),
    [
        (rules.oft_shape, {"oft_blocks": (4, 80, 80)}, (320, None)),
        (rules.oft_shape, {"oft_blocks": (4, 80, 80), "rescale": (320, 1, 1, 1)}, (320, None)),
        (rules.oft_shape, {"oft_blocks": (4, 1, 1), "rescale": (4, 1)}, (4, None)),
        (rules.oft_diag_shape, {"oft_diag": (4, 80, 80)}, (320, None)),
        (rules.boft_shape, {"oft_blocks": (7, 64, 10, 10)}, (640, None)),
        (rules.boft_shape, {"oft_blocks": (3, 4, 4, 4), "rescale": (16, 1)}, (16, None)),
        (rules.oft_peft_shape, {"oft_r": (10, 496)}, (None, 320)),
        (rules.oft_peft_shape, {"oft_r": (1, 496)}, (None, None)),
        (rules.oft_peft_shape, {"oft_r": (8, 0)}, (None, 8)),
        (rules.oft_peft_shape, {"oft_r": (2, 1), "scaled_oft": ()}, (None, 4)),
        (rules.boft_peft_shape, {"boft_r": (1, 80, 4, 4), "boft_s": (640, 1)}, (640, 320)),
        (rules.boft_peft_shape, {"boft_r": (1, 5, 3, 3), "boft_s": (1, 7)}, (7, 15)),
        (rules.boft_peft_shape, {"boft_r": (3, 4, 4, 4), "boft_s": (1, 1)}, (1, 16)),
        (rules.hra_shape, {"hra_u": (320, 8)}, (None, 320)),
    ],
)
def test_what_the_factors_fit(rule, shapes, fit) -> None:
    assert rule(shapes) == fit


@pytest.mark.parametrize(
    ("rule", "shapes"),
    [
        (rules.oft_shape, {"oft_blocks": (4, 80, 81)}),
        (rules.oft_shape, {"oft_blocks": (2, 4, 80, 80)}),
        (rules.oft_shape, {"oft_blocks": (0, 80, 80)}),
        (rules.oft_shape, {"oft_blocks": (4, 80, 80), "rescale": (319, 1)}),
        (rules.oft_shape, {"oft_blocks": (4, 80, 80), "rescale": (32, 10)}),
        (rules.oft_diag_shape, {"oft_diag": (80, 80)}),
        (rules.boft_shape, {"oft_blocks": (4, 80, 80)}),
        (rules.boft_shape, {"oft_blocks": (8, 64, 10, 10)}),
        (rules.boft_shape, {"oft_blocks": (2, 64, 9, 9)}),
        (rules.boft_shape, {"oft_blocks": (3, 4, 4, 4), "rescale": (1, 4)}),
        (rules.oft_peft_shape, {"oft_r": (10, 497)}),
        (rules.oft_peft_shape, {"oft_r": (10, 32, 32)}),
        (rules.oft_peft_shape, {"oft_r": (0, 496)}),
        (rules.boft_peft_shape, {"boft_r": (2, 5, 4, 4), "boft_s": (7, 1)}),
        (rules.boft_peft_shape, {"boft_r": (2, 4, 3, 3), "boft_s": (7, 1)}),
        (rules.boft_peft_shape, {"boft_r": (1, 4, 4, 4), "boft_s": (7, 2)}),
        (rules.hra_shape, {"hra_u": (320,)}),
    ],
)
def test_factors_that_contradict_each_other(rule, shapes) -> None:
    with pytest.raises(ValueError, match=next(iter(shapes)).split("_")[0] + "|rescale|stages"):
        rule(shapes)


@pytest.mark.parametrize(
    ("magnitude", "weight", "axis", "certain"),
    [
        ((6, 1), (6, 5), 0, True),
        ((6,), (6, 5), 0, True),
        ((6, 1, 1, 1), (6, 5, 3, 3), 0, True),
        ((6, 1, 1, 1), (6, 5), 0, True),  # trained on a 1x1 convolution, stored as a matrix
        ((6, 1), (6, 6), 0, True),
        ((1, 5), (6, 5), 1, True),
        ((1, 6), (6, 6), 1, True),
        ((1, 5, 1, 1), (6, 5, 3, 3), 1, True),
        ((1, 6, 1, 1), (6, 6, 3, 3), 1, False),  # PEFT's output axis under LyCORIS's name looks the same
        ((1, 6, 1, 1), (6, 5, 3, 3), 0, True),  # here it can only be that
        ((1, 1), (1, 5), 0, True),
        ((1, 1), (6, 1), 1, True),
    ],
)
@pytest.mark.parametrize("suffix", ["dora_scale", "magnitude"])
def test_the_shape_tells_the_axis_of_a_lycoris_magnitude(suffix, magnitude, weight, axis, certain) -> None:
    assert rules.magnitude_axis(suffix, magnitude, weight) == (axis, certain)


@pytest.mark.parametrize(
    ("magnitude", "weight", "transposed", "axis", "certain"),
    [
        ((6,), (6, 5), False, 0, True),
        ((6,), (6, 6), False, 0, True),
        ((6, 1), (6, 6), False, 0, True),
        ((1, 6, 1, 1), (6, 6, 3, 3), False, 0, True),
        ((5,), (6, 5), True, 1, True),
        ((6,), (6, 6), True, 1, True),
        ((1, 6), (6, 6), False, 0, False),
    ],
)
@pytest.mark.parametrize("suffix", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_a_peft_magnitude_is_of_the_output_axis(suffix, magnitude, weight, transposed, axis, certain) -> None:
    assert rules.magnitude_axis(suffix, magnitude, weight, transposed=transposed) == (axis, certain)


@pytest.mark.parametrize(
    ("suffix", "magnitude", "weight"),
    [
        ("dora_scale", (5,), (6, 5)),
        ("dora_scale", (5, 1), (6, 5)),
        ("dora_scale", (1, 6), (6, 5)),
        ("dora_scale", (6, 5), (6, 5)),
        ("dora_scale", (), (6, 5)),
        ("dora_scale", (1, 1, 6), (6, 6)),
        ("dora_scale", (6, 1), (6,)),
        ("lora_magnitude_vector", (5,), (6, 5)),
        ("lora_magnitude_vector", (1, 5), (6, 5)),
        ("lora_magnitude_vector", (2, 3), (6, 5)),
    ],
)
def test_a_magnitude_that_fits_nothing(suffix, magnitude, weight) -> None:
    with pytest.raises(ValueError, match="the magnitude"):
        rules.magnitude_axis(suffix, magnitude, weight)
