"""Where token embeddings go that travel in adapters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import kohya_lora, save_base
from names import small
from support import bake, random, save

from bake.api import build_plan
from bake.errors import UsageError
from bake.plan.embeddings import embeddings_folder, file_stem
from bake.plan.model import Plan

SDXL = {"bundle_emb.<s1>.clip_l": (2, 768), "bundle_emb.<s1>.clip_g": (2, 1280)}


def lora_with(path: Path, embeddings: dict[str, tuple[int, ...]], seed: int = 0) -> Path:
    arrays, _ = kohya_lora(small("sd1"), seed=seed)
    return save(path, arrays | {name: random(seed, *shape).astype(np.float32) for name, shape in embeddings.items()})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base.safetensors")


def test_each_token_has_a_file_of_its_own(base: Path, tmp_path: Path) -> None:
    lora = lora_with(tmp_path / "lora.safetensors", {"<s2>": (768,), **SDXL})
    other = lora_with(tmp_path / "other.safetensors", {"<s2>": (768,)}, seed=5)
    files = {one.file: [v.key for v in one.vectors] for one in build_plan(base, [lora, other]).embeddings}
    assert files == {
        "s1.safetensors": ["clip_g", "clip_l"],
        "s2.safetensors": ["emb_params"],
        "s2-2.safetensors": ["emb_params"],
    }


def test_names_stay_apart_where_case_does_not_count(base: Path, tmp_path: Path) -> None:
    lora = lora_with(tmp_path / "lora.safetensors", {"<Cat>": (768,), "<cat>": (768,)})
    again = lora_with(tmp_path / "again.safetensors", {"<CAT>": (768,)}, seed=5)
    names = [str(one.file).casefold() for one in build_plan(base, [lora, again]).embeddings]
    assert len(set(names)) == 3


@given(st.text())
def test_a_file_name_is_safe_whatever_the_token(token: str) -> None:
    stem = file_stem(token)
    assert stem not in ("", ".", "..")
    assert not set(stem) & set('/\\<>:"|?*\0 \n')
    assert not stem.startswith(".")
    assert not stem.endswith(".")
    assert len(stem.encode("utf-8", "surrogatepass")) <= 110


@pytest.mark.parametrize(
    ("token", "stem"),
    [
        ("<s1>", "s1"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("CON", "_CON"),
        ("nul.txt", "_nul.txt"),
        ("<>", "_"),
        ("a b", "a_b"),
    ],
)
def test_a_token_cannot_name_another_folder_or_a_device(token: str, stem: str) -> None:
    assert file_stem(token) == stem


@pytest.mark.parametrize(
    ("output", "folder"), [("a/out.safetensors", "a/out.embeddings"), ("a/model", "a/model.embeddings")]
)
def test_the_folder_lies_beside_the_output(output: str, folder: str) -> None:
    assert embeddings_folder(Path(output)) == Path(folder)


def test_the_order_on_the_command_line_changes_no_name(base: Path, tmp_path: Path) -> None:
    one = lora_with(tmp_path / "one.safetensors", {"<s1>": (768,)})
    two = lora_with(tmp_path / "two.safetensors", {"<s1>": (768,)}, seed=3)
    assert build_plan(base, [one, two]).embeddings == build_plan(base, [two, one]).embeddings


def test_drop_leaves_them_out_and_says_so(base: Path, tmp_path: Path) -> None:
    plan = build_plan(base, [lora_with(tmp_path / "lora.safetensors", {"<s1>": (768,)})], embeddings="drop")
    assert plan.embeddings == ()
    assert "lora.safetensors: token embeddings left out (--embeddings drop): <s1>" in plan.notes


def test_drop_fuses_what_cannot_be_kept(base: Path, tmp_path: Path) -> None:
    lora = lora_with(tmp_path / "lora.safetensors", {"bundle_emb.a.unheard_of": (1, 768)})
    assert "--embeddings drop" in bake("plan", base, "-l", lora).err
    assert bake("plan", base, "-l", lora, "--embeddings", "drop").code == 0


def test_output_vectors_come_with_a_warning(base: Path, tmp_path: Path) -> None:
    plan = build_plan(base, [lora_with(tmp_path / "lora.safetensors", {"bundle_emb.a.clip_l_out": (1, 768)})])
    (found,) = plan.embeddings
    assert (found.file, found.vectors[0].key) == ("a_out.safetensors", "clip_l_out")
    assert any("only OneTrainer" in note for note in plan.notes)


def test_integers_are_no_embedding(base: Path, tmp_path: Path) -> None:
    arrays, _ = kohya_lora(small("sd1"))
    lora = save(tmp_path / "lora.safetensors", arrays | {"<s1>": np.arange(768)})
    done = bake("plan", base, "-l", lora)
    assert done.code == 3
    assert "I64" in done.err


def test_an_adapter_that_is_off_brings_no_embedding(base: Path, tmp_path: Path) -> None:
    on, off = (lora_with(tmp_path / f"{n}.safetensors", {f"<{n}>": (768,)}) for n in ("on", "off"))
    assert [one.token for one in build_plan(base, [on, (off, 0.0)]).embeddings] == ["<on>"]


def test_adding_needs_a_diffusers_folder(base: Path, tmp_path: Path) -> None:
    lora = lora_with(tmp_path / "lora.safetensors", {"<s1>": (768,)})
    done = bake("plan", base, "-l", lora, "--embeddings", "add")
    assert done.code == 2
    assert "--embeddings beside" in done.err
    with pytest.raises(UsageError, match="beside, add, drop"):
        build_plan(base, [lora], embeddings="elsewhere")


def test_the_plan_goes_through_json(base: Path, tmp_path: Path) -> None:
    plan = build_plan(base, [lora_with(tmp_path / "lora.safetensors", SDXL)])
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_document_lists_them(base: Path, tmp_path: Path) -> None:
    lora = lora_with(tmp_path / "lora.safetensors", SDXL)
    found = bake("plan", base, "-l", lora, "-o", tmp_path / "out.safetensors", "--json").json["embeddings"]
    file = str(tmp_path / "out.embeddings" / "s1.safetensors")
    common = {"token": "<s1>", "adapter": "lora.safetensors", "file": file, "vectors": 2, "tokens": []}
    assert found == [{**common, "encoder": "clip_g"}, {**common, "encoder": "clip_l"}]
    assert not (tmp_path / "out.embeddings").exists()
