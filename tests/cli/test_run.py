"""bake run and bake schema: one bake or many from a file, what is said of them, exit codes."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from models import llama, peft_lora, random_arrays
from support import DIFFUSERS_LORA, KOHYA_LORA, SD1_BASE, bake, drafts, load, lora_delta, metadata, raw, rounded, save

import bake as package
from bake import cli, running
from bake.errors import OutputExists, UsageError
from bake.recipes.schema import recipe_schema

STYLES = """\
base: base.safetensors
bakes:
  - output: water.safetensors
    loras: [loras/water.safetensors:0.8]
  - output: lines.safetensors
    loras: loras/lines.safetensors:0.5
  - output: both.safetensors
    loras: [loras/water.safetensors, loras/lines.safetensors]
    dtype: bf16
"""
NAMES = ("water", "lines", "both")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, two LoRAs and a recipe for three styles; the current folder is another."""
    (tmp_path / "loras").mkdir()
    shutil.copyfile(SD1_BASE, tmp_path / "base.safetensors")
    shutil.copyfile(KOHYA_LORA, tmp_path / "loras" / "water.safetensors")
    shutil.copyfile(DIFFUSERS_LORA, tmp_path / "loras" / "lines.safetensors")
    (tmp_path / "styles.yaml").write_text(STYLES)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def outputs(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.safetensors")} - {"base"}


def change(folder: Path, old: str, new: str) -> None:
    path = folder / "styles.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_every_bake_is_what_fuse_makes(folder: Path) -> None:
    done = bake("run", "../styles.yaml")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert [line for line in lines if line.startswith("bake ")] == [
        f"bake      {number} of 3: {name}" for number, name in enumerate(NAMES, 1)
    ]
    water, fine = folder / "loras" / "water.safetensors", folder / "loras" / "lines.safetensors"
    for name, words in {
        "water": ("-l", f"{water}:0.8"),
        "lines": ("-l", f"{fine}:0.5"),
        "both": ("-l", water, "-l", fine, "--dtype", "bf16"),
    }.items():
        alone = folder / "elsewhere" / f"{name}.safetensors"
        assert bake("fuse", folder / "base.safetensors", *words, "-o", alone).code == 0
        assert raw(alone) == raw(folder / f"{name}.safetensors")
        assert metadata(alone) == metadata(folder / f"{name}.safetensors")
    assert not drafts(folder)


def test_one_pass_rounds_once(tmp_path: Path) -> None:
    """A merge, a LoRA and a replaced component in one bake: float64, rounded once."""
    shapes = llama()
    one, two = random_arrays(shapes), {name: array[::-1].copy() for name, array in random_arrays(shapes).items()}
    target = "model.layers.0.self_attn.q_proj.weight"
    factors = peft_lora(shapes, [target])
    for name, arrays in {"one": one, "two": two, "lora": factors}.items():
        save(tmp_path / f"{name}.safetensors", arrays)
    (tmp_path / "recipe.yaml").write_text(
        "merge:\n  method: weighted_sum\n  models: [one.safetensors, two.safetensors]\n  parameters: {alpha: 0.3}\n"
        "loras: [lora.safetensors:0.5]\noutput: out.safetensors\n"
    )
    done = bake("run", tmp_path / "recipe.yaml")
    assert done.code == 0, done.err
    found = load(tmp_path / "out.safetensors")
    up, down = (factors[f"base_model.model.{target.removesuffix('.weight')}.lora_{x}.weight"] for x in "BA")
    for name in shapes:
        first, second = one[name].astype(np.float64), two[name].astype(np.float64)
        merged = first + 0.3 * (second - first)
        expected = merged + 0.5 * lora_delta(up, down) if name == target else merged
        assert np.array_equal(found[name], rounded(expected, np.float16)), name


def test_what_headers_tell_is_told_before_anything_is_written(folder: Path) -> None:
    change(folder, "[loras/water.safetensors, loras/lines.safetensors]", "[loras/nowhere.safetensors]")
    done = bake("run", "../styles.yaml")
    assert done.code == 3
    assert done.err.startswith("bake: ../styles.yaml:8:13: ../loras/nowhere.safetensors: there is no such file")
    assert outputs(folder) == set()


def test_a_refusal_of_a_lora_names_its_line(folder: Path) -> None:
    save(folder / "loras" / "other.safetensors", {"lora_unet_no_such.lora_up.weight": np.ones((2, 2), np.float16)})
    change(folder, "loras/lines.safetensors:0.5", "loras/other.safetensors:0.5")
    done = bake("run", "../styles.yaml")
    assert done.code > 2
    assert done.err.startswith("bake: ../styles.yaml:5:5: ")
    assert outputs(folder) == set()


def test_outputs_that_exist_are_kept_unless_asked_for(folder: Path) -> None:
    (folder / "both.safetensors").write_bytes(b"mine")
    done = bake("run", "../styles.yaml")
    assert done.code == 8
    assert done.err.startswith("bake: ../styles.yaml:7:13: ../both.safetensors exists")
    assert outputs(folder) == {"both"}
    assert bake("run", "../styles.yaml", "--overwrite").code == 0
    assert outputs(folder) == set(NAMES)
    change(folder, "base: base", "overwrite: true\nbase: base")
    assert bake("run", "../styles.yaml", "--select", "both").code == 0


@pytest.mark.parametrize(
    ("old", "new", "place", "says"),
    [
        ("output: both", "output: ../{}/water", "7:5", "is the output of the bake in line 3 too"),
        ("output: both", "output: water.safetensors/both", "7:5", "the output of the bake in line 3"),
        (
            "loras: loras/lines.safetensors:0.5",
            "base: water.safetensors\n    vae: base.safetensors",
            "6:11",
            "in line 3",
        ),
        ("output: lines.safetensors", "output: loras/water.safetensors", "4:13", "in line 5"),
    ],
)
def test_bakes_that_get_in_each_others_way_are_refused(folder: Path, old: str, new: str, place: str, says: str) -> None:
    change(folder, old, new.format(folder.name))
    done = bake("run", "../styles.yaml")
    assert done.code == 2
    assert done.err.startswith(f"bake: ../styles.yaml:{place}: ")
    assert says in done.err
    assert outputs(folder) == set()


def test_shards_share_the_bakes(folder: Path) -> None:
    seen = []
    for number in (1, 2):
        document = bake("run", "../styles.yaml", "--shard", f"{number}/2", "--json").json
        seen.append([each["name"] for each in document["bakes"]])
    assert seen == [["water", "both"], ["lines"]]
    assert outputs(folder) == set(NAMES)
    beyond = bake("run", "../styles.yaml", "--shard", "4/4")
    assert (beyond.code, beyond.out) == (0, "bake      nothing: the shard has no bake\n")
    for wrong in ("0/2", "3/2", "1", "1/0", "a/b"):
        assert bake("run", "../styles.yaml", "--shard", wrong).code == 2


def test_single_bakes_are_selected_by_name_or_output(folder: Path) -> None:
    assert bake("run", "../styles.yaml", "--select", "lines", "--select", "both.safetensors").code == 0
    assert outputs(folder) == {"lines", "both"}
    wrong = bake("run", "../styles.yaml", "--select", "line")
    assert wrong.code == 2
    assert "no bake is called 'line'; is it lines?" in wrong.err


class TestFailures:
    @pytest.fixture
    def broken(self, folder: Path) -> Path:
        """The second LoRA has values that only the run finds."""
        factors = {
            name: array.astype(np.float32) for name, array in load(folder / "loras" / "lines.safetensors").items()
        }
        first = next(name for name in factors if "lora" in name)
        factors[first][:] = np.nan
        save(folder / "loras" / "lines.safetensors", factors)
        return folder

    def test_what_the_run_finds_ends_it(self, broken: Path) -> None:
        done = bake("run", "../styles.yaml")
        assert done.code == 7
        assert done.err.startswith("bake: ../styles.yaml:5:5: ")
        assert done.err.endswith("bake: 1 of 3 bakes failed, 1 were not begun\n")
        assert outputs(broken) == {"water"}

    def test_the_document_has_them_all(self, broken: Path) -> None:
        done = bake("run", "../styles.yaml", "--json")
        assert done.code == 7
        assert [each["status"] for each in done.json["bakes"]] == ["done", "failed", "not run"]
        assert done.json["bakes"][0]["verification"]["ok"]
        assert done.json["error"] == done.json["bakes"][1]["error"]
        assert (done.json["error"]["exit"], done.json["error"]["details"]["line"]) == (7, 5)

    def test_keep_going_does_what_can_be_done(self, broken: Path) -> None:
        change(broken, "[loras/water.safetensors, loras/lines.safetensors]", "[loras/water.safetensors]")
        change(broken, "loras/water.safetensors:0.8", "loras/nowhere.safetensors")
        done = bake("run", "../styles.yaml", "--keep-going")
        assert done.code == 3  # of the first that failed
        assert outputs(broken) == {"both"}
        assert done.err.endswith("bake: 2 of 3 bakes failed, 0 were not begun\n")
        document = bake("run", "../styles.yaml", "--keep-going", "--overwrite", "--json").json
        assert [each["status"] for each in document["bakes"]] == ["failed", "failed", "done"]


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    done = bake("run", "../styles.yaml", "--dry-run")
    assert done.code == 0, done.err
    assert done.out.count("writes ") == 3
    document = bake("run", "../styles.yaml", "--dry-run", "--json").json
    assert document["schema"] == 1
    assert [each["status"] for each in document["bakes"]] == ["planned"] * 3
    assert [each["line"] for each in document["bakes"]] == [3, 5, 7]
    assert document["bakes"][2]["tensors"]["converted"] > 0
    assert outputs(folder) == set()


def test_the_command_line_has_the_last_word(folder: Path) -> None:
    change(folder, "base: base", "verify: none\nbase: base")
    words = ("run", "../styles.yaml", "--select", "water", "--json", "--overwrite")
    assert bake(*words).json["bakes"][0]["verification"] is None
    assert bake(*words, "--verify", "full").json["bakes"][0]["verification"]["mode"] == "full"


def test_an_output_is_named_somewhere(folder: Path) -> None:
    one = folder / "one.yaml"
    one.write_text("base: base.safetensors\nloras: [loras/water.safetensors]\n")
    missing = bake("run", one)
    assert missing.code == 2
    assert missing.err == f"bake: {one}:1:1: there is no output; name it here, or with -o\n"
    assert bake("run", one, "--dry-run").code == 0
    assert bake("run", one, "-o", "here.safetensors").code == 0  # from the current folder, not that of the recipe
    assert (folder / "elsewhere" / "here.safetensors").is_file()
    several = bake("run", "../styles.yaml", "-o", "out.safetensors")
    assert several.code == 2
    assert "-o is for one alone" in several.err


def test_disks_have_to_hold_all_outputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (folder / "base.safetensors").stat().st_size
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(running.shutil, "disk_usage", lambda path: usage(int(2.5 * size)))
    done = bake("run", "../styles.yaml")
    assert done.code == 8
    assert done.err.startswith("bake: ../styles.yaml:7:13: ../both.safetensors: the output takes")
    assert outputs(folder) == set()


def test_an_interrupted_run_says_how_many_outputs_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "due", [Path("a"), Path("b"), Path("c")])
    monkeypatch.setattr(cli, "finished", [Path("a")])
    assert cli._fate() == "1 of 3 outputs are complete, the others are as they were before"


def test_notes_of_a_recipe_are_warnings(folder: Path) -> None:
    (folder / "one.yaml").write_text(
        "base: base.safetensors\noutput: a.safetensors\nlora_dir: loras\nprompt: <lora:water:1> <hypernet:x:1>\n"
    )
    done = bake("run", folder / "one.yaml")
    assert done.code == 0
    assert f"warning: {folder}/one.yaml:4:1: <hypernet:x:1> is not a LoRA tag" in done.err


def test_in_python(folder: Path) -> None:
    results = package.run_recipe("../styles.yaml", select=["lines"], verify="none")
    assert [result.output for result in results] == [Path("../lines.safetensors")]
    with pytest.raises(OutputExists, match=r"styles\.yaml:5:13: "):
        package.run_recipe("../styles.yaml", verify="none")
    with pytest.raises(UsageError, match="for one alone"):
        package.run_recipe("../styles.yaml", output="x.safetensors")


def test_the_schema_is_printed() -> None:
    done = bake("schema")
    assert done.code == 0
    assert done.json == recipe_schema()
