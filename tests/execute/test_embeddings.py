"""Embeddings that travel in adapters, written: files beside the output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models import kohya_lora, llama, peft_lora, sd1_pair
from names import small
from support import bake, drafts, load, metadata, random, raw, save

from bake import api
from bake.errors import InputChanged, OutputExists, OutputRefused, SameFile, VerificationFailed
from bake.execute.beside import EmbeddingFiles

S1 = random(1, 768).astype(np.float32)
CLIP_L, CLIP_G = random(2, 2, 768).astype(np.float16), random(3, 2, 1280).astype(np.float16)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """(base, LoRA with an embedding for one text encoder and one for two)."""
    base, lora, _ = sd1_pair(tmp_path)
    arrays, _ = kohya_lora(small("sd1"))
    bundle = {"bundle_emb.word.clip_l": CLIP_L, "bundle_emb.word.clip_g": CLIP_G}
    return base, save(lora, arrays | {"<s1>": S1} | bundle)


def test_the_files_hold_the_stored_vectors_in_the_layout_of_web_uis(pair, tmp_path: Path) -> None:
    done = bake("fuse", pair[0], "-l", pair[1], "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    folder = tmp_path / "out.embeddings"
    assert {path.name for path in folder.iterdir()} == {"s1.safetensors", "word.safetensors"}
    assert raw(folder / "s1.safetensors") == {"emb_params": ("F32", S1.tobytes())}
    assert load(folder / "s1.safetensors")["emb_params"].shape == (1, 768)
    assert raw(folder / "word.safetensors") == {
        "clip_l": ("F16", CLIP_L.tobytes()),
        "clip_g": ("F16", CLIP_G.tobytes()),
    }
    assert metadata(folder / "s1.safetensors") == {"format": "pt", "bake.token": "<s1>"}
    said = f"<s1> of style.safetensors: 1 vector for clip_l, in {folder / 's1.safetensors'}"
    assert said in done.out
    assert "2 embeddings identical" in done.out
    assert not [*drafts(tmp_path), *drafts(folder)]


def test_the_output_itself_does_not_depend_on_them(pair, tmp_path: Path) -> None:
    one, two = (api.fuse(pair[0], [pair[1]], tmp_path / f"{m}.safetensors", embeddings=m) for m in ("beside", "drop"))
    assert raw(one.output) == raw(two.output)
    assert not (tmp_path / "drop.embeddings").exists()
    assert json.loads(metadata(two.output)["bake.recipe"])["settings"]["embeddings"] == "drop"


def test_nothing_is_made_where_no_adapter_carries_any(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    api.fuse(base, [lora], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.embeddings").exists()


def test_existing_files_are_kept_without_overwrite(pair, tmp_path: Path) -> None:
    folder = tmp_path / "out.embeddings"
    folder.mkdir()
    (folder / "s1.safetensors").write_text("mine")
    (folder / "other.safetensors").write_text("also mine")
    with pytest.raises(OutputExists, match=r"s1\.safetensors"):
        api.fuse(*pair_of(pair), tmp_path / "out.safetensors")
    assert bake("plan", pair[0], "-l", pair[1], "-o", tmp_path / "out.safetensors").code == 8
    assert (folder / "s1.safetensors").read_text() == "mine"
    assert not (tmp_path / "out.safetensors").exists()
    api.fuse(*pair_of(pair), tmp_path / "out.safetensors", overwrite=True)
    assert (folder / "other.safetensors").read_text() == "also mine"
    assert raw(folder / "s1.safetensors") == {"emb_params": ("F32", S1.tobytes())}


def pair_of(pair: tuple[Path, Path]) -> tuple[Path, list[Path]]:
    return pair[0], [pair[1]]


def test_a_file_in_the_folders_place_is_refused(pair, tmp_path: Path) -> None:
    (tmp_path / "out.embeddings").write_text("mine")
    with pytest.raises(OutputRefused, match=r"out\.embeddings"):
        api.fuse(*pair_of(pair), tmp_path / "out.safetensors", overwrite=True)
    assert (tmp_path / "out.embeddings").read_text() == "mine"


def test_an_adapter_is_never_overwritten_with_its_embedding(pair, tmp_path: Path) -> None:
    lora = tmp_path / "out.embeddings" / "s1.safetensors"
    lora.parent.mkdir()
    pair[1].rename(lora)
    with pytest.raises(SameFile):
        api.fuse(pair[0], [lora], tmp_path / "out.safetensors", overwrite=True)


@pytest.mark.parametrize("stage", ["write", "publish"])
def test_a_failure_leaves_nothing_behind(pair, tmp_path: Path, monkeypatch, stage: str) -> None:
    def fail(self: EmbeddingFiles) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EmbeddingFiles, stage, fail)
    before = set(tmp_path.rglob("*"))
    with pytest.raises((OutputRefused, OSError)):
        api.fuse(*pair_of(pair), tmp_path / "out.safetensors")
    assert set(tmp_path.rglob("*")) == before


def test_they_are_there_before_the_output(pair, tmp_path: Path, monkeypatch) -> None:
    seen = []
    publish = EmbeddingFiles.publish

    def watch(self: EmbeddingFiles) -> None:
        publish(self)
        seen.append((tmp_path / "out.embeddings" / "s1.safetensors").exists())
        seen.append((tmp_path / "out.safetensors").exists())

    monkeypatch.setattr(EmbeddingFiles, "publish", watch)
    api.fuse(*pair_of(pair), tmp_path / "out.safetensors")
    assert seen == [True, False]


def test_an_adapter_that_changes_meanwhile_is_noticed(pair, tmp_path: Path) -> None:
    plan = api.build_plan(*pair_of(pair))
    save(pair[1], {"<s1>": S1})
    with pytest.raises(InputChanged):
        api.run_plan(plan, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.embeddings").exists()


def test_a_damaged_draft_never_appears(pair, tmp_path: Path, monkeypatch) -> None:
    write = EmbeddingFiles.write

    def damage(self: EmbeddingFiles) -> None:
        write(self)
        path = self.paths["s1.safetensors"]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(EmbeddingFiles, "write", damage)
    with pytest.raises(VerificationFailed, match="<s1>"):
        api.fuse(*pair_of(pair), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.embeddings").exists()


def test_verify_compares_them_and_says_if_they_were_moved(pair, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    api.fuse(*pair_of(pair), output)
    assert bake("verify", output, "--json").json["embeddings"] == {"checked": 2, "not_found": []}
    word = tmp_path / "out.embeddings" / "word.safetensors"
    word.unlink()
    done = bake("verify", output)
    assert done.code == 0
    assert f"not found and not checked: {word}" in done.out
    save(word, {"clip_l": CLIP_L, "clip_g": CLIP_G + 1})
    done = bake("verify", output)
    assert done.code == 9
    assert "clip_g is not the adapter's embedding of word" in done.out


def test_a_folder_has_them_beside_it_too(tmp_path: Path) -> None:
    arrays = {name: random(place, *shape).astype(np.float32) for place, (name, shape) in enumerate(llama().items())}
    save(tmp_path / "base" / "model.safetensors", arrays)
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    names = ["model.layers.0.self_attn.q_proj.weight"]
    lora = save(tmp_path / "lora.safetensors", peft_lora(llama(), names) | {"<s1>": S1})
    done = bake("fuse", tmp_path / "base", "-l", lora, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert [path.name for path in (tmp_path / "out.embeddings").iterdir()] == ["s1.safetensors"]
    assert bake("verify", tmp_path / "out").code == 0
