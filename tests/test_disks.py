"""Real disks that are full, limited or read-only, and files too large for 32 bits."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models import sd1_pair
from support import ROOT, bake, drafts, lora_delta, save

from bake.io.header import build_header, lay_out

MIB, GIB = 2**20, 2**30


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for half an output."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "none", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs Linux and root")
class TestSmallDisks:
    def test_no_space_is_known_before_any_work(self, small_disk: Path, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        done = bake("fuse", base, "-l", lora, "-o", small_disk / "out.safetensors", "--json")
        assert done.code == 8
        assert done.json["error"]["code"] == "no-space"
        assert not list(small_disk.iterdir())

    @pytest.mark.parametrize("reserves", [True, False])
    def test_a_disk_that_fills_up_meanwhile(
        self, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserves: bool
    ) -> None:
        """Somebody else took the space after it was counted; with and without a file system that reserves it."""
        base, lora, _ = sd1_pair(tmp_path)
        output = small_disk / "out.safetensors"
        output.write_bytes(b"old")
        plenty = type(shutil.disk_usage(tmp_path))(GIB, 0, GIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
        if not reserves:
            monkeypatch.delattr(os, "posix_fallocate")
        done = bake("fuse", base, "-l", lora, "-o", output, "--overwrite", "--json")
        assert done.code == 8
        assert done.json["error"]["code"] == "no-space"
        assert "the disk is full; nothing was changed" in done.json["error"]["message"]
        assert [path.name for path in small_disk.iterdir()] == ["out.safetensors"]
        assert output.read_bytes() == b"old"

    def test_a_disk_that_becomes_read_only_is_a_refusal(self, small_disk: Path, tmp_path: Path) -> None:
        base, lora, _ = sd1_pair(tmp_path)
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        for command in ("plan", "fuse"):
            done = bake(command, base, "-l", lora, "-o", small_disk / "out.safetensors")
            assert done.code == 8
            assert "read-only" in done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_result_that_nobody_can_read_does_not_undo_the_output(tmp_path: Path, options: tuple[str, ...]) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    output = tmp_path / "out.safetensors"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bake", "fuse", base, "-l", lora, "-o", output, *options],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode in (1, 8)
    assert "Traceback" not in done.stderr
    assert output.exists()
    assert bake("verify", output).code == 0


def test_a_limit_on_the_size_of_files_is_a_refusal(tmp_path: Path) -> None:
    """What ulimit -f sets, and what FAT has by nature."""
    base, lora, _ = sd1_pair(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "bake", "fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 8
    assert "File too large" in done.stderr
    assert not (tmp_path / "out.safetensors").exists()
    assert not drafts(tmp_path)


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A folder on a disk that keeps holes, with room for what is written from them."""
    probe = tmp_path / "probe"
    with probe.open("wb") as file:
        file.truncate(64 * MIB)
    if getattr(probe.stat(), "st_blocks", 1) * 512 > MIB:
        pytest.skip("this file system keeps no holes in files")
    probe.unlink()
    if shutil.disk_usage(tmp_path).free < 16 * GIB:
        pytest.skip("tensors of gigabytes need 16 GB of free disk")
    return tmp_path


@pytest.mark.big
def test_tensors_over_2_and_spans_over_4_gib_are_read_and_copied_whole(sparse: Path) -> None:
    """Mostly holes: marks at the ends and at the borders of 31 and 32 bits show that nothing is cut or wraps."""
    height, width = 1024, 1024 * 1024 + 512  # more than 2 GiB in fp16
    shapes = {"a.weight": (height, width), "b.weight": (height, width), "d.weight": (8, 8)}
    placed = lay_out((name, "F16", shape) for name, shape in shapes.items())
    header = build_header(placed, {"format": "pt"})
    base = sparse / "base.safetensors"
    size = max(info.end for info in placed.values())
    assert size > 4 * GIB
    marks = sorted({0, 2 * GIB - 4, 2 * GIB, 4 * GIB - 4, 4 * GIB, 4 * GIB + 8, size - 64, size - 4})
    with base.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
        for place, offset in enumerate(marks):
            file.seek(len(header) + offset)
            file.write(np.array([place + 1, -place], np.float16).tobytes())
    up, down = np.full((8, 1), 0.5, np.float16), np.full((1, 8), 0.25, np.float16)
    lora = save(sparse / "lora.safetensors", {"d.lora_up.weight": up, "d.lora_down.weight": down})
    output = sparse / "out.safetensors"
    done = bake("fuse", base, "-l", lora, "-o", output, "--no-recipe", "--json")
    assert done.code == 0, done
    with output.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(length))
        start = 8 + length
        assert output.stat().st_size == start + size
        assert {name: tuple(found[name]["data_offsets"]) for name in shapes} == {
            name: (info.begin, info.end) for name, info in placed.items()
        }
        d = placed["d.weight"]
        for place, offset in enumerate(marks):
            if not d.begin - 4 < offset < d.end:
                file.seek(start + offset)
                np.testing.assert_array_equal(np.frombuffer(file.read(4), np.float16), [place + 1, -place])
        file.seek(start + d.begin)
        fused = np.frombuffer(file.read(128), np.float16).reshape(8, 8)
    expected = np.zeros((8, 8), np.float16)
    for place, offset in enumerate(marks):
        if d.begin <= offset < d.end:
            expected.reshape(-1)[(offset - d.begin) // 2 :][:2] = [place + 1, -place]
    np.testing.assert_array_equal(fused, (expected + lora_delta(up, down)).astype(np.float16))


@pytest.mark.big
def test_a_tensor_over_2_gib_is_fused_to_its_last_element(sparse: Path) -> None:
    height, width = 1_100_000, 1024
    placed = lay_out([("a.weight", "F16", (height, width))])
    header = build_header(placed, {"format": "pt"})
    base = sparse / "base.safetensors"
    with base.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + placed["a.weight"].nbytes)
    rows = np.arange(height) % 64 / 64
    up, down = rows[:, None].astype(np.float16), (np.arange(width) % 7).astype(np.float16)[None]
    lora = save(sparse / "lora.safetensors", {"a.lora_up.weight": up, "a.lora_down.weight": down})
    output = sparse / "out.safetensors"
    done = bake("fuse", base, "-l", lora, "-o", output, "--no-recipe", "--verify", "none")
    assert done.code == 0, done
    fused = np.memmap(output, np.float16, "r", len(header), (height, width))
    assert placed["a.weight"].nbytes > 2 * GIB
    for first in (*range(0, height, 40 * 4096), height - 4096):  # some of the rows, the last ones among them
        expected = (up[first : first + 4096].astype(np.float64) * down).astype(np.float16)
        np.testing.assert_array_equal(fused[first : first + 4096], expected)
