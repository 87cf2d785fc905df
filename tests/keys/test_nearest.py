"""Suggestions for names that the base does not have."""

from __future__ import annotations

from names import small

from bake.keys.nearest import nearest_names

NAMES = sorted(small("sdxl"))


def test_a_misspelling_finds_its_name_first() -> None:
    for name in NAMES[::40]:
        assert nearest_names(name.replace("to_q", "toq") + "s", NAMES, 3)[0] == name


def test_another_block_of_the_same_kind_is_near() -> None:
    wanted = "model.diffusion_model.input_blocks.17.1.proj_in.weight"
    assert all(name.endswith(".1.proj_in.weight") for name in nearest_names(wanted, NAMES, 3))


def test_strangers_are_no_suggestion() -> None:
    assert nearest_names("xyzzy", NAMES, 3) == []


def test_the_order_of_the_known_names_does_not_matter() -> None:
    wanted = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_qq"
    assert nearest_names(wanted, NAMES, 3) == nearest_names(wanted, NAMES[::-1], 3)
