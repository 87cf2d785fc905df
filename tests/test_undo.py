"""bake undo: the base comes back from the output and its undo file, every byte of it, or nothing is written."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes
from crashing import Fault, Server
from folders import save_folder
from hypothesis import given
from hypothesis import strategies as st
from models import SD1_MODULES, kohya_lora, llama, peft_lora, random_arrays, save_base, sd1_pair
from names import small
from scaled import SHAPES, TOUCHED, scaled_base
from strategies import container, entry
from support import ROOT, bake, drafts, load, metadata, random, raw, save

import bake as package
from bake.errors import InputError, VerificationFailed
from bake.io import differences, packing
from bake.io import undo as format
from bake.io.undo import Source, UndoReader, UndoWriter

Words = list[Any]
needs_zstd = pytest.mark.skipif(importlib.util.find_spec("zstandard") is None, reason="zstandard is not installed")
PACKINGS = [pytest.param("zlib"), pytest.param("zstd", marks=needs_zstd)]


def listing(path: Path) -> dict[str, bytes]:
    """Every file at or below `path`, with its content."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {each.relative_to(path).as_posix() if each != path else "": each.read_bytes() for each in files}


def file(folder: Path) -> Words:
    return scenes._file(folder)[:3]


def odd_file(folder: Path) -> Words:
    """A header that bake writes otherwise: another order, spaces, unsorted metadata, a tensor that is not aligned."""
    tensors = {"flag": np.ones(1, np.uint8)} | dict(reversed(load(file(folder)[0]).items()))
    entries: dict[str, Any] = {"__metadata__": {"z": "1", "a": "2"}}
    data = b""
    for name, array in tensors.items():
        array = array if name == "flag" else array.astype(np.float16)
        entries[name] = entry("U8" if name == "flag" else "F16", list(array.shape), len(data))
        data += array.tobytes()
    base = folder / "in" / "base.safetensors"
    base.write_bytes(container(entries, data, pad=b"   "))
    return [base, "-l", folder / "in" / "lora.safetensors"]


def sharded(folder: Path) -> Words:
    return scenes._folder(folder)[:3]


def diffusers(folder: Path) -> Words:
    arrays, lora = random_arrays(small("sd1")), kohya_lora(small("sd1"))[0]
    base = folder / "in" / "base"
    base.mkdir(parents=True)
    return [save_folder(base, arrays), "-l", save(folder / "in" / "lora.safetensors", lora)]


def cast(*words: str) -> Callable[[Path], Words]:
    return lambda folder: [*file(folder), *words]


def wide(folder: Path) -> Words:
    base, lora, _ = sd1_pair(folder / "in")
    save_base(base, dtype=np.float32)
    return [base, "-l", lora, "--dtype", "fp16", "--dtype", "vae=keep"]


def scaled(new: bool) -> Callable[[Path], Words]:
    def build(folder: Path) -> Words:
        lora = save(folder / "in" / "lora.safetensors", peft_lora(SHAPES, TOUCHED, prefix="diffusion_model."))
        return [scaled_base(folder / "in" / "base.safetensors", new), "-l", lora]

    return build


def dora(folder: Path) -> Words:
    base, lora, _ = sd1_pair(folder / "in")
    arrays = {name: array.astype(np.float32) for name, array in load(lora).items()}
    shapes = small("sd1")
    for module, name in SD1_MODULES.items():
        ones = (1,) * (len(shapes[name]) - 2)
        arrays[f"{module}.dora_scale"] = np.abs(random(3, shapes[name][0], 1, *ones)).astype(np.float32) + 0.5
    return [base, "-l", save(lora, arrays)]


def grown(folder: Path) -> Words:
    """A language model whose vocabulary the adapter lengthens; it brings a tokenizer of its own."""
    base, adapter = folder / "in" / "base", folder / "in" / "adapter"
    arrays = random_arrays(llama())
    save(base / "model.safetensors", arrays)
    (base / "config.json").write_text('{"model_type": "llama", "vocab_size": 16, "tie_word_embeddings": false}')
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    heads = {name: np.concatenate([arrays[name], arrays[name][:3]]) for name in arrays if arrays[name].shape[0] == 16}
    stored = {f"base_model.model.{name}": array for name, array in heads.items()}
    save(adapter / "adapter_model.safetensors", peft_lora(llama(), scenes.TOUCHED) | stored)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["embed_tokens", "lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "tokenizer.json").write_text('{"version": "2.0", "more": true}')
    return [base, "-l", adapter]


def dropped(folder: Path) -> Words:
    """A single file that loses its text encoder."""
    return [save_base(folder / "in" / "base.safetensors"), "--drop", "te1"]


def replaced(folder: Path) -> Words:
    """A diffusers folder with the VAE of a file."""
    base = diffusers(folder)[0]
    arrays = {name: array + np.float16(1) for name, array in random_arrays(small("sd1")).items()}
    return [base, "--vae", save(folder / "in" / "other.safetensors", arrays)]


KINDS: dict[str, Callable[[Path], Words]] = {
    "file": file,
    "file with an odd header": odd_file,
    "stack": lambda folder: scenes._stack(folder)[:5],
    "sharded": sharded,
    "diffusers": diffusers,
    "bf16": cast("--dtype", "bf16", "--no-recipe"),
    "scaled fp8 with new tensors": cast("--dtype", "fp8_e4m3fn_scaled"),
    "stochastic": cast("--rounding", "stochastic", "--seed", "3"),
    "fp32 to fp16": wide,
    "scaled fp8, new": scaled(True),
    "scaled fp8, old": scaled(False),
    "DoRA": dora,
    "grown vocabulary": grown,
    "dropped": dropped,
    "replaced": replaced,
}


def names(words: Words) -> tuple[Path, str]:
    """(base, name that its output needs)."""
    base = Path(words[0])
    return base, "out" if base.is_dir() or "--also" in words else "out.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_comes_back_byte_for_byte(kind: str, tmp_path: Path) -> None:
    words = KINDS[kind](tmp_path)
    base, name = names(words)
    before = listing(base)
    if "--also" in words:
        before = {path.name: path.read_bytes() for path in (base, Path(words[words.index("--also") + 1]))}
    output, restored = tmp_path / name, tmp_path / f"restored{Path(name).suffix}"
    done = bake("fuse", *words, "-o", output, "--keep-undo", "--json")
    assert done.code == 0, done.err
    assert done.json["undo"] == {"file": str(tmp_path / "out.undo"), "bytes": (tmp_path / "out.undo").stat().st_size}
    assert listing(output) != before
    shutil.rmtree(tmp_path / "in")
    undone = bake("undo", output, "-o", restored, "--json")
    assert undone.code == 0, undone.err
    assert listing(restored) == before
    files = {each["name"]: each["sha256"] for each in undone.json["files"]}
    assert files == {path: hashlib.sha256(content).hexdigest() for path, content in before.items()}
    assert undone.json["bytes"]["written"] == sum(map(len, before.values()))
    assert not drafts(tmp_path)


def test_the_output_is_the_same_with_and_without(tmp_path: Path) -> None:
    words = file(tmp_path)
    for name, more in (("one", ["--keep-undo"]), ("two", [])):
        assert bake("fuse", *words, "-o", tmp_path / f"{name}.safetensors", *more).code == 0
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert not (tmp_path / "two.undo").exists()


def test_a_merge_gives_its_first_model_back(tmp_path: Path) -> None:
    one, two = (save_base(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    save(two, {name: array * 2 for name, array in random_arrays(small("sd1")).items()})
    words = ["-p", "alpha=0.3", "-o", tmp_path / "out.safetensors", "--keep-undo"]
    done = bake("merge", "weighted_sum", one, two, *words)
    assert done.code == 0, done.err
    before = one.read_bytes()
    assert bake("undo", tmp_path / "out.safetensors", "-o", tmp_path / "back.safetensors").code == 0
    assert (tmp_path / "back.safetensors").read_bytes() == before


def test_from_python(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    fused = package.fuse(base, [(lora, 0.5)], tmp_path / "out.safetensors", keep_undo=True)
    assert fused.undo == tmp_path / "out.undo"
    restored = package.undo(fused.output, tmp_path / "back.safetensors")
    assert restored.files[0].sha256 == hashlib.sha256(base.read_bytes()).hexdigest()
    assert restored.output.read_bytes() == base.read_bytes()
    assert package.fuse(base, [lora], tmp_path / "two.safetensors").undo is None


def test_small_updates_take_little_room(tmp_path: Path) -> None:
    """A tenth of the untouched half is not stored at all, and of the touched one less than half."""
    shapes = {f"layers.{layer}.weight": (256, 1024) for layer in range(4)}
    base = save(
        tmp_path / "base.safetensors",
        {n: random(k, *s, spread=0.02).astype(np.float16) for k, (n, s) in enumerate(shapes.items())},
    )
    lora = peft_lora(shapes, list(shapes)[:2], prefix="")
    save(tmp_path / "lora.safetensors", {name: array * np.float32(0.02) for name, array in lora.items()})
    done = bake("fuse", base, "-l", tmp_path / "lora.safetensors", "-o", tmp_path / "out.safetensors", "--keep-undo")
    assert done.code == 0, done.err
    assert (tmp_path / "out.undo").stat().st_size < 0.5 * 2 * 256 * 1024 * 2


def test_neither_torch_nor_the_base_is_needed(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    package.fuse(base, [lora], tmp_path / "out.safetensors", keep_undo=True)
    base.unlink()
    lora.unlink()
    program = (
        "import sys, bake\n"
        "bake.undo('out.safetensors', 'back.safetensors')\n"
        "sys.exit(bool({'torch', 'safetensors', 'tqdm'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False).returncode == 0


class TestRefusals:
    @pytest.fixture
    def baked(self, tmp_path: Path) -> Path:
        """An output with its undo file, in a folder of their own."""
        base, lora, _ = sd1_pair(tmp_path)
        (tmp_path / "made").mkdir()
        package.fuse(base, [lora], tmp_path / "made" / "out.safetensors", keep_undo=True)
        return tmp_path / "made" / "out.safetensors"

    def refused(self, output: Path, code: int, says: str, *words: object, to: str = "back.safetensors") -> None:
        before = listing(output.parent)
        done = bake("undo", output, "-o", output.parent / to, *words)
        assert done.code == code, done.err
        assert says in done.err
        assert listing(output.parent) == before
        assert not drafts(output.parent)

    def test_an_output_that_changed(self, baked: Path) -> None:
        content = bytearray(baked.read_bytes())
        content[-1] ^= 1
        baked.write_bytes(content)
        self.refused(baked, 5, "does not belong to")

    def test_an_output_of_another_bake(self, baked: Path, tmp_path: Path) -> None:
        shutil.copyfile(tmp_path / "base.safetensors", baked)
        self.refused(baked, 5, "is not the file that was written then")

    def test_a_missing_undo_file(self, baked: Path) -> None:
        baked.with_name("out.undo").unlink()
        self.refused(baked, 3, "--keep-undo")

    def test_a_missing_output(self, baked: Path) -> None:
        self.refused(baked.with_name("none.safetensors"), 3, "no such file")

    def test_an_undo_file_that_is_something_else(self, baked: Path, tmp_path: Path) -> None:
        shutil.copyfile(tmp_path / "base.safetensors", baked.with_name("out.undo"))
        self.refused(baked, 3, "is no undo file")

    def test_a_place_that_is_taken(self, baked: Path) -> None:
        baked.with_name("back.safetensors").write_text("mine")
        self.refused(baked, 8, "--overwrite")
        assert bake("undo", baked, "-o", baked.with_name("back.safetensors"), "--overwrite").code == 0

    @pytest.mark.parametrize("to", ["out.safetensors", "out.undo"])
    def test_a_place_that_is_an_input(self, baked: Path, to: str) -> None:
        os.link(baked.with_name(to), baked.with_name("linked.safetensors"))
        self.refused(baked, 8, "is, or contains, the input", "--overwrite", to="linked.safetensors")

    def test_a_name_that_is_no_checkpoints(self, baked: Path) -> None:
        self.refused(baked, 2, "let its name end in .safetensors", to="back")

    def test_a_place_inside_the_output(self, tmp_path: Path) -> None:
        words = sharded(tmp_path)
        assert bake("fuse", *words, "-o", tmp_path / "out", "--keep-undo").code == 0
        self.refused(tmp_path / "out", 2, "lies inside", to="out/back")

    def test_a_file_of_the_output_is_missing(self, tmp_path: Path) -> None:
        words = sharded(tmp_path)
        assert bake("fuse", *words, "-o", tmp_path / "out", "--keep-undo").code == 0
        (tmp_path / "out" / "config.json").unlink()
        self.refused(tmp_path / "out", 5, "config.json is missing", to="back")

    def test_a_byte_that_flipped_in_the_undo_file(self, baked: Path) -> None:
        undo = baked.with_name("out.undo")
        good = undo.read_bytes()
        start = 8 + int.from_bytes(good[:8], "little")
        for place in range(start, len(good), (len(good) - start) // 25):
            undo.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
            done = bake("undo", baked, "-o", baked.with_name("back.safetensors"))
            assert done.code in (3, 9), (place, done.err)
            assert done.err.count("\n") == 1
        assert not baked.with_name("back.safetensors").exists()

    def test_a_shortened_undo_file(self, baked: Path) -> None:
        undo = baked.with_name("out.undo")
        undo.write_bytes(undo.read_bytes()[:-100])
        self.refused(baked, 3, "truncated")


class TestKeeping:
    def test_a_file_in_its_place_is_refused_before_any_work(self, tmp_path: Path) -> None:
        words = [*file(tmp_path), "-o", tmp_path / "out.safetensors", "--keep-undo"]
        (tmp_path / "out.undo").write_text("mine")
        for more in (["--dry-run"], []):
            done = bake("fuse", *words, *more)
            assert done.code == 8
            assert "out.undo exists; use --overwrite" in done.err
        assert (tmp_path / "out.undo").read_text() == "mine"
        assert not (tmp_path / "out.safetensors").exists()
        assert bake("fuse", *words, "--overwrite").code == 0
        assert not drafts(tmp_path)
        assert bake("undo", tmp_path / "out.safetensors", "-o", tmp_path / "back.safetensors").code == 0

    def test_an_undo_file_of_another_output_that_is_gone_is_kept(self, tmp_path: Path) -> None:
        words = file(tmp_path)
        assert bake("fuse", *words, "-o", tmp_path / "out.safetensors", "--keep-undo").code == 0
        kept = (tmp_path / "out.undo").read_bytes()
        (tmp_path / "out.safetensors").rename(tmp_path / "moved.safetensors")
        words[2] = f"{words[2]}:0.25"
        done = bake("fuse", *words, "-o", tmp_path / "out.safetensors", "--keep-undo")
        assert done.code == 8
        assert (tmp_path / "out.undo").read_bytes() == kept
        assert not (tmp_path / "out.safetensors").exists()
        assert not drafts(tmp_path)

    @pytest.mark.parametrize(
        ("kind", "words", "name"),
        [
            (diffusers, ["--drop", "te1"], "out"),
            (diffusers, ["--layout", "original"], "out.safetensors"),
            (sharded, ["--shard-size", "none"], "out.safetensors"),
            (sharded, ["--shard-size", "1000"], "out"),
            (file, ["--shard-size", "1000"], "out"),
        ],
    )
    def test_an_output_of_other_files_than_the_bases_is_refused(
        self, kind: Callable[[Path], Words], words: Words, name: str, tmp_path: Path
    ) -> None:
        base = kind(tmp_path)[0]
        if kind is diffusers:
            (Path(base) / "model_index.json").write_text('{"unet": ["a", "b"], "vae": ["a", "b"]}')
        done = bake("fuse", base, *words, "-o", tmp_path / name, "--keep-undo")
        assert done.code == 6
        assert "other files than" in done.err
        assert not (tmp_path / name).exists()

    def test_pickles_are_refused(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        base = tmp_path / "base.ckpt"
        tensors = {name: torch.from_numpy(array) for name, array in random_arrays(llama()).items()}
        torch.save({"state_dict": tensors}, base)
        lora = scenes._lora(tmp_path)
        done = bake("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors", "--keep-undo", "--dry-run")
        assert done.code == 6
        assert "keep the file itself" in done.err

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
    def test_names_that_not_every_system_has_are_refused(self, tmp_path: Path) -> None:
        words = sharded(tmp_path)
        (words[0] / "a:b.txt").write_text("")
        done = bake("fuse", *words, "-o", tmp_path / "out", "--keep-undo")
        assert done.code == 6
        assert "cannot hold this name" in done.err
        assert not (tmp_path / "out").exists()

    def test_undo_data_that_is_wrong_is_found_before_the_output_appears(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = differences.difference
        monkeypatch.setattr(differences, "difference", lambda *given: bytes([right(*given)[0] ^ 1]) + right(*given)[1:])
        done = bake("fuse", *file(tmp_path), "-o", tmp_path / "out.safetensors", "--keep-undo")
        assert done.code == 9
        assert "undo data" in done.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]

    def test_a_restored_file_that_is_wrong_is_not_published(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert bake("fuse", *file(tmp_path), "-o", tmp_path / "out.safetensors", "--keep-undo").code == 0
        right = differences.restored
        monkeypatch.setattr(differences, "restored", lambda *given: right(*given)[::-1])
        with pytest.raises((VerificationFailed, InputError)):
            package.undo(tmp_path / "out.safetensors", tmp_path / "back.safetensors")
        assert not (tmp_path / "back.safetensors").exists()
        assert not drafts(tmp_path)

    def test_it_tells_no_names_and_no_paths(self, tmp_path: Path) -> None:
        words = [*file(tmp_path), "--no-recipe", "-o", tmp_path / "out.safetensors", "--keep-undo"]
        assert bake("fuse", *words).code == 0
        content = (tmp_path / "out.undo").read_bytes()
        assert not any(word in content for word in (b"lora", b"base.safetensors", bytes(tmp_path)))
        record = json.loads(metadata(tmp_path / "out.undo")["bake.undo"])
        assert record["base"][0]["name"] == record["output"][0]["name"] == ""


@pytest.mark.parametrize("kind", ["file with undo data over an old one", "folder with undo data over an old one"])
def test_killed_between_the_two_renames_whichever_output_is_there_can_be_undone(
    kind: str, server: Server, tmp_path: Path
) -> None:
    scene = scenes.prepare(server, kind, tmp_path)
    before = listing(scene.template / "in" / scene.words[1].rpartition("/")[2])
    found = set()
    moments = [(each, number) for each in ("replace", "renameat2") for number in range(len(scene.calls[each]))]
    assert len(moments) >= 3, "the old undo file goes aside, the new one and the output into their places"
    for each, number in moments:
        for moment in ("before", "after"):
            folder = scene.copy(tmp_path)
            scene.run(folder, Fault(each, number, "kill", moment))
            output = folder / scene.output
            back = folder / f"back{output.suffix}"
            is_new = scene.output_of(scenes.state(folder)) == scene.output_of(scene.after)
            done = bake("undo", output, "-o", back)
            assert done.code == 0, (each, number, moment, done.err)
            assert listing(back) == before
            found.add((is_new, bool(list(folder.glob(".*.bake-old")))))
            shutil.rmtree(folder)
    assert {(False, True), (True, True)} <= found, "with the old undo file beside, of the old and of the new output"


@pytest.mark.parametrize("is_new", [False, True])
def test_a_run_that_fails_after_a_killed_one_leaves_the_undo_file_of_the_output_that_is_there(
    is_new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = file(tmp_path)
    for name in ("out", "other"):
        assert bake("fuse", *words, "-o", tmp_path / f"{name}.safetensors", "--keep-undo").code == 0
        words[2] = f"{words[2]}:0.5"
    aside = tmp_path / ".out.undo.bake-old"
    if is_new:
        (tmp_path / "other.undo").rename(aside)
    else:
        (tmp_path / "out.undo").rename(aside)
        (tmp_path / "other.undo").rename(tmp_path / "out.undo")

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    words[2] = words[2].removesuffix(":0.5")
    with monkeypatch.context() as patch:
        patch.setattr(UndoWriter, "write", full)
        done = bake("fuse", *words, "-o", tmp_path / "out.safetensors", "--keep-undo", "--overwrite")
    assert done.code == 8, done.err
    assert not drafts(tmp_path)
    assert bake("undo", tmp_path / "out.safetensors", "-o", tmp_path / "back.safetensors").code == 0
    assert listing(tmp_path / "back.safetensors") == listing(words[0])


class TestTheFormat:
    @pytest.mark.parametrize("width", [1, 2, 4, 8])
    @given(data=st.data())
    def test_differences_are_undone(self, width: int, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, 40)) * width
        stored, like = (data.draw(st.binary(min_size=count, max_size=count)) for _ in range(2))
        found = differences.difference(stored, like, width)
        assert len(found) == count
        assert differences.restored(found, like, width) == stored

    def test_small_steps_up_and_down_leave_small_words(self) -> None:
        like = np.array([0x3C00, 0x3C00, 0xBC00, 0x3BFF], "<u2")
        stored = np.array([0x3C01, 0x3BFF, 0xBC00, 0x3C00], "<u2")
        assert differences.difference(stored.tobytes(), like.tobytes(), 2) == bytes([2, 1, 0, 2, 0, 0, 0, 0])

    @pytest.mark.parametrize("how", PACKINGS)
    def test_packing_gives_back_what_was_packed_and_never_more(self, how: str) -> None:
        data = bytes(1000) + random(1, 500).tobytes()
        made = packing.packed(data, how)
        assert packing.unpacked(made, len(data), how) == data
        for wrong in (len(data) - 1, len(data) + 1, 0):
            with pytest.raises(ValueError, match="does not hold"):
                packing.unpacked(made, wrong, how)
        for damaged in (b"", made[:-1], made + b"x", b"nonsense"):
            with pytest.raises(ValueError):  # noqa: PT011 - whatever the library says
                packing.unpacked(damaged, len(data), how)

    @pytest.mark.parametrize("how", PACKINGS)
    def test_a_bomb_is_not_unpacked(self, how: str) -> None:
        import tracemalloc

        large = bytes(200 * 2**20)
        bomb = zlib.compress(large, 9) if how == "zlib" else packing.packed(large, how)
        del large
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="does not hold"):
                packing.unpacked(bomb, 1000, how)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("how", PACKINGS)
    @given(data=st.data())
    def test_any_base_comes_back_from_any_output(
        self, how: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        folder = tmp_path_factory.mktemp("any")
        base, output = folder / "base", folder / "output"
        base.write_bytes(data.draw(checkpoints(padded=True)))
        output.write_bytes(data.draw(checkpoints(padded=False)))
        undo = folder / "undo"
        undo.touch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(format, "_PIECE", 16)
            descriptor = os.open(undo, os.O_RDWR)
            UndoWriter(descriptor, how, 2, lambda count: None).write(
                [Source("", base, "", True)], lambda name: output, "1"
            )
            os.close(descriptor)
            reader = UndoReader(undo)
            assert reader.difference_to(output) is None
            assert b"".join(reader.pieces(0, lambda name: output, 2)) == base.read_bytes()
            kept = raw(undo).keys() - {"0"}
            found, there = raw(base), raw(output)
            assert kept == {f"0:{name}" for name in found if found[name][1] and found[name] != there.get(name)}


@st.composite
def checkpoints(draw: st.DrawFn, padded: bool) -> bytes:
    """A safetensors file with some of the same few tensors, in one of a few dtypes, with few different bytes."""
    entries: dict[str, Any] = {"__metadata__": {"k": draw(st.sampled_from(["", "v"]))}}
    data = b""
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True)):
        dtype, size = draw(st.sampled_from([("F16", 2), ("BF16", 2), ("F32", 4), ("I64", 8), ("U8", 1)]))
        shape = [draw(st.integers(0, 20))]
        entries[name] = entry(dtype, shape, len(data))
        data += bytes([draw(st.integers(0, 2))]) * (shape[0] * size)
    return container(entries, data, b" " * draw(st.integers(0, 3)) if padded else b"")
