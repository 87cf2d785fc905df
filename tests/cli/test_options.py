"""Parsing of -l and its kin."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import sd1_pair
from support import bake

from bake.cli.options import KeyValue, Size, Weighted
from bake.errors import Unsupported
from bake.plan.recipe import AdapterChoice
from bake.plan.selection import Gradient, NameRule, Rule, Selection, Words

RULE = Rule(Words(("IN05-OUT05", "BASE"), True), Words(("attn",)), 0.5)


def parse(text: str) -> AdapterChoice:
    return Weighted().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("style.safetensors", AdapterChoice(Path("style.safetensors"))),
        ("style.safetensors:0.8", AdapterChoice(Path("style.safetensors"), 0.8)),
        ("style.safetensors:-0.5", AdapterChoice(Path("style.safetensors"), -0.5)),
        ("style.safetensors:0", AdapterChoice(Path("style.safetensors"), 0.0)),
        ("style.safetensors:1e-3", AdapterChoice(Path("style.safetensors"), 0.001)),
        ("style.safetensors:0.8:te=0.5", AdapterChoice(Path("style.safetensors"), 0.8, te=0.5)),
        ("style.safetensors:te=0.5:0.8", AdapterChoice(Path("style.safetensors"), 0.8, te=0.5)),
        ("style.safetensors:te=0.5:unet=-1", AdapterChoice(Path("style.safetensors"), te=0.5, unet=-1.0)),
        ("style.safetensors:dyn=4", AdapterChoice(Path("style.safetensors"), rank_limit=4)),
        (r"C:\loras\style.safetensors:0.8", AdapterChoice(Path(r"C:\loras\style.safetensors"), 0.8)),
        ("C:/loras/style.safetensors", AdapterChoice(Path("C:/loras/style.safetensors"))),
        ("dir:with:colons/a.safetensors:2", AdapterChoice(Path("dir:with:colons/a.safetensors"), 2.0)),
        ("folder", AdapterChoice(Path("folder"))),
    ],
)
def test_an_adapter_with_its_weights(text: str, choice: AdapterChoice) -> None:
    assert parse(text) == choice


def test_a_file_of_that_very_name_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "style:0.8"
    path.touch()
    assert parse(str(path)) == AdapterChoice(path)
    assert parse(f"{path}:0.5") == AdapterChoice(path, 0.5)


@pytest.mark.parametrize("text", ["a:1:2", "a:te=x", "a:te=1:te=2", "a:inf", "a:nan", "a:dyn=1.5", "a:dyn=0", "a:=3"])
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "selection"),
    [
        ("a:lbw=MIDD", Selection.parse("MIDD")),
        ("a:lbw=SMOOTHSTEP*2", Selection.parse("2SMOOTHSTEP")),
        ("a:lbw=1,0,-0.5", Selection(values=(1.0, 0.0, -0.5))),
        ("a:blocks=mecha:lbw=ALL_B", Selection.parse("ALL_B", scheme="mecha")),
        ("a:names=*attn2*=0.5,*.bias=0", Selection(names=(NameRule("*attn2*", 0.5), NameRule("*.bias", 0.0)))),
        ("a:gradient=0,0.5,1", Selection(gradients=(Gradient((0.0, 0.5, 1.0)),))),
        ("a:gradient=mlp=1,0;*=0.5", Selection(gradients=(Gradient((1.0, 0.0), "mlp"), Gradient((0.5,))))),
        ("a:lbwe=NOT IN05-OUT05 BASE:attn:0.5", Selection(rules=(RULE,))),
        ("a:lbw=ALL:lbwe=IN05-OUT05:attn:0,::1", Selection.parse("ALL", "IN05-OUT05:attn:0\n::1")),
    ],
)
def test_block_weights(text: str, selection: Selection) -> None:
    assert parse(text) == AdapterChoice(Path("a"), selection=selection)
    before, _, after = text.partition(":")
    assert parse(f"{before}:0.8:te=0.5:{after}") == AdapterChoice(Path("a"), 0.8, te=0.5, selection=selection)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a:lbw=MIDDLE", "'MIDDLE' is no preset"),
        ("a:lbw=1,2,x", "'x' is not a number"),
        ("a:lbw=1,inf", "finite"),
        ("a:lbw=", "nothing after lbw="),
        ("a:lbw=ALL:lbw=ALL", "given twice"),
        ("a:blocks=kohya", "there is no lbw="),
        ("a:lbw=ALL:blocks=sm", "no reading of block lists; known are bake, supermerger, mecha, webui, kohya"),
        ("a:names=attn", "is not PATTERN=RATIO"),
        ("a:names=attn=x", "'x' is not a number"),
        ("a:gradient=mlp", "'mlp' is not a number"),
        ("a:lbwe=", "nothing after lbwe="),
        ("a:lbwe=IN05:0", "is not BLOCKS:ELEMENTS:RATIO"),
        ("a:lbwe=NOT:attn:0", "NOT is followed by"),
        ("a:lbwe=IN05:attn:nan", "finite"),
    ],
)
def test_block_weights_that_mean_nothing_are_refused(text: str, says: str) -> None:
    with pytest.raises(click.UsageError, match=says):
        parse(text)


@pytest.mark.parametrize("text", ["a:lbw=R,0", "a:lbwe=IN05::X", "a:start=3", "a:step=1-5"])
def test_what_only_sampling_can_do_is_unsupported(text: str) -> None:
    with pytest.raises(Unsupported):
        parse(text)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_weight_is_kept(weight: float) -> None:
    assert parse(f"a.safetensors:{weight!r}").weight == weight


def test_sizes_and_pairs() -> None:
    assert Size().convert("2G", None, None) == 2**31
    assert KeyValue().convert("a=b=c", None, None) == ("a", "b=c")
    for kind, text in ((Size(), "much"), (KeyValue(), "a"), (KeyValue(), "=b")):
        with pytest.raises(click.UsageError):
            kind.convert(text, None, None)


class TestDtypes:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ([], "keep"),
            (["--dtype", "bf16"], "bf16"),
            (["--dtype", "all=bf16"], "bf16"),
            (["--dtype", "fp32", "--dtype", "vae=bf16"], {"all": "fp32", "vae": "bf16"}),
            (["--dtype", "te=bf16"], {"te": "bf16"}),
        ],
    )
    def test_a_dtype_is_for_all_or_for_one_component(self, tmp_path: Path, words: list[str], expected) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        found = bake("plan", base, "-l", lora, *words, "--json", "-v").json
        assert found["plan"]["settings"]["dtype"] == expected

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--dtype", "fp12"], "'fp12' is not one of keep, fp32"),
            (["--dtype", "vae=fp12"], "'fp12' is not one of keep, fp32"),
            (["--dtype", "nose=fp16"], "it has unet, te1, vae"),
            (["--dtype", "fp16", "--dtype", "bf16"], "given twice"),
        ],
    )
    def test_others_are_usage_errors(self, tmp_path: Path, words: list[str], message: str) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        done = bake("plan", base, "-l", lora, *words)
        assert done.code == 2
        assert message in done.err
