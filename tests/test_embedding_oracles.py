"""Embeddings that travelled in adapters, as transformers and diffusers load them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import bake, load, random, raw, save

from bake.api import build_plan, fuse
from bake.errors import BakeError, FolderError, InputError, NonFinite, ShapeMismatch, Unsupported, UsageError

diffusers = pytest.importorskip("diffusers", reason="the diffusers oracle is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers oracle is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("oracles")]

UNET = {"sample_size": 8, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 4}
WIDTHS = {"text_encoder": 32, "text_encoder_2": 64}
MODULE = "text_model.encoder.layers.0.mlp.fc1"
ONE = random(1, 32).astype(np.float32)
TWO = random(2, 2, 32).astype(np.float32)
OTHER = random(3, 2, 64).astype(np.float32)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks the hub about tokenizers even where they are local."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def words() -> dict[str, int]:
    """A vocabulary of letters, alone and at the end of a word, as CLIP's begins, with its two marks at the end."""
    letters = [chr(code) for code in range(33, 127)]
    known = [*letters, *(letter + "</w>" for letter in letters), "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(known)}


def save_tokenizer(folder: Path, layout: str) -> None:
    """A CLIP tokenizer as transformers 4 saved it (slow; decoder: with its marks listed), or as 5 does (fast)."""
    folder.mkdir(parents=True)
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    if layout == "fast":
        transformers.CLIPTokenizer(vocab=words(), merges=[]).save_pretrained(folder)
        return
    (folder / "vocab.json").write_text(json.dumps(words()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(marks | {"pad_token": "<|endoftext|>"}))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **marks, "pad_token": "<|endoftext|>"}
    if layout == "decoder":
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        settings["added_tokens_decoder"] = {
            str(words()[mark]): {"content": mark, **flags} for mark in ("<|startoftext|>", "<|endoftext|>")
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_pipeline(folder: Path, layout: str = "decoder", dtype: torch.dtype = torch.float32, **config: int) -> Path:
    """A diffusers folder with two small text encoders and their tokenizers."""
    torch.manual_seed(0)
    for name, width in WIDTHS.items():
        settings = transformers.CLIPTextConfig(
            **{"vocab_size": len(words()), "hidden_size": width, "intermediate_size": 40, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "projection_dim": 16, "bos_token_id": len(words()) - 2},
            **{"eos_token_id": len(words()) - 1, **config},
        )
        transformers.CLIPTextModel(settings).to(dtype).save_pretrained(folder / name)
        save_tokenizer(folder / name.replace("text_encoder", "tokenizer"), layout)
    diffusers.UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    return folder


def save_lora(path: Path, **embeddings: np.ndarray) -> Path:
    up, down = random(8, 40, 2, spread=0.1), random(9, 2, 32, spread=0.1)
    factors = {f"text_encoder.{MODULE}.lora_B.weight": up, f"text_encoder.{MODULE}.lora_A.weight": down}
    return save(path, {name: array.astype(np.float32) for name, array in factors.items()} | embeddings)


def token_embedding(folder: Path, name: str = "text_encoder") -> np.ndarray:
    arrays = load(folder / name / "model.safetensors")
    return next(array for key, array in arrays.items() if key.endswith("embeddings.token_embedding.weight"))


@pytest.mark.parametrize("layout", ["slow", "decoder", "fast"])
def test_added_tokens_are_words_of_the_model(tmp_path: Path, layout: str) -> None:
    base = save_pipeline(tmp_path / "base", layout)
    lora = save_lora(tmp_path / "lora.safetensors", **{"<S1>": ONE, "bundle_emb.<two>.string_to_param.*": TWO})
    result = fuse(base, [lora], tmp_path / "out", embeddings="add", verify="full")
    assert result.report is not None
    assert result.report.ok
    assert result.report.embeddings == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    ids = tokenizer("a <S1> b <two> <two>_1", add_special_tokens=False)["input_ids"]
    first = len(words())
    assert ids == [words()["a</w>"], first, words()["b</w>"], first + 1, first + 2]
    assert len(tokenizer) == first + 3
    before, after = token_embedding(base), token_embedding(tmp_path / "out")
    np.testing.assert_array_equal(after[:first], before)
    np.testing.assert_array_equal(after[first:], np.concatenate([[ONE], TWO]))
    assert not (tmp_path / "out.embeddings").exists()
    for name in ("text_encoder_2/config.json", "tokenizer_2/tokenizer_config.json"):
        assert (base / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    second = "text_encoder_2/model.safetensors"
    assert raw(base / second) == raw(tmp_path / "out" / second)
    assert bake("verify", tmp_path / "out", "--full").code == 0


@pytest.mark.parametrize("eos", [2, len(words()) - 1])
def test_the_model_computes_what_diffusers_computes_after_loading_the_embedding(tmp_path: Path, eos: int) -> None:
    base = save_pipeline(tmp_path / "base", eos_token_id=eos)
    lora = save_lora(tmp_path / "lora.safetensors", **{"bundle_emb.<two>.string_to_param.*": TWO})
    fuse(base, [lora], tmp_path / "out", embeddings="add")
    fuse(base, [lora], tmp_path / "plain", embeddings="beside")

    class Loader(diffusers.loaders.TextualInversionLoaderMixin):
        hf_device_map = None
        components: dict[str, object] = {}  # noqa: RUF012 - read by diffusers

    theirs = transformers.CLIPTokenizer.from_pretrained(base / "tokenizer")
    model = transformers.CLIPTextModel.from_pretrained(tmp_path / "plain" / "text_encoder").eval()
    file = tmp_path / "plain.embeddings" / "two.safetensors"
    Loader().load_textual_inversion(str(file), token="<two>", tokenizer=theirs, text_encoder=model)
    ours = transformers.CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    grown = transformers.CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder").eval()
    prompt = Loader().maybe_convert_prompt("x <two> y", ours)
    assert prompt == Loader().maybe_convert_prompt("x <two> y", theirs) == "x <two> <two>_1 y"
    ids = ours(prompt, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, theirs(prompt, return_tensors="pt")["input_ids"])
    with torch.no_grad():
        mine, other = grown(ids), model(ids)
    assert torch.equal(mine.last_hidden_state, other.last_hidden_state)
    end = mine.last_hidden_state[0, -1]  # where <|endoftext|> stands
    assert torch.equal(mine.pooler_output[0], end)
    assert torch.equal(other.pooler_output[0], end) == (eos != 2)  # their old configuration takes the new word for it


def test_both_text_encoders_of_a_pipeline_learn_their_part(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base")
    lora = save_lora(tmp_path / "lora.safetensors", **{"bundle_emb.w.clip_l": TWO, "bundle_emb.w.clip_g": OTHER})
    done = bake("fuse", base, "-l", lora, "-o", tmp_path / "out", "--embeddings", "add", "--json")
    assert done.code == 2, "w is a letter of the vocabulary"
    lora = save_lora(tmp_path / "lora.safetensors", **{"bundle_emb.<w>.clip_l": TWO, "bundle_emb.<w>.clip_g": OTHER})
    done = bake("fuse", base, "-l", lora, "-o", tmp_path / "out", "--embeddings", "add", "--json")
    assert done.code == 0, done.out
    common = {"token": "<w>", "adapter": "lora.safetensors", "file": None, "vectors": 2, "tokens": ["<w>", "<w>_1"]}
    assert done.json["embeddings"] == [{**common, "encoder": "clip_g"}, {**common, "encoder": "clip_l"}]
    assert done.json["tensors"]["grown"] == 2
    for name, vectors in (("text_encoder", TWO), ("text_encoder_2", OTHER)):
        np.testing.assert_array_equal(token_embedding(tmp_path / "out", name)[-2:], vectors)
        model = transformers.CLIPTextModel.from_pretrained(tmp_path / "out" / name)
        assert model.get_input_embeddings().num_embeddings == len(words()) + 2


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"dtype": "fp32"}])
def test_vectors_are_rounded_once_to_the_dtype_of_the_output(tmp_path: Path, options: dict[str, str]) -> None:
    base = save_pipeline(tmp_path / "base", dtype=torch.float16)
    lora = save_lora(tmp_path / "lora.safetensors", **{"<s1>": ONE})
    result = fuse(base, [lora], tmp_path / "out", embeddings="add", verify="full", **options)
    assert result.report is not None
    assert result.report.ok
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(options.get("dtype", ""), torch.float16)
    after = token_embedding(tmp_path / "out")
    np.testing.assert_array_equal(after[-1], torch.from_numpy(ONE).to(dtype).double().numpy())
    np.testing.assert_array_equal(after[:-1], torch.from_numpy(token_embedding(base)).to(dtype).double().numpy())


def test_a_base_that_was_extended_is_extended_again(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base")
    for number in (1, 2):
        lora = save_lora(tmp_path / "lora.safetensors", **{f"<s{number}>": ONE * number})
        fuse(base, [lora], tmp_path / f"out{number}", embeddings="add")
        base = tmp_path / f"out{number}"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(base / "tokenizer")
    assert tokenizer.convert_tokens_to_ids(["<s1>", "<s2>"]) == [len(words()), len(words()) + 1]
    np.testing.assert_array_equal(token_embedding(base)[-2:], np.stack([ONE, ONE * 2]))
    again = save_lora(tmp_path / "again.safetensors", **{"<s1>": ONE})
    with pytest.raises(UsageError, match="already"):
        build_plan(base, [again], embeddings="add")


def test_an_update_of_the_embedding_itself_and_new_rows_go_together(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base")
    module = "text_encoder.text_model.embeddings.token_embedding"
    up, down = random(4, 32, 2).astype(np.float32), random(5, 2, len(words())).astype(np.float32)
    factors = {f"{module}.lora_embedding_B": up, f"{module}.lora_embedding_A": down}
    lora = save_lora(tmp_path / "lora.safetensors", **factors, **{"<s1>": ONE})
    result = fuse(base, [lora], tmp_path / "out", embeddings="add", verify="full")
    assert result.report is not None
    assert result.report.ok
    after = token_embedding(tmp_path / "out")
    np.testing.assert_allclose(after[:-1], token_embedding(base) + (up.astype(float) @ down).T, atol=1e-6)
    np.testing.assert_array_equal(after[-1], ONE)


def test_damaged_rows_are_found(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base")
    lora = save_lora(tmp_path / "lora.safetensors", **{"<s1>": ONE})
    fuse(base, [lora], tmp_path / "out", embeddings="add")
    path = tmp_path / "out" / "text_encoder" / "model.safetensors"
    content = path.read_bytes()
    assert content.count(ONE.tobytes()) == 1
    path.write_bytes(content.replace(ONE.tobytes(), (ONE + 1).tobytes()))
    done = bake("verify", tmp_path / "out")
    assert done.code == 9
    assert "<s1>" in done.out


@pytest.mark.parametrize(
    ("embeddings", "error", "says"),
    [
        ({"cat": ONE}, UsageError, "already"),
        ({"<|endoftext|>": ONE}, UsageError, "already"),
        ({"<s1>": ONE[:7]}, ShapeMismatch, "fit no text encoder"),
        ({"bundle_emb.<s1>.clip_g": TWO, "bundle_emb.<s1>.clip_l": TWO}, ShapeMismatch, "for te2"),
        ({"bundle_emb.<s1>.t5": TWO}, Unsupported, "only CLIP"),
        ({"bundle_emb.<s1>.clip_l_out": TWO}, Unsupported, "behind the text encoder"),
        ({"bundle_emb.<s1>.clip_l": TWO, "<s1>_1": ONE}, UsageError, "more than one"),
        ({"<s1>": ONE, "<S1>": ONE}, UsageError, "more than one"),
        ({"<s1>": ONE * np.float32(np.nan)}, NonFinite, "NaN"),
    ],
)
def test_what_cannot_be_added_is_refused(
    tmp_path: Path, embeddings: dict[str, np.ndarray], error: type[BakeError], says: str
) -> None:
    base = save_pipeline(tmp_path / "base")
    lora = save_lora(tmp_path / "plain.safetensors", **embeddings)
    content, marked = load(lora), tmp_path / "lora.safetensors"
    save(
        marked, {key: value.astype(np.float32) for key, value in content.items()}, dict.fromkeys(embeddings, "<embed>")
    )
    with pytest.raises(error, match=says):
        fuse(base, [marked], tmp_path / "out", embeddings="add")
    assert not (tmp_path / "out").exists()


def test_two_adapters_with_the_same_token_are_refused(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base")
    loras = [save_lora(tmp_path / f"{n}.safetensors", **{"<s1>": ONE * n}) for n in (1, 2)]
    with pytest.raises(UsageError, match="more than one"):
        build_plan(base, loras, embeddings="add")


def test_only_must_not_leave_out_what_is_to_grow(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base")
    lora = save_lora(tmp_path / "lora.safetensors", **{"bundle_emb.<w>.clip_l": TWO, "bundle_emb.<w>.clip_g": OTHER})
    with pytest.raises(UsageError, match="te2"):
        build_plan(base, [lora], only=["te1"], embeddings="add")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("vocab.json", None, Unsupported),
        ("vocab.json", '{"a": "b"}', InputError),
        ("vocab.json", '{"a": 0}', FolderError),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {}}}', InputError),
        ("added_tokens.json", '{"<old>": 900}', FolderError),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, content: str | None, error: type[BakeError]
) -> None:
    base = save_pipeline(tmp_path / "base")
    path = base / "tokenizer" / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(error, match="tokenizer"):
        build_plan(base, [save_lora(tmp_path / "lora.safetensors", **{"<s1>": ONE})], embeddings="add")


def test_a_published_embedding_beside_the_output_loads_in_diffusers(shared: Path, tmp_path: Path) -> None:
    published = load(shared / "data" / "cloneofsimo_safetensors" / "lora_disney_inpainting.safetensors")
    vectors = {name: array.astype(np.float32) for name, array in published.items() if name.startswith("<")}
    base = save_pipeline(tmp_path / "base")
    fuse(base, [save_lora(tmp_path / "lora.safetensors", **vectors)], tmp_path / "out")
    loaded = diffusers.loaders.textual_inversion.load_textual_inversion_state_dicts(
        [str(tmp_path / "out.embeddings" / "s1.safetensors")]
    )
    assert torch.equal(loaded[0]["emb_params"], torch.from_numpy(vectors["<s1>"])[None])
    assert raw(tmp_path / "out.embeddings" / "s2.safetensors")["emb_params"] == ("F32", vectors["<s2>"].tobytes())
