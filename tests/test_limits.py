"""At the limits: little memory, few open files, many tensors and shards, strange names, no permission to write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from headers import write_header
from models import llama, lora_factors, peft_lora, random_arrays, sd1_pair
from names import small
from support import ROOT, Done, bake, bake_process, drafts, load, lora_delta, metadata, random, rounded, save

from bake.io.neighbours import neighbour

# Runs bake with limits of its own: bytes of memory beyond what the libraries take, open files; "whole" takes
# tensors whole instead of in chunks.
LIMITED = """
import os, pathlib, re, resource, sys, threading
memory, files, chunks, *words = sys.argv[1:]
if memory != "-":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as the program does
    import numpy, safetensors.numpy, torch
    import bake.execute.chunk, bake.execute.pipeline, bake.verify.numeric
    from bake.execute.plain import pipeline
    torch.ones(4, 4) @ torch.ones(4, 4)
    numpy.ones((500, 500)) @ numpy.ones((500, 500))
    threading.stack_size(512 * 1024)
    data = re.search(r"VmData:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())
    resource.setrlimit(resource.RLIMIT_DATA, (int(data[1]) * 1024 + int(memory),) * 2)
    if chunks == "whole":
        bake.execute.chunk.CHUNK_ELEMENTS = pipeline._BLOCK_ELEMENTS = 2**40
        pipeline._BYTES_PER_ELEMENT = 1
if files != "-":
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(files),) * 2)
from bake.cli import main
main(words)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits are set as Linux does it")
FEW_FILES = 64
HEADROOM = 64 * 2**20  # bytes


def limited(*words: object, memory: int | str = "-", files: int | str = "-", chunks: str = "small") -> Done:
    finished = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, (memory, files, chunks, *words))],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    return Done(finished.returncode, finished.stdout, finished.stderr)


def of_layers(count: int) -> dict[str, tuple[int, ...]]:
    """Two tensors for each layer of a language model."""
    return {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(count)
        for name, shape in (("self_attn.q_proj", (4, 4)), ("input_layernorm", (4,)))
    }


def write_shards(folder: Path, count: int) -> tuple[Path, Path]:
    """(folder of as many shards as layers, a LoRA for all of them)."""
    shapes, weight_map = of_layers(count), {}
    names = list(shapes)
    for number in range(count):
        shard = f"model-{number + 1:05}-of-{count:05}.safetensors"
        inside = names[2 * number : 2 * number + 2]
        write_header(folder / "base" / shard, {name: ("BF16", shapes[name]) for name in inside})
        weight_map.update(dict.fromkeys(inside, shard))
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    return folder / "base", save(folder / "lora.safetensors", peft_lora(shapes, names[::2]))


class TestMemory:
    @pytest.fixture
    def large(self, tmp_path: Path) -> tuple[Path, Path, dict[str, tuple[int, ...]]]:
        """A base of ten times HEADROOM, one of its tensors of 160 MiB, and a LoRA for half of it."""
        shapes = {
            "model.layers.9.mlp.up_proj.weight": (16384, 5120),
            **{f"model.layers.{number}.self_attn.q_proj.weight": (2560, 4096) for number in range(25)},
        }
        base = write_header(tmp_path / "base.safetensors", {name: ("BF16", shape) for name, shape in shapes.items()})
        lora = save(tmp_path / "lora.safetensors", peft_lora(shapes, list(shapes)[:9]))
        assert base.stat().st_size > 10 * HEADROOM
        return base, lora, shapes

    @linux
    def test_a_base_of_ten_times_the_memory_is_fused(self, large, tmp_path: Path) -> None:
        from safetensors import safe_open

        base, lora, shapes = large
        output = tmp_path / "out.safetensors"
        words = ("fuse", base, "-l", lora, "-o", output, "--memory", "48MiB", "--json")
        done = limited(*words, memory=HEADROOM)
        assert done.code == 0, done.err + done.out
        assert done.json["verification"]["ok"]
        factors = load(lora)
        with safe_open(output, "pt") as written:
            for place, name in enumerate(list(shapes)[:9]):
                module = f"base_model.model.{name.removesuffix('.weight')}"
                rows = slice(100 * place, 100 * place + 3)  # of a base that is zero
                exact = factors[f"{module}.lora_B.weight"][rows] @ factors[f"{module}.lora_A.weight"]
                found = written.get_slice(name)[rows].double().numpy()
                assert np.all(np.abs(found - exact) <= 2.0**-8 * np.abs(exact)), name

    @linux
    def test_the_limit_is_one_that_whole_tensors_exceed(self, large, tmp_path: Path) -> None:
        base, lora, _ = large
        output = tmp_path / "out.safetensors"
        done = limited("fuse", base, "-l", lora, "-o", output, memory=HEADROOM, chunks="whole")
        assert done.code == 2, done.err
        assert "no more memory" in done.err
        assert not output.exists()
        assert not drafts(tmp_path)


class TestManyFiles:
    @linux
    def test_more_shards_than_files_may_be_open(self, tmp_path: Path) -> None:
        base, lora = write_shards(tmp_path, 150)
        done = limited("fuse", base, "-l", lora, "-o", tmp_path / "out", "--json", files=FEW_FILES)
        assert done.code == 0, done.err + done.out
        assert done.json["tensors"] == {"fused": 150, "merged": 0, "grown": 0, "converted": 0, "copied": 150}
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == 150
        report = limited("verify", tmp_path / "out", "--full", "--json", files=FEW_FILES)
        assert report.code == 0, report.err + report.out
        assert report.json["ok"]
        assert report.json["elements"] == 150 * 16

    @linux
    @pytest.mark.parametrize(("count", "layers"), [(60, 100), (100, 5000)])
    def test_many_adapters_and_many_tensors(self, tmp_path: Path, count: int, layers: int) -> None:
        shapes = of_layers(layers)
        base = write_header(tmp_path / "base.safetensors", {name: ("BF16", shape) for name, shape in shapes.items()})
        words: list[object] = []
        for number in range(count):
            name = f"model.layers.{number}.self_attn.q_proj.weight"
            words += ["-l", save(tmp_path / f"{number}.safetensors", peft_lora(shapes, [name], rank=1 + number % 3))]
        done = limited("fuse", base, *words, "-o", tmp_path / "out.safetensors", "--json", files=FEW_FILES)
        assert done.code == 0, done.err + done.out
        assert done.json["tensors"]["fused"] == count
        assert done.json["tensors"]["copied"] == 2 * layers - count

    def test_what_is_known_of_thousands_of_files_is_read_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from bake.io import known
        from bake.io.digest import known_digests

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
        monkeypatch.setattr(known, "_SETTLED", 0)
        paths = [tmp_path / str(number) for number in range(20)]
        for path in paths:
            path.write_text(path.name)
        reads: list[None] = []
        read = known._read
        monkeypatch.setattr(known, "_read", lambda: reads.append(None) or read())
        first = list(known_digests(paths))
        assert len(reads) == 2  # at the start, and for what others wrote before it is written
        assert list(known_digests(paths)) == first


NAMES = {
    "255 bytes": "x" * 243 + ".safetensors",
    "255 bytes of two each": "é" * 121 + "x.safetensors",
    "composed": "\u00e9.safetensors",
    "decomposed": "e\u0301.safetensors",
    "emoji": "\U0001f3a8 style.safetensors",
    "spaces": " at both ends .safetensors",
    "a new line": "two\nlines.safetensors",
    "colons": "a:0.5:b.safetensors",
    "a dash": "-o.safetensors",
    "format": "100%{x}%s.safetensors",
    "no unicode": os.fsdecode(b"\xff\xfe.safetensors"),
}
IN_A_PROCESS = NAMES["no unicode"]  # with a real stdout


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the file system has rules for names")
class TestNames:
    @pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
    def test_files_of_any_name(self, tmp_path: Path, name: str) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        for each in (base, lora):
            (tmp_path / each.stem).mkdir()
            each.rename(tmp_path / each.stem / name)
        (tmp_path / "out").mkdir()
        base, lora, output = (tmp_path / folder / name for folder in ("base", "style", "out"))
        run = bake_process if name == IN_A_PROCESS else bake
        done = run("fuse", base, "-l", f"{lora}:0.5", "-o", output, "--json")
        assert done.code == 0, done.err + done.out
        assert done.json["output"] == str(output)
        assert list((tmp_path / "out").iterdir()) == [output]
        assert json.loads(metadata(output)["bake.recipe"])["adapters"][0]["weight"] == 0.5
        for words in (("verify", output, "--search", tmp_path), ("inspect", output), ("inspect", output, "--json")):
            done = run(*words)
            assert done.code == 0, (words, done)
        missing = run("fuse", base, "-l", f"{lora}-missing:0.5", "-o", output, "--json")
        assert missing.code == 3
        assert missing.json["error"]["message"]

    def test_a_base_folder_of_a_long_name_and_its_draft(self, tmp_path: Path) -> None:
        base, lora = write_shards(tmp_path, 2)
        output = tmp_path / ("é" * 127)
        for _ in range(2):
            done = bake("fuse", base, "-l", lora, "-o", output, "--overwrite")
            assert done.code == 0, done
        assert sorted(tmp_path.iterdir()) == sorted((base, lora, output))

    def test_a_draft_is_called_like_its_output_as_far_as_names_go(self) -> None:
        assert neighbour(Path("a/out.safetensors"), ".bake-draft") == Path("a/.out.safetensors.bake-draft")
        long, other = ("é" * 121 + end + ".safetensors" for end in "xy")
        shortened = neighbour(Path("a") / long, ".bake-draft")
        assert len(os.fsencode(shortened.name)) <= 255
        assert shortened.name.startswith(".ééé")
        assert shortened.name.endswith(".bake-draft")
        assert shortened != neighbour(Path("a") / other, ".bake-draft")

    @pytest.mark.parametrize("words", [["inspect"], ["plan"], ["verify"]], ids=" ".join)
    @pytest.mark.parametrize("name", ["x" * 300, "loop", "file/inside"])
    def test_what_no_file_can_be_called_is_unreadable_input(self, tmp_path: Path, words: list[str], name: str) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "file").touch()
        more = [["-l", str(lora)]] if words == ["plan"] else [[]]
        for rest in more:
            done = bake(*words, tmp_path / name, *rest)
            assert done.code == 3, done
        assert bake("plan", base, "-l", tmp_path / name).code == 3

    def test_an_output_name_that_is_too_long_is_refused(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        done = bake("fuse", base, "-l", lora, "-o", tmp_path / ("x" * 300 + ".safetensors"))
        assert done.code == 8
        assert "name too long" in done.err

    def test_metadata_that_is_no_unicode_is_refused(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        done = bake_process("plan", base, "-l", lora, "--metadata", os.fsdecode(b"key=\xff"))
        assert done.code == 2
        assert "no Unicode" in done.err


def test_tensor_names_of_ten_thousand_letters(tmp_path: Path) -> None:
    middle = "x" * 10_000
    names = [f"model.layers.0.{middle}.q_proj.weight", f"model.layers.0.{middle[:-1]}y.q_proj.weight"]
    arrays = {name: random(place, 8, 8).astype(np.float16) for place, name in enumerate(names)}
    base = save(tmp_path / "base.safetensors", arrays)
    lora = save(tmp_path / "lora.safetensors", peft_lora(dict.fromkeys(names, (8, 8)), names[:1]))
    output = tmp_path / "out.safetensors"
    assert bake("fuse", base, "-l", lora, "-o", output).code == 0
    up, down = lora_factors((8, 8), 2, 0, np.float32)
    exact = rounded(arrays[names[0]].astype(np.float64) + lora_delta(up, down), np.float16)
    assert np.array_equal(load(output)[names[0]], exact)
    assert np.array_equal(load(output)[names[1]], arrays[names[1]])
    assert bake("inspect", lora, "--against", base).code == 0


NINES = "9" * 5000
NUMBERED = (
    f"model.diffusion_model.input_blocks.{NINES}.1.proj_in.weight",
    f"cond_stage_model.transformer.text_model.encoder.layers.{NINES}.mlp.fc1.weight",
    f"model.layers.0.mlp.experts.{NINES}.gate_proj.weight",
    "model.layers.0.mlp.experts.\u00b2.gate_proj.weight",
)


def test_numbers_in_names_that_python_does_not_read(tmp_path: Path) -> None:
    _, lora, _ = sd1_pair(tmp_path)
    arrays = random_arrays(small("sd1"))
    for name in NUMBERED:
        base = save(tmp_path / "base.safetensors", {**arrays, name: np.zeros((4, 4), np.float16)})
        assert bake("plan", base, "-l", lora).code == 0, name[:50]
        assert bake("inspect", base).code == 0, name[:50]


class TestPlaces:
    @pytest.fixture
    def locked(self, tmp_path: Path) -> Iterable[Path]:
        """A folder with base and LoRA, none of which may be written."""
        folder = tmp_path / "locked"
        folder.mkdir()
        sd1_pair(folder)
        for path in (*folder.iterdir(), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write everywhere")
        yield folder
        folder.chmod(0o755)

    def test_inputs_that_may_only_be_read(self, locked: Path, tmp_path: Path) -> None:
        base, lora = locked / "base.safetensors", locked / "style.safetensors"
        assert bake("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors").code == 0
        done = bake("fuse", base, "-l", lora, "-o", locked / "out.safetensors")
        assert done.code == 8
        assert "no permission" in done.err

    def test_a_side_file_that_may_only_be_read_can_be_replaced_later(self, tmp_path: Path) -> None:
        base, lora = write_shards(tmp_path, 2)
        for path in base.iterdir():
            path.chmod(0o444)
        for _ in range(2):
            assert bake("fuse", base, "-l", lora, "-o", tmp_path / "out", "--overwrite").code == 0

    def test_relative_paths_and_relative_links(self, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        (tmp_path / "blobs").mkdir()
        (tmp_path / "here").mkdir()
        (tmp_path / "there").mkdir()
        for each in (base, lora):
            each.rename(tmp_path / "blobs" / each.stem)
            (tmp_path / "here" / each.name).symlink_to(Path("..") / "blobs" / each.stem)
        (tmp_path / "here" / "out.safetensors").symlink_to(Path("..") / "there" / "real.safetensors")
        words = ("fuse", "base.safetensors", "-l", "./style.safetensors:0.5", "-o", "out.safetensors")
        done = bake_process(*words, cwd=tmp_path / "here")
        assert done.code == 0, done
        assert (tmp_path / "here" / "out.safetensors").is_symlink()
        assert [path.name for path in (tmp_path / "there").iterdir()] == ["real.safetensors"]
        assert bake_process("verify", "out.safetensors", cwd=tmp_path / "here").code == 0
        refused = bake_process(*words[:-1], "../here/base.safetensors", "--overwrite", cwd=tmp_path / "here")
        assert refused.code == 8

    def test_a_link_to_a_folder_of_shards(self, tmp_path: Path) -> None:
        write_shards(tmp_path, 2)
        (tmp_path / "link").symlink_to("base")
        done = bake_process("fuse", "link", "-l", "lora.safetensors", "-o", "out", cwd=tmp_path)
        assert done.code == 0, done
        refused = bake_process("fuse", "link", "-l", "lora.safetensors", "-o", "base", "--overwrite", cwd=tmp_path)
        assert refused.code == 8


def test_a_model_of_empty_and_of_scalar_tensors(tmp_path: Path) -> None:
    shapes = llama()
    arrays = random_arrays(shapes) | {
        "empty": np.zeros((0, 3), np.float16),
        "scalar": np.array(1.5, np.float16),
        "flat": np.zeros((1,) * 32, np.float16),
    }
    base = save(tmp_path / "base.safetensors", arrays)
    lora = save(tmp_path / "lora.safetensors", peft_lora(shapes, ["model.layers.0.self_attn.q_proj.weight"]))
    output = tmp_path / "out.safetensors"
    assert bake("fuse", base, "-l", lora, "-o", output, "--verify", "full").code == 0
    assert {name: array.shape for name, array in load(output).items()} == {n: a.shape for n, a in arrays.items()}
