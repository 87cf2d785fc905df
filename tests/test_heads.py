"""Embeddings and heads of language models, against PEFT's own forward pass and transformers' loading."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import bake, load, random, save

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="the transformers oracle is not installed")
peft = pytest.importorskip("peft", reason="the PEFT oracle is not installed")

# PEFT points out that the merge of a tied layer is complicated: that is what is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
TOKENS = torch.tensor([[1, 5, 17, 3, 9]])


def llama(tied: bool, vocabulary: int = 24):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    ).eval()


def trained(model, config, folder: Path, **saving):
    """An adapter on `model` with random values, saved by PEFT; and its logits."""
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        adapted.save_pretrained(folder, **saving)
        return adapted.eval()(TOKENS).logits


def logits(folder: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def fused(base: Path, adapter: Path, out: Path):
    done = bake("fuse", base, "-l", adapter, "-o", out, "--verify", "full", "--json")
    assert done.code == 0, done.err
    verified = bake("verify", out, "--search", base.parent, "--json")
    assert verified.code == 0, verified.err
    return done.json


@pytest.fixture
def folders(tmp_path: Path):
    return tmp_path / "base", tmp_path / "adapter", tmp_path / "out"


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_lora_on_one_use_of_a_tied_embedding_unties_the_two(folders, target: str) -> None:
    base, adapter, out = folders
    model = llama(tied=True)
    model.save_pretrained(base)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[target, "q_proj"])
    expected = trained(model, config, adapter)
    # PEFT hands the embedding to the head unless told otherwise, so its logits tell which of the two it changed
    report = fused(base, adapter, out)
    assert any("stored apart" in note for note in report["notes"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = load(base / "model.safetensors"), load(out / "model.safetensors")
    assert after.keys() == before.keys() | {"lm_head.weight"}
    untouched = "lm_head.weight" if target == "embed_tokens" else "model.embed_tokens.weight"
    np.testing.assert_array_equal(after[untouched], before["model.embed_tokens.weight"])
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-5)


def test_trained_rows_change_both_uses_and_stay_tied(folders) -> None:
    base, adapter, out = folders
    model = llama(tied=True)
    model.save_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 4, 17]})
    expected = trained(model, config, adapter)
    fused(base, adapter, out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load(out / "model.safetensors")
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_whole_saved_modules_replace_the_bases(folders, saved: list[str], tied: bool) -> None:
    base, adapter, out = folders
    model = llama(tied)
    model.save_pretrained(base)
    expected = trained(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved), adapter)
    fused(base, adapter, out)
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_vocabulary_is_taken_over_with_its_tokenizer(folders, tied: bool) -> None:
    base, adapter, out = folders
    model = llama(tied)
    model.save_pretrained(base)
    (base / "tokenizer.json").write_text('{"old": true}')
    model.resize_token_embeddings(27)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    expected = trained(model, config, adapter, save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load(adapter / "adapter_model.safetensors")
    (adapter / "tokenizer.json").write_text('{"new": true}')
    report = fused(base, adapter, out)
    assert any("from 24 to 27 rows" in note for note in report["notes"])
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (27, tied)
    assert json.loads((out / "tokenizer.json").read_text()) == {"new": True}
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-5)


def test_an_embedding_that_grows_without_its_head_is_refused(folders) -> None:
    base, adapter, out = folders
    llama(tied=False).save_pretrained(base)
    grown = {"base_model.model.model.embed_tokens.weight": random(0, 27, 8).astype(np.float32)}
    grown |= {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight": np.ones(shape, np.float32)
        for half, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    save(adapter / "adapter_model.safetensors", grown)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    done = bake("fuse", base, "-l", adapter, "-o", out)
    assert done.code == 5
    assert "but not lm_head.weight" in done.err
    assert not out.exists()


def test_a_replaced_tensor_of_another_shape_is_refused(folders) -> None:
    base, adapter, out = folders
    llama(tied=False).save_pretrained(base)
    save(
        adapter / "adapter_model.safetensors",
        {"base_model.model.lm_head.weight": np.ones((24, 9), np.float32)},
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    assert bake("fuse", base, "-l", adapter, "-o", out).code == 5
    assert not out.exists()


def test_t5_cannot_be_untied_and_says_why(folders) -> None:
    base, adapter, out = folders
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, tie_word_embeddings=True
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(base)
    save(
        adapter / "adapter_model.safetensors",
        {
            "base_model.model.shared.lora_embedding_A": np.ones((2, 20), np.float32),
            "base_model.model.shared.lora_embedding_B": np.ones((8, 2), np.float32),
        },
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    done = bake("fuse", base, "-l", adapter, "-o", out)
    assert done.code == 6
    assert "d_model" in done.err
    assert not out.exists()
