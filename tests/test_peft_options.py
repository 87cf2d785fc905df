"""Options of PEFT that change names, ties or arithmetic: the fused model computes what PEFT's model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import load, save_torch

from bake.api import fuse
from bake.errors import ShapeMismatch, Unsupported

peft = pytest.importorskip("peft", minversion="0.21", reason="the PEFT oracle is not installed")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="the transformers oracle is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("oracles")]

SIZES = {
    **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 16, "pad_token_id": 0},
}
LLAMA = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {**LLAMA, "num_experts_per_tok": 2}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
BART = {
    **{"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16},
    **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
TOKENS = torch.arange(3, 21).reshape(2, 9)


def _model(name: str) -> Any:
    torch.manual_seed(0)
    config, kind, settings = {
        "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
        "tied llama": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
        "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**EXPERTS, "num_local_experts": 3}),
        "qwen3-moe": (
            *("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
            {**EXPERTS, "num_experts": 3, "moe_intermediate_size": 12, "head_dim": 4},
        ),
        "granite-moe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", {**EXPERTS, "num_local_experts": 3}),
        "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
        "bert": ("BertConfig", "BertForSequenceClassification", {**SIZES, "num_labels": 3}),
        "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {**SIZES, "num_labels": 3}),
        "t5": ("T5Config", "T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}),
        "bart": ("BartConfig", "BartForConditionalGeneration", {**BART, "pad_token_id": 0}),
    }[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _logits(model: Any, seq2seq: bool) -> torch.Tensor:
    more = {"decoder_input_ids": TOKENS % 16} if seq2seq else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **more).logits


def assert_computes_the_same(tmp_path: Path, name: str, config: Any) -> dict[str, Any]:
    """Fuse an adapter with random numbers and compare; return the configuration of the output."""
    model = _model(name)
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in (each for each in wrapped.parameters() if each.requires_grad):
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = _logits(wrapped, name in ("t5", "bart"))
    result = fuse(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", dtype="fp32", verify="full")
    assert result.report is not None
    assert result.report.ok
    ours, loading = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(_logits(ours.eval(), name in ("t5", "bart")), expected, rtol=1e-5, atol=1e-5)
    return ours.config.to_dict()


def _router(**settings: Any) -> Any:
    return peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], **settings)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_all_linear_means_experts_and_routers_too(tmp_path: Path, name: str, rslora: bool) -> None:
    """PEFT turns it into bare parameters: gate_up_proj and down_proj without a module, and gate.weight."""
    assert_computes_the_same(
        tmp_path, name, peft.LoraConfig(r=2, lora_alpha=5, target_modules="all-linear", use_rslora=rslora)
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mixtral", {"target_parameters": ["gate.weight"], "alpha_pattern": {"gate.weight": 7}}),
        ("mixtral", {"target_parameters": ["mlp.gate.weight"], "rank_pattern": {r"1\.mlp\.gate\.weight": 1}}),
        ("granite-moe", {"target_parameters": ["router.weight", "mlp.experts.down_proj"]}),
        ("granite-moe", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
)
def test_routers_are_trained_as_parameters(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    assert_computes_the_same(tmp_path, name, _router(**settings))


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}])
def test_the_head_of_gpt_neox_has_two_names(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert_computes_the_same(
        tmp_path, "neox", peft.LoraConfig(**{"r": 2, "target_modules": ["query_key_value"], **settings})
    )


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_head_saved_whole_beside_all_biases_is_there_twice(tmp_path: Path, name: str) -> None:
    assert_computes_the_same(
        tmp_path, name, peft.LoraConfig(r=2, target_modules=["query"], bias="all", task_type="SEQ_CLS")
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("tied llama", lambda rows: peft.TrainableTokensConfig(token_indices=rows)),
        ("tied llama", lambda rows: _router(trainable_token_indices=rows)),
        ("t5", lambda rows: peft.TrainableTokensConfig(token_indices=rows)),
        ("t5", lambda rows: peft.LoraConfig(target_modules=["q"], trainable_token_indices=rows)),
        ("bart", lambda rows: peft.TrainableTokensConfig(token_indices=rows, target_modules=["shared"])),
    ],
)
def test_trained_tokens_of_a_tied_embedding_stay_tied(
    tmp_path: Path, name: str, make: Callable[[list[int]], Any]
) -> None:
    config = assert_computes_the_same(tmp_path, name, make([9, 4, 20]))
    assert config["tie_word_embeddings"]


@pytest.mark.parametrize("settings", [{"oft_block_size": 4}, {"oft_block_size": 4, "block_share": True}])
def test_constrained_rotations_are_shortened_as_peft_shortens_them(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = peft.OFTConfig(**settings, coft=True, eps=0.05, target_modules=["q_proj", "down_proj"])
    assert_computes_the_same(tmp_path, "llama", config)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoKrConfig(r=9, alpha=5, target_modules=["narrow", "linear"]),  # both factors whole
        peft.LoKrConfig(r=1, alpha=5, target_modules=["narrow", "linear"], decompose_both=True),
        peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attention", "narrow"]),
        peft.LoraConfig(r=2, target_modules=["linear"], target_parameters=["attention.in_proj_weight"]),
        peft.OFTConfig(oft_block_size=4, coft=True, eps=0.05, target_modules=["linear"]),
    ],
    ids=["whole lokr", "lokr", "attention", "parameter", "coft"],
)
def test_layers_of_plain_modules_get_what_peft_merges(tmp_path: Path, config: Any) -> None:
    torch.manual_seed(0)
    layers = {
        **{"narrow": torch.nn.Conv1d(6, 8, 3), "linear": torch.nn.Linear(8, 10)},
        **{"attention": torch.nn.MultiheadAttention(8, 2)},
    }
    model = torch.nn.ModuleDict(layers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_torch(tmp_path / "base.safetensors", before)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in (each for each in wrapped.parameters() if each.requires_grad):
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.double().merge_and_unload().state_dict()
    for weight in (1.0, 0.7, -0.5):
        output = tmp_path / f"out{weight}.safetensors"
        fuse(tmp_path / "base.safetensors", [(tmp_path / "adapter", weight)], output, dtype="fp32", verify="full")
        for name, values in load(output).items():
            start = before[name].double()
            expected = (start + weight * (merged[name] - start)).numpy()
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6, err_msg=name)


def _vera(tmp_path: Path, **settings: Any) -> Path:
    model = _model("llama")
    model.save_pretrained(tmp_path / "base")
    config = peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"], **settings)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter" / "adapter_model.safetensors"


def test_vera_without_its_projections_is_refused_as_such(tmp_path: Path) -> None:
    _vera(tmp_path, save_projection=False)
    with pytest.raises(Unsupported, match="save_projection"):
        fuse(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


def test_vera_for_a_narrower_model_does_not_fit(tmp_path: Path) -> None:
    file = _vera(tmp_path)
    save_file({key: t[:, :3].contiguous() if key.endswith("vera_A") else t for key, t in load_file(file).items()}, file)
    with pytest.raises(ShapeMismatch, match="vera_A"):
        fuse(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize("prefix", ["0.auto_model.", "0.model.", "auto_model."])
def test_sentence_encoders_are_wrapped_in_more_than_one_way(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    head = "base_model.model."
    save_file({head + prefix + key.removeprefix(head): value for key, value in load_file(file).items()}, file)
    fuse(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", verify="full")
    ours = load(tmp_path / "out" / "model.safetensors")
    for name, values in wrapped.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(ours[name], values.numpy(), rtol=0, atol=1e-6, err_msg=name)
