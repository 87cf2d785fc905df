"""AUTOMATIC1111's tags, and the files they mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import save

from bake.errors import AdapterNotFound, Unsupported, UsageError
from bake.plan.prompt import LoraFolder, choices_from_prompt, parse_prompt
from bake.plan.recipe import AdapterChoice
from bake.plan.selection import Selection


def tag(text: str):
    (found,) = parse_prompt(text).tags
    return found


@pytest.mark.parametrize(
    ("text", "name", "te", "unet", "limit"),
    [
        ("<lora:style>", "style", 1.0, 1.0, None),
        ("<lora:style:0.8>", "style", 0.8, 0.8, None),
        ("<lora:detail tweaker:-0.5>", "detail tweaker", -0.5, -0.5, None),
        ("<lora:style: 0.5 >", "style", 0.5, 0.5, None),
        ("<lora:style:0.5:1.2>", "style", 0.5, 1.2, None),
        ("<lora:style:0.5:1.2:4>", "style", 0.5, 1.2, 4),
        ("<lora:style:te=0.3>", "style", 0.3, 0.3, None),
        ("<lora:style:0.9:te=0.3>", "style", 0.3, 0.3, None),
        ("<lora:style:unet=0.3>", "style", 1.0, 0.3, None),
        ("<lora:style:0.5:1:te=2:unet=3:dyn=8>", "style", 2.0, 3.0, 8),
        ("<lora:style:2>", "style", 2.0, 2.0, None),
        ("<lyco:style:0.7>", "style", 0.7, 0.7, None),
        ("<lora:a=b=c:0.7>", "a=b=c", 0.7, 0.7, None),
    ],
)
def test_tags_are_read_as_the_web_ui_reads_them(
    text: str, name: str, te: float, unet: float, limit: int | None
) -> None:
    found = tag(text)
    assert (found.name, found.te, found.unet, found.rank_limit) == (name, te, unet, limit)


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("masterpiece, <lora:a:1>, <lora:b:-0.5> 1girl, (red:1.2)", "masterpiece, 1girl, (red:1.2)"),
        ("<lora:a:1>", ""),
        ("<lora:a:1>masterpiece", "masterpiece"),
        ("a cat <lora:a:1> on a mat", "a cat on a mat"),
        ("a,b,,c", "a,b,c"),
        ("no tags at all", "no tags at all"),
    ],
)
def test_the_rest_of_the_prompt_is_given_back(prompt: str, rest: str) -> None:
    assert parse_prompt(prompt).rest == rest


def test_other_tags_stay_in_the_prompt() -> None:
    prompt = parse_prompt("<hypernet:x:1> cat <lora:a>")
    assert prompt.others == ("<hypernet:x:1>",)
    assert prompt.rest == "<hypernet:x:1> cat"


@pytest.mark.parametrize(
    "text", ["<lora:a:strong>", "<lora:a:0.5:b>", "<lora:a:nan>", "<lora:a:inf>", "<lora:a:1:1:x>"]
)
def test_weights_must_be_finite_numbers(text: str) -> None:
    with pytest.raises(UsageError):
        parse_prompt(text)


@pytest.mark.parametrize("text", ["<lora:a:1:1:4:5>", "<lora:a:tee=1>", "<lora:te=1>"])
def test_malformed_tags_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        parse_prompt(text)


@pytest.mark.parametrize(
    "text",
    [
        "<lora:a:1:start=5>",
        "<lora:a:1:stop=5>",
        "<lora:a:1:step=1-5>",
        "<lora:a:1:lbw=R,0,0>",
        "<lora:a:1:lbw=XYZ:x=2>",
    ],
)
def test_what_cannot_be_baked_is_not_ignored(text: str) -> None:
    with pytest.raises(Unsupported):
        parse_prompt(text)


@pytest.mark.parametrize(
    ("text", "te", "unet", "selection"),
    [
        ("<lora:a:0.8:lbw=OUTD>", 0.8, 0.8, Selection.parse("OUTD")),
        ("<lora:a:0.8:w=OUTD>", 0.8, 0.8, Selection.parse("OUTD")),
        ("<lora:a:0.8:0.5:lbw=1,0,0.5,0,0,0,0,0,0,0,0,0>", 0.8, 0.5, Selection.parse("1,0,0.5,0,0,0,0,0,0,0,0,0")),
        ("<lora:a:te=0.3:unet=0.4:lbw=MIDD>", 0.3, 0.4, Selection.parse("MIDD")),
        ("<lora:a:1:lbwe=ATTNDEEPOFF>", 1.0, 1.0, Selection.parse(rules="IN05-OUT05:attn:0")),
        ("<lora:a:1:lbw=ALL:lbwe=ATTNDEEPOFF>", 1.0, 1.0, Selection.parse("ALL", "IN05-OUT05:attn:0")),
        ("<lora:a:1:lbw=ALL:blocks=kohya>", 1.0, 1.0, Selection.parse("ALL", scheme="kohya")),
    ],
)
def test_block_weights_are_read_as_the_extension_reads_them(
    text: str, te: float, unet: float, selection: Selection
) -> None:
    found = tag(text)
    assert (found.te, found.unet, found.selection) == (te, unet, selection)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<lora:a:1:OUTD>", "written lbw=OUTD"),
        ("<lora:a:1:lbw=OUTSIDE>", "'OUTSIDE' is no preset"),
        ("<lora:a:1:lbw=OUTD:w=MIDD>", "the same"),
        ("<lora:a:1:lbwe=NOTHING>", "is not BLOCKS:ELEMENTS:RATIO"),
        ("<lora:a:1:blocks=kohya>", "there is no lbw="),
        ("<lora:a:1:lbw=ALL:blocks=nobody>", "no reading of block lists"),
    ],
)
def test_block_weights_that_mean_nothing_are_usage_errors(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_prompt(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    one = {"x.lora_up.weight": np.ones((2, 2))}
    for relative, alias in {
        "style.safetensors": None,
        "people/Moxin_Shukezouma.safetensors": "moxin",
        "detail tweaker.safetensors": None,
        "people/twin.safetensors": "double",
        "places/twin.safetensors": "double",
        "alias_of_style.safetensors": "style",
        "notes.txt": None,
    }.items():
        save(tmp_path / relative, one, {"ss_output_name": alias} if alias else None)
    (tmp_path / "broken.safetensors").write_text("not a model")
    (tmp_path / "old.pt").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("style", "style.safetensors"),  # the file name wins over the alias of another
        ("Moxin_Shukezouma", "people/Moxin_Shukezouma.safetensors"),
        ("people/Moxin_Shukezouma", "people/Moxin_Shukezouma.safetensors"),
        ("moxin", "people/Moxin_Shukezouma.safetensors"),
        ("detail tweaker", "detail tweaker.safetensors"),
        (" detail tweaker ", "detail tweaker.safetensors"),
        ("STYLE", "style.safetensors"),
        ("old", "old.pt"),
        ("broken", "broken.safetensors"),
        ("places/twin", "places/twin.safetensors"),
    ],
)
def test_names_are_found_by_file_then_alias_then_ignoring_case(folder: Path, name: str, file: str) -> None:
    assert LoraFolder(folder).find(name) == folder / file


@pytest.mark.parametrize("name", ["twin", "double"])
def test_an_ambiguous_name_lists_the_candidates(folder: Path, name: str) -> None:
    with pytest.raises(AdapterNotFound, match="ambiguous") as caught:
        LoraFolder(folder).find(name)
    assert caught.value.exit_code == 2
    assert len(caught.value.details["candidates"]) == 2


def test_a_missing_name_suggests_the_nearest(folder: Path) -> None:
    with pytest.raises(AdapterNotFound, match="Did you mean") as caught:
        LoraFolder(folder).find("detail tweeker")
    assert caught.value.details["nearest"][0] == "detail tweaker"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "people/../../secret", "..", ".", "", "people", "notes", "secret"]
)
def test_no_name_leads_out_of_the_folder(folder: Path, name: str) -> None:
    save(folder.parent / "secret.safetensors", {"x": np.ones(1)})
    with pytest.raises(AdapterNotFound):
        LoraFolder(folder).find(name)


def test_a_folder_linked_into_itself_is_walked_once(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    assert LoraFolder(folder).find("Moxin_Shukezouma").name == "Moxin_Shukezouma.safetensors"


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        LoraFolder(tmp_path / "nothing")


def test_tags_become_choices_in_their_order(folder: Path) -> None:
    prompt = parse_prompt("<lora:style:0.5> x <lora:moxin:0.2:0.4:3> <lora:style:0.25>")
    moxin = folder / "people/Moxin_Shukezouma.safetensors"
    assert choices_from_prompt(prompt, LoraFolder(folder)) == (
        AdapterChoice(folder / "style.safetensors", 0.5),
        AdapterChoice(moxin, 0.2, unet=0.4, rank_limit=3),
        AdapterChoice(folder / "style.safetensors", 0.25),
    )
