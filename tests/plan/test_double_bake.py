"""An adapter that the base has already, by its record, is told with the weight that results; or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from models import llama, peft_lora, random_arrays, save_base, sd1_pair
from support import bake, load, metadata, save

from bake.api import build_plan, fuse
from bake.errors import AlreadyFused
from bake.io.adapter import open_adapter
from bake.merging import merge
from bake.plan.doubles import note_repeated
from bake.plan.model import Plan
from bake.plan.recipe import AdapterChoice, Recipe
from bake.plan.selection import Selection


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base, lora, _ = sd1_pair(tmp_path)
    return base, lora


def baked(pair: tuple[Path, Path], *choices: Any, **options: Any) -> Path:
    """The base with the LoRA in it, once for each weight or choice, one bake after the other."""
    base = pair[0]
    for number, choice in enumerate(choices):
        output = base.with_name(f"{base.stem}-{number}.safetensors")
        use = choice if isinstance(choice, AdapterChoice) else (pair[1], choice)
        base = fuse(base, [use], output, **options).output
    return base


def warning(plan: Plan) -> str:
    (text,) = plan.warnings
    return text


def test_the_weights_before_and_now_are_added_up(pair) -> None:
    plan = build_plan(baked(pair, 0.8), [(pair[1], 0.5)])
    assert warning(plan) == "style.safetensors is in the base already, at 0.8: with 0.5 now it counts 1.3 in all."
    assert not build_plan(pair[0], [pair[1]]).warnings


def test_every_bake_of_a_chain_counts(pair) -> None:
    plan = build_plan(baked(pair, 0.8, 0.25, -0.5), [(pair[1], 0.1)])
    assert "at -0.5 and 0.25 and 0.8" in warning(plan)
    assert "it counts 0.65 in all" in warning(plan)


def test_taking_it_out_again_is_told_as_well(pair) -> None:
    assert "it counts 0 in all" in warning(build_plan(baked(pair, 0.7), [(pair[1], -0.7)]))


def test_text_encoders_are_counted_apart(pair) -> None:
    base = baked(pair, AdapterChoice(pair[1], 0.5, te=0.25))
    assert "at 0.5 (te 0.25): with 1 now it counts 1.5 (te 1.25) in all" in warning(build_plan(base, [pair[1]]))


@pytest.mark.parametrize(
    ("only", "said"), [("unet", "at 0.5 (te 0)"), ("te", "at 0 (te 0.5)"), ("te1", "at 0 (te 0.5)")]
)
def test_components_that_were_left_out_do_not_count(pair, only: str, said: str) -> None:
    assert said in warning(build_plan(baked(pair, 0.5, only=[only]), [pair[1]]))


def test_the_weights_of_now_are_counted_apart_as_well(pair) -> None:
    base = baked(pair, 0.5)
    text = warning(build_plan(base, [AdapterChoice(pair[1], 0.5, te=0.25)]))
    assert "with 0.5 (te 0.25) now it counts 1 (te 0.75) in all" in text
    text = warning(build_plan(base, [(pair[1], 0.5)], only=["unet"]))
    assert "with 0.5 (te 0) now it counts 1 (te 0.5) in all" in text


def test_block_weights_are_pointed_out(pair) -> None:
    chosen = AdapterChoice(pair[1], 0.5, selection=Selection(number=0.5))
    for first, second in ((chosen, AdapterChoice(pair[1])), (AdapterChoice(pair[1]), chosen)):
        plan = build_plan(baked(pair, first, overwrite=True), [second])
        assert "it counts 1.5 in all, where block weights leave it whole" in warning(plan)


def test_what_it_is_called_does_not_matter_and_what_it_holds_does(pair, tmp_path: Path) -> None:
    base = baked(pair, 0.8)
    renamed = Path(shutil.copyfile(pair[1], tmp_path / "other.safetensors"))
    assert "other.safetensors is in the base already (as style.safetensors), at 0.8" in warning(
        build_plan(base, [renamed])
    )
    content = bytearray(pair[1].read_bytes())
    content[-1] ^= 1
    pair[1].write_bytes(content)
    assert not build_plan(base, [pair[1]]).warnings


def test_models_that_were_merged_after_it_are_looked_into(pair, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other.safetensors")
    merged = merge(
        "weighted_sum", [other, baked(pair, 0.8)], tmp_path / "merged.safetensors", parameters={"alpha": 0.5}
    )
    text = warning(build_plan(merged.output, [(pair[1], 0.2)]))
    assert "at 0.8: with 0.2 now it counts 1 in all, if the merges after it had left it whole" in text
    again = fuse(merged.output, [pair[1]], tmp_path / "again.safetensors").output
    assert "at 1 and 0.8" in warning(build_plan(again, [pair[1]]))


def test_a_record_in_any_file_of_a_folder_counts(tmp_path: Path) -> None:
    arrays = random_arrays(llama())
    base, lora = tmp_path / "base", save(tmp_path / "l.safetensors", peft_lora(llama(), list(arrays)[2:3]))
    names = sorted(arrays)
    for number, half in enumerate((names[:8], names[8:]), 1):
        save(base / f"model-0000{number}-of-00002.safetensors", {name: arrays[name] for name in half})
    index = {name: f"model-0000{1 if name in names[:8] else 2}-of-00002.safetensors" for name in names}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    out = fuse(base, [lora], tmp_path / "out").output
    assert "at 1: with 1 now it counts 2 in all" in warning(build_plan(out, [lora]))


class TestOneCommand:
    def test_the_same_adapter_twice_is_noted(self, pair, tmp_path: Path) -> None:
        copied = Path(shutil.copyfile(pair[1], tmp_path / "copy.safetensors"))
        notes = build_plan(pair[0], [(pair[1], 0.5), (copied, 0.3)]).notes
        assert any("the same adapter 2 times, at " in note and "which makes 0.8" in note for note in notes)
        assert not any("the same adapter" in note for note in build_plan(pair[0], [pair[1]]).notes)

    def test_other_adapters_of_that_shape_are_not(self, pair, tmp_path: Path) -> None:
        other = save(tmp_path / "other.safetensors", {n: a.astype("f2") * 2 for n, a in load(pair[1]).items()})
        assert not any("the same adapter" in note for note in build_plan(pair[0], [pair[1], other]).notes)

    def test_adapters_that_only_look_alike_are_told_apart_by_their_digests(self, pair, tmp_path: Path) -> None:
        other = save(tmp_path / "other.safetensors", {n: a.astype("f2") * 2 for n, a in load(pair[1]).items()})
        uses = [(open_adapter(path), AdapterChoice(path)) for path in (pair[1], other)]
        recipe = Recipe(pair[0], tuple(choice for _, choice in uses))
        assert list(note_repeated(recipe, uses, ["alike", "alike"])) == []
        assert len(list(note_repeated(recipe, [uses[0], uses[0]], ["alike", "alike"]))) == 1

    def test_both_count_if_the_base_has_it_too(self, pair) -> None:
        plan = build_plan(baked(pair, 1.0), [(pair[1], 0.5), (pair[1], 0.25)])
        assert "it counts 1.75 in all" in warning(plan)


class TestStrict:
    def test_it_refuses(self, pair, tmp_path: Path) -> None:
        base = baked(pair, 0.8)
        with pytest.raises(AlreadyFused, match=r"it counts 1\.8 in all"):
            build_plan(base, [pair[1]], strict=True)
        output = tmp_path / "out.safetensors"
        for command in (["plan"], ["fuse", "-o", output]):
            done = bake(*command[:1], base, "-l", pair[1], "--strict", *command[1:])
            assert done.code == 5
            assert "without --strict" in done.err
        assert not output.exists()
        as_json = bake("plan", base, "-l", pair[1], "--strict", "--json").json["error"]
        assert (as_json["code"], as_json["details"]) == ("already-fused", {"adapters": ["style.safetensors"]})

    def test_it_lets_others_pass(self, pair, tmp_path: Path) -> None:
        other = save(tmp_path / "other.safetensors", {n: a.astype("f2") * 2 for n, a in load(pair[1]).items()})
        assert build_plan(baked(pair, 0.8), [other], strict=True).warnings == ()

    def test_it_does_not_change_the_output(self, pair, tmp_path: Path) -> None:
        strict, plain = (
            fuse(pair[0], [pair[1]], tmp_path / f"{strict}.safetensors", strict=strict).output
            for strict in (True, False)
        )
        assert strict.read_bytes() == plain.read_bytes()


def test_the_command_line_warns_on_stderr_and_in_json(pair, tmp_path: Path) -> None:
    base = baked(pair, 0.8)
    for words in (["plan", base], ["fuse", base, "-o", tmp_path / "out.safetensors"]):
        done = bake(*words, "-l", pair[1], "--json")
        assert done.code == 0
        (text,) = done.json["warnings"]
        assert "it counts 1.8 in all" in text
        assert f"warning: {text}" in done.err


@pytest.mark.parametrize(
    "adapters",
    [1, [1], [{}], [{"name": 1, "files": [], "weight": 1}], [{"files": [{"size": None}]}], "text", [["deep"]]],
    ids=str,
)
def test_a_record_that_bake_did_not_write_is_passed_over(pair, adapters: Any, tmp_path: Path) -> None:
    base = baked(pair, 0.8)
    record = json.loads(metadata(base)["bake.recipe"])
    arrays = {name: array.astype("f2") if array.dtype.kind == "f" else array for name, array in load(base).items()}
    for wrong in ({**record, "adapters": adapters}, {**record, "settings": 1}, adapters):
        spoiled = save(tmp_path / "spoiled.safetensors", arrays, {"bake.recipe": json.dumps(wrong)})
        assert build_plan(spoiled, [pair[1]]).warnings == ()


def test_a_record_with_a_weight_that_is_no_number_is_passed_over(pair, tmp_path: Path) -> None:
    base = baked(pair, 0.8)
    text = metadata(base)["bake.recipe"].replace('"weight":0.8', '"weight":NaN')
    arrays = {name: array.astype("f2") if array.dtype.kind == "f" else array for name, array in load(base).items()}
    spoiled = save(tmp_path / "spoiled.safetensors", arrays, {"bake.recipe": text})
    assert build_plan(spoiled, [pair[1]]).warnings == ()
