"""bake merge: parameters as they are typed, what it says, exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from models import llama, random_arrays
from support import bake, save

from bake.cli.parameters import ParameterSetting, joined
from bake.errors import UsageError
from bake.merges import METHODS
from bake.plan.selection import Selection


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    arrays = random_arrays(llama())
    return [
        save(tmp_path / f"m{n}.safetensors", {name: array * (1 + n) for name, array in arrays.items()})
        for n in range(3)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha=0.3", ("alpha", None, 0.3)),
        ("alpha=-1e-2", ("alpha", None, -0.01)),
        ("weight=0.5,0.3", ("weight", None, [0.5, 0.3])),
        ("weight@2=0.3", ("weight", 2, 0.3)),
        ("normalize=false", ("normalize", None, False)),
        ("vote=count", ("vote", None, "count")),
        ("alpha=0.5:te=0.3:vae=0", ("alpha", None, Selection(number=0.5, components=(("te", 0.3), ("vae", 0.0))))),
        ("alpha:lbw=GRAD_V:blocks=mecha", ("alpha", None, Selection.parse("GRAD_V", scheme="mecha"))),
        ("alpha:gradient=0,1", ("alpha", None, Selection.parse(gradient="0,1"))),
        ("weight@1=1:names=*attn*=0.5", ("weight", 1, Selection(1.0, names=Selection.parse(names="*attn*=0.5").names))),
        ("alpha:lbwe=IN04:attn:0.5,M00::1", ("alpha", None, Selection.parse(rules="IN04:attn:0.5,M00::1"))),
    ],
)
def test_a_parameter_is_read_as_it_is_meant(text: str, expected: tuple[str, int | None, Any]) -> None:
    assert ParameterSetting().convert(text, None, None) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("alpha", "=1", "alpha@x=1", "vote=count:te=1", "alpha=1,2:te=1", "alpha=1:te", "alpha=1:te=1:te=2"),
        *("alpha:te=much", "alpha:blocks=mecha", "alpha:lbw=NO_SUCH_PRESET"),
    ],
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises((click.BadParameter, UsageError)):
        ParameterSetting().convert(text, None, None)


def test_numbers_for_single_models_go_beside_those_for_all() -> None:
    settings: list[Any] = [("weight", None, 0.5), ("weight", 2, 0.25), ("density", 1, 0.3), ("density", 2, 0.6)]
    assert joined("ties", settings, 2) == {"weight": [0.5, 0.25], "density": [0.3, 0.6]}
    assert joined("linear", [("weight", 3, 2.0)], 3) == {"weight": [1.0, 1.0, 2.0]}  # the default is 1


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("linear", [("weight", None, 1.0), ("weight", None, 2.0)], "given twice"),
        ("linear", [("weight", 1, 1.0), ("weight", 1, 2.0)], "given twice"),
        ("linear", [("weight", 3, 1.0)], "there are 2 models"),
        ("linear", [("weight", None, [1.0, 2.0, 3.0]), ("weight", 1, 1.0)], "3 numbers for 2 models"),
        ("weighted_sum", [("alpha", 1, 1.0)], "the same for all models"),
        ("ties", [("density", 1, 0.5)], "density@2 is missing"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(method: str, settings: list[Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        joined(method, settings, 2)


def test_a_merge_says_what_it_did(models: list[Path], tmp_path: Path) -> None:
    done = bake("merge", "weighted_sum", *models[:2], "-p", "alpha=0.25", "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert lines["method"] == "weighted_sum: so much of A, the rest of B"
    assert lines["a"].startswith("m0.safetensors")
    assert lines["alpha"] == "0.25"
    assert lines["merged"] == "model 19/19"
    assert "19 tensors merged, 0 copied unchanged" in lines["wrote"]
    assert "(100 %)" in lines["verified"]


def test_the_document_names_method_models_and_parameters(models: list[Path], tmp_path: Path) -> None:
    words = ("merge", "ties", "--base", models[0], *models[1:], "-p", "density=0.5", "-p", "weight@2=0.5:model=0.25")
    planned = bake(*words, "--dry-run", "--json", "-v").json
    done = bake(*words, "-o", tmp_path / "out.safetensors", "--json").json
    for document in (planned, done):
        assert document["merge"]["method"] == "ties"
        assert [model["role"] for model in document["merge"]["models"]] == ["base", "model", "model"]
        assert document["merge"]["parameters"]["density"] == 0.5
        assert {"number": 0.5, "components": {"model": 0.25}} in document["merge"]["parameters"]["weight"]
        assert document["tensors"] == {"fused": 0, "merged": 19, "grown": 0, "converted": 0, "copied": 0}
        assert document["bytes"]["read"] == 3 * sum(a.nbytes for a in random_arrays(llama()).values())
    assert planned["plan"]["merge"]["method"] == "ties"
    assert done["verification"]["ok"]


def test_a_dry_run_writes_nothing(models: list[Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = bake("merge", "weighted_sum", *models[:2], "-o", tmp_path / "out.safetensors", "--dry-run")
    assert done.code == 0, done.err
    assert sorted(tmp_path.iterdir()) == before


def test_every_method_is_listed() -> None:
    listed = bake("merge", "--list").out.splitlines()
    assert [line.split()[0] for line in listed] == list(METHODS)
    assert [method["name"] for method in bake("merge", "--list", "--json").json["methods"]] == list(METHODS)
    shown = bake("merge", "ties", "--list").out
    assert "density" in shown
    assert "has to be given" in shown


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["weighted_sum"], 2),
        (["weighted_sum", "m0.safetensors", "m1.safetensors"], 2),  # no output
        (["no_such", "m0.safetensors", "m1.safetensors", "-o", "out.safetensors"], 2),
        (["no_such", "--list"], 2),
        (["weighted_sum", "m0.safetensors", "m1.safetensors", "-p", "alpha", "-o", "out.safetensors"], 2),
        (["weighted_sum", "m0.safetensors", "nowhere.safetensors", "-o", "out.safetensors"], 3),
        (["weighted_sum", "m0.safetensors", "m1.safetensors", "-o", "m1.safetensors", "--overwrite"], 8),
    ],
)
def test_exit_codes(models: list[Path], monkeypatch: pytest.MonkeyPatch, words: list[str], code: int) -> None:
    monkeypatch.chdir(models[0].parent)
    done = bake("merge", *words)
    assert done.code == code
    assert "Traceback" not in done.err
    assert len(done.err) > 20
