"""--resume: what an earlier run finished is not done again, and the bytes are those of one run."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashing import Fault, Server
from models import llama, peft_lora
from scenes import spread
from support import Arrays, Done, bake, drafts, random, save

from bake import api
from bake.errors import NoSpace
from bake.execute import parts
from bake.execute.plain import pipeline as plain
from bake.io.draft import Draft
from bake.io.moves import remove

SHAPES = llama(layers=6)
PROJECTIONS = [name for name in SHAPES if "_proj." in name]
GOES_ON = "what is finished is kept: the same command with --resume goes on from there\n"

Words = list[Path | str]


def base_arrays() -> Arrays:
    return {name: random(place, *shape).astype(np.float16) for place, (name, shape) in enumerate(SHAPES.items())}


def lora_file(folder: Path) -> Words:
    """Plain sums: NumPy makes them."""
    base = save(folder / "base.safetensors", base_arrays())
    return ["fuse", base, "-l", save(folder / "lora.safetensors", peft_lora(SHAPES, PROJECTIONS))]


def loha_file(folder: Path) -> Words:
    """Products of products: torch makes them."""
    factors: Arrays = {}
    for place, name in enumerate(PROJECTIONS):
        height, width = SHAPES[name]
        for factor, shape in (("w1_a", (height, 2)), ("w1_b", (2, width)), ("w2_a", (height, 2)), ("w2_b", (2, width))):
            values = random(1000 + place, *shape, spread=0.5).astype(np.float32)
            factors[f"{name.removesuffix('.weight')}.hada_{factor}"] = values
    base = save(folder / "base.safetensors", base_arrays())
    return ["fuse", base, "-l", save(folder / "loha.safetensors", factors)]


def lora_folder(folder: Path) -> Words:
    """Two shards, an index and side files."""
    base, arrays, index = folder / "base", base_arrays(), {}
    for number, names in enumerate((sorted(arrays)[::2], sorted(arrays)[1::2]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save(base / shard, {name: arrays[name] for name in names})
        index |= dict.fromkeys(names, shard)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.json").write_text("{}")
    return ["fuse", base, "-l", save(folder / "lora.safetensors", peft_lora(SHAPES, PROJECTIONS))]


def many_copies(folder: Path) -> Words:
    """Every second tensor is fused, so that the others are copied one by one."""
    shapes = {f"layer{number:02}.weight": (8, 8) for number in range(60)}
    base = save(folder / "base.safetensors", {name: random(0, 8, 8).astype(np.float16) for name in shapes})
    return ["fuse", base, "-l", save(folder / "lora.safetensors", peft_lora(shapes, sorted(shapes)[::2]))]


KINDS: dict[str, tuple[Callable[[Path], Words], str]] = {
    "lora": (lora_file, "out.safetensors"),
    "loha": (loha_file, "out.safetensors"),
    "folder": (lora_folder, "out"),
}


def content(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of every file in a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}


class Scene:
    """A bake, and what an undisturbed run without --resume makes of it."""

    def __init__(self, folder: Path, kind: str) -> None:
        make, name = KINDS[kind]
        self.folder, self.output = folder, folder / name
        (folder / "in").mkdir()
        self.words = [*make(folder / "in"), "--threads", "2", "--json"]
        done = bake(*self.words, "-o", folder / f"whole {name}")
        assert done.code == 0, done.out
        self.whole = done.json
        self.expected = content(folder / f"whole {name}")
        self.draft, self.journal = folder / f".{name}.bake-draft", folder / f".{name}.bake-journal"
        assert done.json["resumed"] is None

    @property
    def order(self) -> Words:
        return [*self.words, "-o", self.output, "--resume"]

    def resume(self, *more: str) -> Done:
        return bake(*self.order, *more)

    def check(self, done: Any, **resumed: Any) -> dict[str, Any]:
        """The run went on, or started over, as `resumed` says, and its output and report are those of one run."""
        assert done.code == 0, (done.out, done.err)
        document = json.loads(done.out)
        assert content(self.output) == self.expected
        assert document["survival"] == self.whole["survival"]
        assert document["verification"] == self.whole["verification"]
        assert not drafts(self.folder)
        found: dict[str, Any] = document["resumed"]
        assert found | resumed == found
        return found

    def stop_before_the_headers(self, monkeypatch: pytest.MonkeyPatch) -> Done:
        """A run that did everything but the last step."""
        with monkeypatch.context() as patch:
            patch.setattr(api, "_write_headers", lambda *arguments: full_disk())
            return self.resume()


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(params=KINDS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Scene:
    return Scene(tmp_path, request.param)


@pytest.fixture
def lora(tmp_path: Path) -> Scene:
    return Scene(tmp_path, "lora")


@pytest.fixture
def stopped(lora: Scene, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A bake of which everything but the header is done."""
    assert lora.stop_before_the_headers(monkeypatch).code == 8
    return lora


def kills(kind: str, file: str) -> Iterator[Fault]:
    """Twenty: before, in the middle of and after writing a span, and before the journal tells of one."""
    each = [
        Fault(kind, 0, "kill", "half", where=file),
        Fault(kind, 2, "kill", "after", where=file),
        Fault("open", 3, "kill", "before", where="bake-journal"),
        Fault(kind, 1, "kill", "before", where=file),
    ]
    return itertools.islice(itertools.cycle(each), 20)


class TestKilled:
    @pytest.mark.parametrize("kind", [*KINDS, "copies"])
    def test_killed_twenty_times_and_resumed_the_bytes_are_those_of_one_run(
        self, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setitem(KINDS, "copies", (many_copies, "out.safetensors"))
        scene = Scene(tmp_path, kind)
        # With one worker nothing goes on for a moment after a kill, so every one of them hits an unfinished run.
        event, file = ("copy_file_range", "base.safetensors") if kind == "copies" else ("pwrite", "bake-draft")
        for fault in kills(event, file):
            ran = server.run(*scene.order, "--threads", 1, folder=scene.folder, fault=fault)
            assert ran.code == -signal.SIGKILL, (fault, ran)
            assert not scene.output.exists()
        found = scene.check(server.run(*scene.order, folder=scene.folder), started_over=None)
        assert found["spans"] >= 15

    @pytest.mark.parametrize(
        ("kind", "moment"), [("fsync", "before"), ("renameat2", "before"), ("posix_fallocate", "after")]
    )
    def test_killed_at_the_end_and_at_the_beginning(self, lora: Scene, server: Server, kind: str, moment: str) -> None:
        ran = server.run(*lora.order, folder=lora.folder, fault=Fault(kind, 0, "kill", moment, where="bake-draft"))
        assert ran.code == -signal.SIGKILL
        is_begun = kind != "posix_fallocate"
        found = lora.check(lora.resume(), started_over=None if is_begun else "it has no journal that can be read")
        assert bool(found["spans"]) == is_begun
        assert found["redone"] == 0

    def test_killed_after_the_rename_the_journal_that_stays_does_no_harm(self, lora: Scene, server: Server) -> None:
        fault = Fault("renameat2", 0, "kill", "after", where="out.safetensors")
        assert server.run(*lora.order, folder=lora.folder, fault=fault).code == -signal.SIGKILL
        assert content(lora.output) == lora.expected
        assert drafts(lora.folder) == [lora.journal]
        lora.check(lora.resume("--overwrite"), bytes=0, started_over="its draft is gone")

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_leaves_what_is_finished(self, lora: Scene, server: Server, number: int, code: int) -> None:
        words = [word for word in lora.order if word != "--json"]
        fault = Fault("pwrite", 8, "signal", "after", number, where="bake-draft")
        ran = server.run(*words, folder=lora.folder, fault=fault)
        assert ran.code == code, ran
        assert ran.err == f"bake: interrupted: the output is as it was before; {GOES_ON}"
        assert drafts(lora.folder) == [lora.draft, lora.journal]
        assert lora.check(lora.resume(), started_over=None)["spans"] >= 5


class TestGoingOn:
    def test_nothing_is_done_twice(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        done = scene.stop_before_the_headers(monkeypatch)
        assert done.code == 8
        assert GOES_ON.strip() in done.json["error"]["message"]
        scene.check(scene.resume(), bytes=data_bytes(scene), redone=0, started_over=None)

    def test_what_was_there_is_said(self, stopped: Scene) -> None:
        done = bake(*(word for word in stopped.order if word != "--json"))
        assert done.code == 0
        assert done.err == "resumed: 8.69 kB of 8.69 kB were there and correct\n"

    def test_with_nothing_there_it_is_a_run_like_any_other(self, lora: Scene) -> None:
        done = lora.resume()
        assert done.err == ""
        lora.check(done, bytes=0, spans=0, redone=0, started_over=None)

    def test_spans_that_the_draft_no_longer_holds_are_made_again(self, stopped: Scene) -> None:
        spans = [json.loads(line) for line in stopped.journal.read_text().splitlines()[1:]]
        content = bytearray(stopped.draft.read_bytes())
        for span in (next(each for each in spans if each["measured"]), next(s for s in spans if not s["measured"])):
            content[span["end"] - 1] ^= 1
        stopped.draft.write_bytes(content)
        done = stopped.resume()
        stopped.check(done, redone=2, spans=len(spans) - 2)
        assert done.err.endswith(" were there and correct; 2 spans were not, and were written again\n")

    @pytest.mark.parametrize("size", [10, 100_000])
    def test_a_draft_of_another_size_is_given_its_own(self, stopped: Scene, size: int) -> None:
        os.truncate(stopped.draft, size)
        stopped.check(stopped.resume(), started_over=None)

    def test_what_else_lies_in_a_folder_is_not_published(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scene = Scene(tmp_path, "folder")
        scene.stop_before_the_headers(monkeypatch)
        (scene.draft / "more").mkdir()
        (scene.draft / "more" / "thesis.txt").write_text("years of work")
        shard = scene.draft / "model-00001-of-00002.safetensors"
        shard.rename(tmp_path / "elsewhere")
        shard.symlink_to(tmp_path / "elsewhere")
        before = (tmp_path / "elsewhere").read_bytes()
        assert scene.check(scene.resume(), started_over=None)["redone"] > 10
        assert (tmp_path / "elsewhere").read_bytes() == before

    def test_embeddings_beside_are_written_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def with_token(folder: Path) -> Words:
            words = lora_file(folder)
            save(words[-1], peft_lora(SHAPES, PROJECTIONS) | {"<s1>": random(1, 768).astype(np.float32)})
            return words

        monkeypatch.setitem(KINDS, "token", (with_token, "out.safetensors"))
        scene = Scene(tmp_path, "token")
        scene.stop_before_the_headers(monkeypatch)
        assert not (tmp_path / "out.embeddings").exists()
        scene.check(scene.resume(), bytes=data_bytes(scene), started_over=None)
        assert content(tmp_path / "out.embeddings") == content(tmp_path / "whole out.embeddings")

    def test_parts_of_a_tensor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in ("lora", "loha"):
            (tmp_path / kind).mkdir()
            with monkeypatch.context() as patch:
                patch.setattr(parts, "_PART_ELEMENTS", 24)
                scene = Scene(tmp_path / kind, kind)
                scene.stop_before_the_headers(monkeypatch)
                half = scene.journal.read_text().splitlines()[::2]
                scene.journal.write_text("\n".join(half))
                assert len(half) > 80
                scene.check(scene.resume(), redone=0, spans=len(half) - 1)

    def test_new_scales_belong_to_their_tensors(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(
            KINDS, "fp8", (lambda folder: [*lora_file(folder), "--dtype", "fp8_e4m3fn_scaled"], "o.safetensors")
        )
        scene = Scene(tmp_path, "fp8")
        scene.stop_before_the_headers(monkeypatch)
        lines = scene.journal.read_text().splitlines()
        scales = [line for line in lines[1:] if json.loads(line)["end"] - json.loads(line)["begin"] == 4]
        assert len(scales) == len(PROJECTIONS)
        scene.journal.write_text("\n".join(line for line in lines if line != scales[0]))
        scene.check(scene.resume(), redone=0, started_over=None)


def data_bytes(scene: Scene) -> int:
    """Bytes of all tensors: the weight files less their headers."""
    weights = [data for name, data in scene.expected.items() if name == "" or name.endswith(".safetensors")]
    return sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in weights)


class TestStartingOver:
    """Everything that is not the same run's, with the reason."""

    def rewrite(self, scene: Scene, **changes: Any) -> None:
        header, *lines = scene.journal.read_text().splitlines()
        scene.journal.write_text("\n".join([json.dumps(json.loads(header) | changes), *lines]))

    def expect(self, scene: Scene, done: Done, reason: str) -> None:
        assert done.code == 0, done.out
        assert done.json["resumed"] == {"bytes": 0, "spans": 0, "redone": 0, "started_over": reason}
        assert done.err == f"warning: what was left of {scene.output} could not be gone on with: {reason}\n"
        assert not drafts(scene.folder)

    @pytest.mark.parametrize("text", ["", "{", "[]", "no journal", "\0" * 100, '{"schema": ' + "[" * 5000])
    def test_a_damaged_journal(self, stopped: Scene, text: str) -> None:
        stopped.journal.write_text(text)
        self.expect(stopped, stopped.resume(), "its journal is damaged")
        assert content(stopped.output) == stopped.expected

    def test_no_journal(self, stopped: Scene) -> None:
        stopped.journal.unlink()
        self.expect(stopped, stopped.resume(), "it has no journal that can be read")

    def test_a_journal_that_is_a_pipe(self, stopped: Scene) -> None:
        stopped.journal.unlink()
        os.mkfifo(stopped.journal)
        self.expect(stopped, stopped.resume(), "it has no journal that can be read")

    def test_another_version(self, stopped: Scene) -> None:
        self.rewrite(stopped, version="0.0.1")
        self.expect(stopped, stopped.resume(), "it is of another version of bake")

    def test_another_draft(self, stopped: Scene) -> None:
        shutil.copy(stopped.draft, stopped.folder / "copy")
        os.replace(stopped.folder / "copy", stopped.draft)
        self.expect(stopped, stopped.resume(), "its journal is that of another draft")

    def test_a_draft_with_another_name_is_not_written_into(self, stopped: Scene) -> None:
        other = stopped.folder / "mine"
        other.hardlink_to(stopped.draft)
        before = other.read_bytes()
        self.expect(stopped, stopped.resume(), "it is no file of its own")
        assert other.read_bytes() == before

    def test_a_draft_that_is_gone(self, stopped: Scene) -> None:
        stopped.draft.unlink()
        self.expect(stopped, stopped.resume(), "its draft is gone")

    def test_another_weight(self, stopped: Scene) -> None:
        words = [f"{word}:0.5" if str(word).endswith("lora.safetensors") else word for word in stopped.order]
        self.expect(stopped, bake(*words), "something else was asked for")
        assert content(stopped.output) != stopped.expected

    def test_another_adapter(self, stopped: Scene) -> None:
        other = stopped.folder / "in" / "other.safetensors"
        shutil.copy(stopped.folder / "in" / "lora.safetensors", other)
        self.expect(stopped, bake(*stopped.order, "-l", other), "the inputs are others")

    def test_an_input_that_changed(self, stopped: Scene) -> None:
        base = stopped.folder / "in" / "base.safetensors"
        status = base.stat()
        shutil.copy(base, stopped.folder / "copy")
        os.replace(stopped.folder / "copy", base)
        os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.expect(stopped, stopped.resume(), f"{base} changed since")

    def test_another_torch_matters_where_it_may_change_bits(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scene.stop_before_the_headers(monkeypatch)
        monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1")
        is_loha = any(str(word).endswith("loha.safetensors") for word in scene.words)
        reason = "torch, NumPy, the device or the machine is another, and may compute other last bits"
        scene.check(scene.resume(), started_over=reason if is_loha else None)

    def test_a_run_without_resume_replaces_it_and_says_so(self, stopped: Scene) -> None:
        done = bake(*(word for word in stopped.order if word != "--resume"))
        assert done.code == 0
        assert done.json["resumed"] is None
        assert "a draft that a killed run had left" in done.err
        assert not drafts(stopped.folder)


class TestStopping:
    def test_a_disk_that_is_full_in_the_middle(self, lora: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = itertools.count()

        def filling(*arguments: Any) -> None:
            if next(calls) == 20:
                full_disk()
            write(*arguments)

        write = plain.write_at
        with monkeypatch.context() as patch:
            patch.setattr(plain, "write_at", filling)
            done = bake(*(word for word in lora.order if word != "--json"))
        assert done.code == 8
        assert done.err == f"bake: {lora.output}: the disk is full; nothing was changed; {GOES_ON}"
        assert drafts(lora.folder) == [lora.draft, lora.journal]
        assert lora.check(lora.resume(), started_over=None, redone=0)["spans"] >= 18

    @pytest.mark.parametrize("kind", ["lora", "folder"])
    def test_whatever_fails_the_next_run_goes_on_or_starts_over(
        self, tmp_path: Path, server: Server, kind: str
    ) -> None:
        scene = Scene(tmp_path, kind)
        calls = server.run(*scene.order, folder=tmp_path).calls
        remove(scene.output)
        names = [name for name in dict.fromkeys(name for name, _ in calls) if "stat" not in name]
        points = [(name, number) for name in names for number in range(sum(called == name for called, _ in calls))]
        codes = []
        for place, (name, number) in enumerate(spread(points, 12)):
            fault = Fault(name, number, "fail", code=(errno.EIO, errno.ENOSPC)[place % 2])
            ran = server.run(*scene.order, folder=tmp_path, fault=fault)
            assert ran.code in (0, 3, 8, 9), (fault, ran)
            is_kept = "--resume goes on" in ran.out
            assert is_kept == bool(drafts(tmp_path)), (fault, ran)
            codes.append(ran.code)
            if ran.code == 0:
                assert content(scene.output) == scene.expected
            else:
                scene.check(server.run(*scene.order, folder=tmp_path), started_over=None)
            remove(scene.output)
        assert 8 in codes

    def test_the_second_run_at_once_is_told_and_touches_nothing(self, stopped: Scene) -> None:
        before = stopped.journal.read_bytes()
        size = stopped.draft.stat().st_size
        other = Draft(stopped.output, {"": size}, run=json.loads(before.split(b"\n")[0]))
        with contextlib.suppress(KeyboardInterrupt), other:
            done = stopped.resume()
            assert (done.code, done.json["error"]["code"]) == (8, "output-busy")
            assert stopped.journal.read_bytes() == before
            raise KeyboardInterrupt
        stopped.check(stopped.resume(), redone=0, started_over=None)

    @pytest.mark.parametrize("fault", ["number", "verification"])
    def test_a_refusal_that_would_come_again_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        scene = Scene(tmp_path, "lora")
        if fault == "number":
            save(
                tmp_path / "in" / "base.safetensors", base_arrays() | {PROJECTIONS[-1]: np.full((8, 20), np.nan, "f2")}
            )
        else:
            monkeypatch.setattr(api, "_write_headers", lambda *arguments: None)
        done = scene.resume()
        assert done.code == (7 if fault == "number" else 9)
        assert "--resume" not in done.json["error"]["message"]
        assert not drafts(tmp_path)

    def test_an_input_that_changes_on_the_way_leaves_nothing(
        self, lora: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = api._write_headers

        def changing(*arguments: Any) -> None:
            write(*arguments)
            (lora.folder / "in" / "base.safetensors").touch()

        monkeypatch.setattr(api, "_write_headers", changing)
        done = lora.resume()
        assert (done.code, done.json["error"]["code"]) == (3, "input-changed")
        assert not drafts(lora.folder)

    def test_a_run_that_finished_nothing_leaves_nothing(self, lora: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: full_disk())
        done = lora.resume()
        assert done.code == 8
        assert "--resume" not in done.json["error"]["message"]
        assert not drafts(lora.folder)

    def test_no_journal_is_kept_that_nobody_asked_for(self, lora: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[list[Path]] = []
        monkeypatch.setattr(api, "_write_headers", lambda *arguments: [seen.append(drafts(lora.folder)), full_disk()])
        done = bake(*(word for word in lora.order if word != "--resume"))
        assert "--resume" not in done.json["error"]["message"]
        assert seen == [[lora.draft]]
        assert not drafts(lora.folder)

    def test_in_python(self, stopped: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        base, adapter = stopped.folder / "in" / "base.safetensors", stopped.folder / "in" / "lora.safetensors"
        with monkeypatch.context() as patch:
            patch.setattr(api, "_write_headers", lambda *arguments: full_disk())
            with pytest.raises(NoSpace, match="--resume"):
                api.fuse(base, [adapter], stopped.output, resume=True)
        result = api.fuse(base, [adapter], stopped.output, resume=True)
        assert result.resumed is not None
        assert result.resumed.bytes == result.plan.data_bytes
        assert content(stopped.output) == stopped.expected
