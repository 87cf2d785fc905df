"""Every hostile file: the documented exit code, one message, nothing written, nothing changed, nothing allocated."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import FIXTURES, KOHYA_LORA, ROOT, Done, bake, drafts, load, metadata, save

from bake.cli.text import printable
from bake.errors import HeaderError
from bake.io.tensorfile import open_tensors

HOSTILE = FIXTURES / "hostile"
CASES: list[dict[str, Any]] = json.loads((HOSTILE / "cases.json").read_text())
BASE, ADAPTER = HOSTILE / "good" / "base.safetensors", HOSTILE / "good" / "adapter.safetensors"


def listing(folder: Path) -> dict[str, bytes]:
    """Everything below `folder`, with its content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def judge(done: Done, exit_code: int, says: str) -> None:
    """The exit code is the one that was due, and a refusal is one message and nothing else."""
    assert done.code == exit_code, done.err or done.out
    if exit_code == 0:
        return
    assert done.out == ""
    assert done.err.startswith("bake: ")
    assert "Traceback" not in done.err
    assert "a bug in bake" not in done.err
    assert len(done.err) < 3000
    assert not any(ord(letter) < 32 and letter != "\n" for letter in done.err)
    assert says in done.err


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder beside copies of the good base and adapter."""
    shutil.copytree(HOSTILE / "good", tmp_path / "good")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_hostile_file_is_refused_by_every_command_and_nothing_is_written(case: dict[str, Any], place: Path) -> None:
    given = place / case["path"] if "path" in case else place
    if "path" in case:
        source = HOSTILE / case["path"]
        shutil.copytree(source, given) if source.is_dir() else shutil.copyfile(source, given)
    before = listing(place)
    output = place / "work" / "out.safetensors"
    if case["role"] == "base":
        request: list[object] = [given, "-l", place / "good" / ADAPTER.name]
    elif case["role"] == "adapter":
        request = [place / "good" / BASE.name, "-l", given]
    else:
        request = [place / "good" / BASE.name, "--prompt", case.get("prompt", ""), "--lora-dir", place / "good"]
    exit_code, says = case["exit"], case["says"]
    if case["role"] == "undone":
        judge(bake("undo", given / "out.safetensors", "-o", output), exit_code, says)
    elif case["role"] == "run":
        judge(bake("run", given, "--dry-run"), exit_code, says)
        judge(bake("run", given), exit_code, says)
    elif "path" in case:
        judge(bake("inspect", given), case.get("inspect", exit_code), says)
        as_json = bake("inspect", given, "--json")
        assert as_json.code == case.get("inspect", exit_code)
        assert as_json.json.get("error", {"exit": 0})["exit"] == as_json.code
    if case["role"] == "run":
        as_json = bake("run", given, "--overwrite", "--json")
        assert as_json.code == as_json.json.get("error", {"exit": 0})["exit"] == exit_code
    elif case["role"] == "baked":
        judge(bake("verify", given), exit_code, says)
    elif case["role"] != "undone":
        judge(bake("plan", *request), 0 if exit_code == 7 and case.get("inspect") == 0 else exit_code, says)
        judge(bake("fuse", *request, "-o", output), exit_code, says)
    if exit_code == 0:
        output.unlink(missing_ok=True)
    assert listing(place) == before


_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from bake.errors import BakeError
from bake.io.tensorfile import open_tensors
torch.ones(2) @ torch.ones(2)
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 64 * 2**20,) * 2)
for path in map(Path, sys.argv[1:]):
    try:
        open_tensors(path)
    except BakeError as error:
        assert error.exit_code in (3, 6), error
        assert not isinstance(error.__context__, MemoryError), path
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory is Linux's")
def test_no_file_makes_bake_allocate_what_it_only_announces() -> None:
    files = sorted(path for path in HOSTILE.iterdir() if path.suffix in (".pt", ".safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", _IN_LITTLE_MEMORY, *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("filler", [b"[],", b"{},", b'"",', b"0,"], ids=["lists", "objects", "texts", "numbers"])
def test_the_memory_that_a_header_takes_is_bounded_by_its_length(filler: bytes, tmp_path: Path) -> None:
    path = tmp_path / "full.safetensors"
    text = b'{"a":[' + filler * 200_000 + b"0]}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError):
            open_tensors(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50 * len(text)


def test_a_name_that_comes_twice_is_found_among_very_many(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    names = [f'"{number}":0' for number in range(200_000)]
    text = ("{" + ",".join([*names, names[-1]]) + "}").encode()  # comparing each with each would take hours
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(HeaderError, match="'199999' twice"):
        open_tensors(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(place: Path) -> None:
    pipe = place / "good" / "pipe.safetensors"
    os.mkfifo(pipe)
    good = place / "good" / "base.safetensors"
    judge(bake("inspect", pipe), 3, "not a regular file")
    judge(bake("plan", pipe, "-l", KOHYA_LORA), 3, "not a regular file")
    judge(bake("plan", good, "-l", pipe), 3, "not a regular file")
    judge(bake("plan", good, "--prompt", "<lora:nobody:1>", "--lora-dir", place / "good"), 2, "no LoRA called")


class TestLinks:
    """A model folder may hold links, as those of Hugging Face's cache do; files it points at are not carried off."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        folder = tmp_path / "cache" / "models--a--b" / "snapshots" / "0123" / "model"
        folder.mkdir(parents=True)
        shutil.copyfile(BASE, folder / "model.safetensors")
        (tmp_path / "secret.txt").write_text("the user's own")
        return folder

    def fuse(self, model: Path) -> Done:
        return bake("fuse", model, "-l", ADAPTER, "-o", model.parents[4] / "out", "--json")

    def refused(self, model: Path, says: str) -> None:
        done = self.fuse(model)
        assert done.code == 3
        assert says in done.json["error"]["message"]
        assert not (model.parents[4] / "out").exists()

    def test_a_link_to_a_file_elsewhere_is_refused(self, model: Path, tmp_path: Path) -> None:
        (model / "notes.txt").symlink_to(tmp_path / "secret.txt")
        self.refused(model, "a link out of its folder")

    def test_a_link_to_a_folder_elsewhere_is_refused(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "private").mkdir()
        shutil.move(tmp_path / "secret.txt", tmp_path / "private")
        (model / "notes").symlink_to(tmp_path / "private")
        self.refused(model, "a link out of its folder")

    def test_a_folder_inside_itself_is_refused(self, model: Path) -> None:
        (model / "again").symlink_to(".")
        self.refused(model, "would never end")

    def test_a_tokenizer_of_an_adapter_stays_in_its_folder_too(self, model: Path, tmp_path: Path) -> None:
        arrays = load(BASE)
        vocabulary = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), arrays["model.norm.weight"][None])
        save(model / "model.safetensors", arrays | vocabulary)
        (model / "config.json").write_text('{"model_type": "llama", "vocab_size": 1, "tie_word_embeddings": false}')
        adapter = tmp_path / "adapter"
        grown = {f"base_model.model.{name}": np.repeat(array, 2, 0) for name, array in vocabulary.items()}
        save(adapter / "adapter_model.safetensors", load(ADAPTER) | grown)
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "modules_to_save": ["embed_tokens", "lm_head"]}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        (adapter / "tokenizer.json").symlink_to(tmp_path / "secret.txt")
        done = bake("fuse", model, "-l", adapter, "-o", tmp_path / "out")
        judge(done, 3, "a link out of its folder")
        (adapter / "tokenizer.json").unlink()
        (adapter / "tokenizer.json").write_text("{}")
        assert bake("fuse", model, "-l", adapter, "-o", tmp_path / "out").code == 0
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"

    def test_the_blobs_of_a_hugging_face_cache_are_followed(self, model: Path) -> None:
        blobs = model.parents[2] / "blobs"
        blobs.mkdir()
        for name, content in (("model.safetensors", BASE.read_bytes()), ("README.md", b"a card")):
            (blobs / f"{name}-blob").write_bytes(content)
            (model / name).unlink(missing_ok=True)
            (model / name).symlink_to(f"../../../blobs/{name}-blob")
        assert self.fuse(model).code == 0
        written = model.parents[4] / "out"
        assert (written / "README.md").read_bytes() == b"a card"
        assert not (written / "README.md").is_symlink()

    def test_links_inside_the_folder_are_followed_and_those_to_nowhere_are_named(self, model: Path) -> None:
        (model / "tokenizer").mkdir()
        (model / "tokenizer" / "vocab.json").write_text("{}")
        (model / "tokenizer_2").symlink_to("tokenizer")
        (model / "lost.txt").symlink_to("nowhere")
        done = self.fuse(model)
        assert done.code == 0
        assert (model.parents[4] / "out" / "tokenizer_2" / "vocab.json").read_text() == "{}"
        assert any("lost.txt" in note for note in done.json["notes"])

    def test_weights_may_be_links_to_anywhere(self, model: Path, tmp_path: Path) -> None:
        shutil.move(model / "model.safetensors", tmp_path / "big.safetensors")
        (model / "model.safetensors").symlink_to(tmp_path / "big.safetensors")
        assert self.fuse(model).code == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has file names that are no text")
def test_a_file_whose_name_is_no_text_is_fused_and_recorded(tmp_path: Path) -> None:
    lora = tmp_path / os.fsdecode(b"st\xffyle.safetensors")
    shutil.copyfile(ADAPTER, lora)
    output = tmp_path / "out.safetensors"
    done = bake("fuse", BASE, "-l", lora, "-o", output)
    assert done.code == 0, done.err
    assert json.loads(metadata(output)["bake.recipe"])["adapters"][0]["name"] == "st?yle.safetensors"
    assert bake("verify", output, "--search", BASE.parent).code == 0


def test_a_token_that_climbs_gives_a_file_that_does_not(tmp_path: Path) -> None:
    arrays = dict(load(ADAPTER)) | {
        "bundle_emb.../../../etc/x.string_to_param.*": load(BASE)["model.norm.weight"][None]
    }
    lora = save(tmp_path / "in" / "words.safetensors", arrays)
    (tmp_path / "work").mkdir()
    done = bake("fuse", BASE, "-l", lora, "-o", tmp_path / "work" / "out.safetensors")
    assert done.code == 0, done.err
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")}
    assert found - {"in/words.safetensors", "work/out.safetensors"} == {"work/out.embeddings/_.._.._etc_x.safetensors"}
    assert not drafts(tmp_path / "work")


def test_control_characters_are_spelled_out() -> None:
    assert printable("a\x1b[31m\u202eb\nc") == "a\\x1b[31m\\u202eb\\nc"
    assert printable("one\ntwo\x07", lines=True) == "one\ntwo\\x07"
    assert len(printable("a" * 10**6, lines=True)) < 20_000
