"""Which tensors of an adapter are token embeddings, for which word and which text encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import kohya_lora
from names import small
from support import random, save

from bake.errors import BakeError, InputError, Unsupported
from bake.identify.adapter import identify_adapter
from bake.identify.embeddings import Embedding, group_embeddings
from bake.io.adapter import open_adapter


def carried(folder: Path, metadata: dict[str, str] | None = None, **embeddings: tuple[int, ...]) -> list[Embedding]:
    """What is found in a LoRA with embeddings of these shapes."""
    lora, _ = kohya_lora(small("sd1"))
    extra = {name: random(place, *shape).astype(np.float32) for place, (name, shape) in enumerate(embeddings.items())}
    source = open_adapter(save(folder / "lora.safetensors", lora | extra, metadata))
    return list(group_embeddings(source.file, identify_adapter(source).embeddings))


def test_cloneofsimos_tokens_are_their_own_names(tmp_path: Path) -> None:
    (found,) = carried(tmp_path, **{"<s1>": (768,)})
    (vectors,) = found.vectors
    assert (found.token, vectors.count, vectors.width, vectors.encoder) == ("<s1>", 1, 768, "clip_l")


def test_a_token_without_brackets_is_told_by_its_metadata(tmp_path: Path) -> None:
    (found,) = carried(tmp_path, {"mytoken": "<embed>"}, mytoken=(768,))
    assert found.token == "mytoken"
    lora, _ = kohya_lora(small("sd1"))
    unmarked = open_adapter(save(tmp_path / "x.safetensors", lora | {"mytoken": np.zeros(768, np.float32)}))
    assert identify_adapter(unmarked).unknown == ("mytoken",)


@pytest.mark.parametrize(
    ("part", "shape", "encoder"),
    [
        ("string_to_param.*", (3, 768), "clip_l"),
        ("string_to_param.*", (3, 1024), "clip_h"),
        ("clip_l", (2, 768), "clip_l"),
        ("clip_g", (2, 1280), "clip_g"),
        ("t5", (2, 4096), "t5xxl"),
        ("string_to_param.*", (1, 5), None),
    ],
)
def test_the_text_encoder_is_told_by_name_or_else_by_width(
    tmp_path: Path, part: str, shape: tuple[int, ...], encoder: str | None
) -> None:
    (found,) = carried(tmp_path, **{f"bundle_emb.my word.{part}": shape})
    assert found.token == "my word"
    assert (found.vectors[0].count, found.vectors[0].encoder) == (shape[0], encoder)


def test_one_token_may_have_vectors_for_several_text_encoders(tmp_path: Path) -> None:
    names = {"bundle_emb.v1.0.clip_l": (2, 768), "bundle_emb.v1.0.clip_g": (2, 1280), "bundle_emb.b.clip_l": (1, 768)}
    found = carried(tmp_path, **names)
    assert {one.token: [v.encoder for v in one.vectors] for one in found} == {
        "v1.0": ["clip_g", "clip_l"],
        "b": ["clip_l"],
    }


def test_output_vectors_are_kept_apart(tmp_path: Path) -> None:
    found = carried(tmp_path, **{"bundle_emb.a.clip_l": (1, 768), "bundle_emb.a.clip_l_out": (1, 768)})
    assert [(one.token, one.is_output) for one in found] == [("a", False), ("a", True)]


@pytest.mark.parametrize(
    ("name", "shape", "error"),
    [
        ("bundle_emb.a.unheard_of", (1, 768), Unsupported),
        ("bundle_emb.a", (1, 768), Unsupported),
        ("bundle_emb.a.clip_l", (1, 2, 768), InputError),
        ("bundle_emb.a.clip_l", (0, 768), InputError),
        ("<s1>", (), InputError),
    ],
)
def test_what_is_no_embedding_that_bake_knows_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], error: type[BakeError]
) -> None:
    with pytest.raises(error, match=r"a\.|s1|bundle_emb"):
        carried(tmp_path, **{name: shape})


def test_two_embeddings_for_one_text_encoder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="second embedding"):
        carried(tmp_path, **{"bundle_emb.a.clip_l": (1, 768), "bundle_emb.a.string_to_param.*": (1, 768)})


@pytest.mark.parametrize("name", ["bundle_emb.a.clip_l", "<s1>", "emb_params"])
def test_a_file_of_nothing_but_embeddings_is_a_textual_inversion(tmp_path: Path, name: str) -> None:
    source = open_adapter(save(tmp_path / "word.safetensors", {name: np.zeros((1, 768), np.float32)}))
    with pytest.raises(Unsupported, match="textual inversion"):
        identify_adapter(source)


def test_cloneofsimos_ti_files_are_textual_inversions(tmp_path: Path) -> None:
    torch.save({"<s1>": torch.zeros(768), "<s2>": torch.zeros(768)}, tmp_path / "lora.ti.pt")
    with pytest.raises(Unsupported, match=r"textual inversion.*embeddings folder"):
        identify_adapter(open_adapter(tmp_path / "lora.ti.pt"))


def test_embeddings_of_a_published_file(shared: Path) -> None:
    source = open_adapter(shared / "data" / "cloneofsimo_safetensors" / "lora_disney_inpainting.safetensors")
    found = group_embeddings(source.file, identify_adapter(source).embeddings)
    assert [(one.token, one.vectors[0].width, one.is_output) for one in found] == [
        ("<s1>", 768, False),
        ("<s2>", 768, False),
    ]
