"""The public names: sorted, importable, documented."""

from __future__ import annotations

import inspect

import pytest

import bake
from bake import errors


def test_public_names_are_sorted_and_complete() -> None:
    assert bake.__all__ == sorted(bake.__all__)
    assert set(bake.__all__) == set(bake._HOMES)


@pytest.mark.parametrize("name", bake.__all__)
def test_a_public_name_resolves_and_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(bake, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = bake.no_such_thing


def error_classes() -> list[type[errors.BakeError]]:
    found = [errors.BakeError]
    for kind in found:
        found += kind.__subclasses__()
    return found


def test_the_docstring_of_errors_draws_the_whole_tree() -> None:
    drawing = errors.__doc__ or ""
    for kind in error_classes():
        assert kind.__name__ in drawing


def test_every_error_has_a_code_of_its_own_and_a_documented_exit_code() -> None:
    kinds = error_classes()
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert {kind.exit_code for kind in kinds} == {1, 2, 3, 4, 5, 6, 7, 8, 9, 130}


def test_an_error_carries_message_and_details() -> None:
    error = errors.HeaderError("broken", tensor="a.weight")
    assert str(error) == error.message == "broken"
    assert error.details == {"tensor": "a.weight"}
