"""Tied embeddings: which head exists only virtually, and what unties it, against transformers' own loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bake.identify.tied import Tie, edited, tied_embeddings, untying_edits, vocabulary_edits

LLAMA = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def real(shared: Path, name: str) -> tuple[dict, list[str]]:
    path = shared / "names" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    found = json.loads(path.read_text())
    return found["about"]["config"]["config.json"], list(found["tensors"])


@pytest.mark.parametrize(
    ("name", "embedding", "head"),
    [
        ("qwen25_0.5b", EMBEDDING, HEAD),
        ("gemma2_2b", EMBEDDING, HEAD),
        ("whisper_small", "model.decoder.embed_tokens.weight", "proj_out.weight"),
        ("qwen25_vl_3b_old", EMBEDDING, HEAD),
        ("qwen25_vl_3b_new", "model.language_model.embed_tokens.weight", HEAD),
    ],
)
def test_the_heads_of_real_models_are_virtual(name: str, embedding: str, head: str, shared: Path) -> None:
    assert tied_embeddings(*real(shared, name)) == Tie(embedding, head, False)


@pytest.mark.parametrize(("name", "why"), [("gpt2_small", "without the prefix"), ("t5_large", "d_model")])
def test_real_models_that_cannot_be_untied_say_why(name: str, why: str, shared: Path) -> None:
    tie = tied_embeddings(*real(shared, name))
    assert tie is not None
    assert not tie.head_stored
    assert why in (tie.refusal or "")


@pytest.mark.parametrize("name", ["llama31_8b", "mistral_7b", "mixtral_8x7b", "minilm_l6"])
def test_real_models_without_a_tie(name: str, shared: Path) -> None:
    config, names = real(shared, name)
    assert tied_embeddings({**config, "tie_word_embeddings": False}, names) is None


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": True}, [EMBEDDING]),
        ({"architectures": ["BertModel"]}, ["embeddings.word_embeddings.weight"]),
        ({"architectures": ["T5EncoderModel"]}, ["shared.weight"]),
        ({**LLAMA, "tie_word_embeddings": False}, [EMBEDDING]),
        (LLAMA, ["model.norm.weight"]),
        ({}, [EMBEDDING, HEAD]),
    ],
)
def test_nothing_is_tied(config: dict, names: list[str]) -> None:
    assert tied_embeddings(config, names) is None


@pytest.mark.parametrize("config", [LLAMA, {"architectures": ["LlamaForCausalLM"]}])
def test_a_stored_head_counts_as_tied_unless_the_configuration_denies_it(config: dict) -> None:
    assert tied_embeddings(config, [EMBEDDING, HEAD]) == Tie(EMBEDDING, HEAD, True)


def test_a_nested_true_wins() -> None:
    config = {**LLAMA, "tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}
    assert tied_embeddings(config, [EMBEDDING]) == Tie(EMBEDDING, HEAD, False)


def test_without_a_configuration_the_use_is_unknown() -> None:
    tie = tied_embeddings({}, [EMBEDDING])
    assert tie is not None
    assert "config.json" in (tie.refusal or "")


def test_the_head_of_an_unlisted_model_is_unknown() -> None:
    tie = tied_embeddings({"architectures": ["NextForCausalLM"]}, ["next.wte.weight"])
    assert tie is not None
    assert (tie.embedding, tie.refusal) == (
        "next.wte.weight",
        "the name of this model's output head is not known to bake",
    )


@pytest.mark.parametrize(
    ("changed", "broken"), [({EMBEDDING}, True), ({HEAD}, True), ({"model.norm.weight"}, False), (set(), False)]
)
def test_a_change_of_either_breaks_the_tie(changed: set[str], broken: bool) -> None:
    assert Tie(EMBEDDING, HEAD, False).broken_by(changed) is broken


def test_edits_reach_the_text_decoders_settings_and_leave_the_original_alone() -> None:
    config = {"text_config": {"vocab_size": 8}, "vision_config": {"depth": 1}, "decoder": {"tie_word_embeddings": True}}
    result = edited(config, untying_edits(config))
    assert result == {
        "text_config": {"vocab_size": 8, "tie_word_embeddings": False},
        "vision_config": {"depth": 1},
        "decoder": {"tie_word_embeddings": False},
        "tie_word_embeddings": False,
    }
    assert config["text_config"] == {"vocab_size": 8}


def test_a_grown_vocabulary_is_written_where_the_old_size_stood() -> None:
    config = {"vocab_size": 8, "text_config": {"vocab_size": 8}, "llm_config": {"vocab_size": 5}}
    assert vocabulary_edits(config, 8, 10) == ((("vocab_size",), 10), (("text_config", "vocab_size"), 10))
    assert vocabulary_edits(config, 8, 8) == ()


SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
TIED = {"tie_word_embeddings": True}
TEXT = {**SMALL, **TIED, "num_key_value_heads": 2}
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**TEXT, "head_dim": 8}),
    "GPT2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}),
    "GPTNeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SMALL, **TIED}),
    "Bert": ("BertForMaskedLM", "BertConfig", SMALL),
    "Roberta": ("RobertaForMaskedLM", "RobertaConfig", SMALL),
    "Electra": ("ElectraForMaskedLM", "ElectraConfig", SMALL),
    "Bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**SEQ2SEQ, "num_mel_bins": 4, "max_source_positions": 8},
    ),
    "Llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**CLIP, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
            "image_token_index": 31,
        },
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_untied_model_with_its_two_tensors(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", minversion="5", reason="the transformers oracle is not installed"
    )
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    tie = tied_embeddings(config, tensors)
    assert tie is not None
    assert (tie.head_stored, tie.refusal) == (False, None)

    head = tensors[tie.embedding] + torch.randn_like(tensors[tie.embedding])
    tensors |= {tie.head: head, **{copied: tensors[source].clone() for copied, source in tie.copies}}
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(edited(config, untying_edits(config))))
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report

    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    if name == "Bart":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if name == "Whisper":
        inputs = {"input_features": torch.ones(1, 4, 16), "decoder_input_ids": inputs["input_ids"]}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
