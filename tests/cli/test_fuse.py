"""bake fuse, as typed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from models import SD1_MODULES, UNET, random_arrays, save_base, sd1_pair
from names import small
from support import DIFFUSERS_LORA, KOHYA_LORA, ROOT, SD1_BASE, bake, bake_process, drafts, load, raw, save


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base, lora, _ = sd1_pair(tmp_path)
    return base, lora


def test_one_command_fuses_and_says_what_happened(pair, tmp_path: Path) -> None:
    base, lora = pair
    done = bake("fuse", base, "-l", f"{lora}:0.8", "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    for text in ("Stable Diffusion 1 (sd1)", "at 0.8: kohya names", "unet 5/5, te 1/1", "6 tensors fused", "identical"):
        assert text in done.out
    assert done.err == ""
    assert (tmp_path / "out.safetensors").is_file()


def test_two_dialects_and_the_prompt_give_the_same_as_options(tmp_path: Path) -> None:
    options = bake(
        "fuse", SD1_BASE, "-l", f"{KOHYA_LORA}:0.8", "-l", f"{DIFFUSERS_LORA}:-0.5", "-o", tmp_path / "a.safetensors"
    )
    prompt = "a lighthouse, <lora:watercolour:0.8>, <lora:fine lines:-0.5>, sunset"
    from_prompt = bake(
        "fuse", SD1_BASE, "--prompt", prompt, "--lora-dir", KOHYA_LORA.parent, "-o", tmp_path / "b.safetensors"
    )
    assert (options.code, from_prompt.code) == (0, 0)
    assert "a lighthouse, sunset" in from_prompt.out
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_json_is_one_document_with_stable_keys(pair, tmp_path: Path) -> None:
    base, lora = pair
    done = bake("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors", "--json")
    found = done.json
    assert {
        *("schema", "output", "family", "components", "unmatched", "skipped", "tensors"),
        *("survival", "bytes", "seconds"),
    } <= set(found)
    assert found["output"] == str(tmp_path / "out.safetensors")
    assert found["components"] == {"unet": {"matched": 5, "total": 5}, "te1": {"matched": 1, "total": 1}}
    assert found["tensors"]["fused"] == 6
    assert found["tensors"]["copied"] == len(small("sd1")) - 6
    assert found["bytes"]["written"] == (tmp_path / "out.safetensors").stat().st_size
    assert found["survival"].keys() == {"unet", "te1"}
    assert found["verification"]["ok"] is True


def test_quiet_says_nothing(pair, tmp_path: Path) -> None:
    base, lora = pair
    done = bake("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors", "-q")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_dry_run_writes_nothing_and_checks_the_place(pair, tmp_path: Path) -> None:
    base, lora = pair
    done = bake("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors", "--dry-run", "--json", "-v")
    assert done.code == 0
    assert len(done.json["plan"]["files"][0]["tensors"]) == len(small("sd1"))
    assert not (tmp_path / "out.safetensors").exists()
    (tmp_path / "out.safetensors").write_bytes(b"old")
    assert bake("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors", "--dry-run").code == 8


def test_weights_of_te_and_unet(pair, tmp_path: Path) -> None:
    base, lora = pair
    done = bake("fuse", base, "-l", f"{lora}:1:te=0:unet=0.5", "-o", tmp_path / "out.safetensors")
    assert "1 modules of te1 (style.safetensors): its weight is 0" in done.out
    before, after = raw(base), raw(tmp_path / "out.safetensors")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in SD1_MODULES.values() if name.startswith(UNET)}


def test_a_rounded_away_update_is_warned_of(pair, tmp_path: Path) -> None:
    base, lora = pair
    done = bake("fuse", base, "-l", f"{lora}:1e-6", "-o", tmp_path / "out.safetensors")
    assert done.code == 0
    assert "survived the rounding" in done.err
    assert "--dtype fp32" in done.err


def test_the_same_lora_twice_in_a_prompt_is_added_and_said(tmp_path: Path) -> None:
    prompt = "<lora:watercolour:0.5> x <lora:watercolour:0.3> <hypernet:y:1>"
    done = bake("fuse", SD1_BASE, "--prompt", prompt, "--lora-dir", KOHYA_LORA.parent, "-o", tmp_path / "a.safetensors")
    assert "is in the prompt 2 times" in done.err
    assert "<hypernet:y:1> is not a LoRA tag" in done.err
    one = bake("fuse", SD1_BASE, "-l", f"{KOHYA_LORA}:0.8", "-o", tmp_path / "b.safetensors")
    assert (done.code, one.code) == (0, 0)
    for name, values in load(tmp_path / "a.safetensors").items():
        np.testing.assert_allclose(values, load(tmp_path / "b.safetensors")[name], atol=1e-3)


class TestExitCodes:
    """Each refusal with its code, one message, no traceback, and nothing written."""

    def refuse(self, tmp_path: Path, code: int, *words: object, says: str = "") -> None:
        output = tmp_path / "out.safetensors"
        done = bake("fuse", *words, "-o", output)
        assert done.code == code, done.err
        assert done.out == ""
        assert says in done.err
        assert "Traceback" not in done.err
        as_json = bake("fuse", *words, "-o", output, "--json")
        assert as_json.code == as_json.json["error"]["exit"] == code
        assert {"code", "exit", "message", "details"} == set(as_json.json["error"])
        assert not output.exists()
        assert not drafts(tmp_path)

    def test_2_usage(self, pair, tmp_path: Path) -> None:
        base, lora = pair
        self.refuse(tmp_path, 2, base, says="nothing to fuse")
        self.refuse(tmp_path, 2, base, "-l", f"{lora}:0.5:0.6", says="two weights")
        self.refuse(tmp_path, 2, base, "-l", f"{lora}:nan", says="finite")
        self.refuse(tmp_path, 2, base, "-l", f"{lora}:lbx=MIDD", says="unknown setting lbx=")
        self.refuse(tmp_path, 2, base, "-l", lora, "--no-such-option", says="No such option")
        self.refuse(tmp_path, 2, base, "-l", lora, "--dtype", "fp12")
        self.refuse(tmp_path, 2, base, "-l", lora, "--device", "cuda:77", says="--device cuda:77")
        self.refuse(tmp_path, 2, base, "-l", lora, "--memory", "lots", says="not a size")
        self.refuse(tmp_path, 2, base, "-l", lora, "--metadata", "novalue", says="KEY=VALUE")
        self.refuse(tmp_path, 2, base, "--prompt", "<lora:x>", says="--lora-dir")
        self.refuse(tmp_path, 2, base, "--prompt", "<lora:stile>", "--lora-dir", tmp_path, says="'style'")
        self.refuse(tmp_path, 2, base, "-l", lora, "--lora-dir", tmp_path, says="--prompt")

    def test_3_unreadable(self, pair, tmp_path: Path) -> None:
        base, lora = pair
        (tmp_path / "page.safetensors").write_text("<html>404</html>")
        self.refuse(tmp_path, 3, tmp_path / "none.safetensors", "-l", lora, says="no such file")
        self.refuse(tmp_path, 3, base, "-l", tmp_path / "page.safetensors", says="not a safetensors file")

    def test_4_unmatched(self, pair, tmp_path: Path) -> None:
        _, lora = pair
        unet = save(tmp_path / "u.safetensors", random_arrays({n: s for n, s in small("sd1").items() if UNET in n}))
        self.refuse(tmp_path, 4, unet, "-l", lora, says="--only unet")

    def test_5_mismatch(self, pair, tmp_path: Path) -> None:
        _, lora = pair
        sdxl = save_base(tmp_path / "xl.safetensors", "sdxl")
        self.refuse(tmp_path, 5, sdxl, "-l", lora, says="Stable Diffusion XL")

    def test_6_unsupported(self, pair, tmp_path: Path) -> None:
        base, _ = pair
        inversion = save(tmp_path / "words.safetensors", {"emb_params": np.ones((2, 8), np.float32)})
        self.refuse(tmp_path, 6, base, "-l", inversion, says="textual inversion")

    def test_7_non_finite(self, pair, tmp_path: Path) -> None:
        base, lora = pair
        self.refuse(tmp_path, 7, base, "-l", f"{lora}:1e7", says="F16 ends at 65504")

    def test_8_output(self, pair, tmp_path: Path) -> None:
        base, lora = pair
        done = bake("fuse", base, "-l", lora, "-o", base, "--overwrite")
        assert done.code == 8
        assert "input" in done.err
        (tmp_path / "old.safetensors").write_bytes(b"old")
        assert bake("fuse", base, "-l", lora, "-o", tmp_path / "old.safetensors").code == 8
        assert (tmp_path / "old.safetensors").read_bytes() == b"old"
        assert bake("fuse", base, "-l", lora, "-o", tmp_path / "no" / "x.safetensors").code == 8
        assert bake("fuse", base, "-l", lora, "-o", tmp_path / "x.ckpt").code == 2

    def test_1_a_bug_is_called_one(self, pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base, lora = pair
        monkeypatch.setattr("bake.api.plan_recipe", lambda recipe: 1 / 0)
        self.refuse(tmp_path, 1, base, "-l", lora, says="a bug in bake: ZeroDivisionError")


def test_overwrite_replaces(pair, tmp_path: Path) -> None:
    base, lora = pair
    (tmp_path / "out.safetensors").write_bytes(b"old")
    assert bake("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors", "--overwrite").code == 0
    assert load(tmp_path / "out.safetensors")


def test_what_a_killed_run_left_is_named(pair, tmp_path: Path) -> None:
    base, lora = pair
    (tmp_path / ".out.safetensors.bake-draft").write_bytes(b"rest")
    done = bake("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors")
    assert done.code == 0
    assert "a draft that a killed run had left" in done.err
    assert not drafts(tmp_path)


def test_paths_with_spaces_colons_and_umlauts(tmp_path: Path) -> None:
    folder = tmp_path / "a b:0.5 ü"
    base, lora, _ = sd1_pair(folder)
    renamed = lora.rename(folder / "style: 0.8=x.safetensors")
    done = bake("fuse", base, "-l", f"{renamed}:0.5:te=1", "-o", folder / "o:1.safetensors")
    assert done.code == 0, done.err
    assert "at 0.5 (te 1)" in done.out


def test_metadata_and_no_recipe(pair, tmp_path: Path) -> None:
    base, lora = pair
    words = ("fuse", base, "-l", lora, "-o", tmp_path / "out.safetensors", "--no-recipe", "--metadata", "author=me=you")
    assert bake(*words).code == 0
    found = bake("inspect", tmp_path / "out.safetensors", "--json").json
    assert found["recipe"] is None
    assert found["metadata"]["author"] == "me=you"


def test_a_fresh_process_prints_json_alone_on_stdout(pair, tmp_path: Path) -> None:
    base, lora = pair
    done = bake_process("fuse", base, "-l", lora, "-o", "out.safetensors", "--json", cwd=tmp_path)
    assert done.code == 0
    assert json.loads(done.out)["family"] == "sd1"
    assert done.err == ""


def test_options_come_from_the_environment_too(pair, tmp_path: Path) -> None:
    base, lora = pair
    done = bake_process("fuse", base, "-l", lora, "-o", tmp_path / "o.safetensors", BAKE_FUSE_THREADS="zero")
    assert done.code == 2
    assert "BAKE_FUSE_THREADS" in done.err or "--threads" in done.err


@pytest.mark.parametrize(("quiet", "shown"), [([], True), (["-q"], False), (["--json"], False)])
def test_a_terminal_sees_a_bar_in_bytes(pair, tmp_path: Path, quiet: list[str], shown: bool) -> None:
    pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
    import fcntl
    import os
    import struct
    import sys
    import termios

    base, lora = pair
    words = ["fuse", str(base), "-l", str(lora), "-o", str(tmp_path / "out.safetensors"), "--overwrite", *quiet]
    own, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "bake", *words], stderr=terminal, stdout=subprocess.DEVNULL, cwd=ROOT
    )
    os.close(terminal)
    seen = b""
    while True:
        try:
            piece = os.read(own, 4096)
        except OSError:  # how Linux says that the other side has closed
            break
        if not piece:
            break
        seen += piece
    os.close(own)
    assert process.wait() == 0
    assert (b"fusing" in seen and b"B/s" in seen) is shown
