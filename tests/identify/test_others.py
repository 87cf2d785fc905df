"""Files that are taken for LoRAs: each is known for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from names import read_list

from bake.identify.others import kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lllite_unet_input_blocks_1_1.depth.0.weight", "a ControlNet-LLLite"),
        ("lora_controlnet", "a ControlNet"),
        ("input_hint_block.0.weight", "a ControlNet"),
        ("controlnet_blocks.0.weight", "a ControlNet"),
        ("controlnet_down_blocks.0.bias", "a ControlNet"),
        ("image_proj_model.proj.weight", "an IP-Adapter"),
        ("ip_adapter_proj_model.proj.weight", "an IP-Adapter"),
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "an IP-Adapter"),
        ("id_encoder.visual_projection_2.weight", "an identity adapter (PhotoMaker, PuLID)"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "an AnimateDiff motion module"),
    ],
)
@pytest.mark.parametrize("beside_factors", [False, True])
def test_what_needs_an_image_or_layers_of_its_own(name: str, kind: str, beside_factors: bool) -> None:
    found = kind_of(["x.more", name], beside_factors)
    assert found is not None
    assert (found.name, found.is_checkpoint) == (kind, False)
    assert found.advice


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adapter.body.0.resnets.0.block1.weight", "a T2I-Adapter"),
        ("body.0.in_conv.weight", "a T2I-Adapter"),
        ("prompt_embeddings", "a soft prompt (PEFT prompt, prefix or p-tuning)"),
        (
            "base_model.model.model.layers.0.self_attn.adaption_prompt",
            "a soft prompt (PEFT prompt, prefix or p-tuning)",
        ),
        ("string_to_param.*", "a textual inversion"),
        ("768.0.linear.0.weight", "a hypernetwork"),
        ("w_a_000", "a SAM LoRA in a project's private format (w_a_000, w_b_000)"),
        ("double_blocks.0.img_attn.qkv.weight", "a checkpoint"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a checkpoint"),
        ("transformer_blocks.0.attn.to_q.weight", "a checkpoint"),
        ("blocks.0.self_attn.q.weight", "a checkpoint"),
        ("layers.0.attention.qkv.weight", "a checkpoint"),
    ],
)
def test_what_comes_alone(name: str, kind: str) -> None:
    found = kind_of([name], beside_factors=False)
    assert found is not None
    assert found.name == kind
    assert kind_of([name], beside_factors=True) is None


@pytest.mark.parametrize(
    "name", ["lora_unet_x.mystery", "base_model.model.score.weight", "x.layers.0.attn.my_lora.weight", "thing"]
)
def test_what_nobody_knows(name: str) -> None:
    assert kind_of([name], beside_factors=False) is None


def test_every_published_transformer_is_a_checkpoint(shared: Path) -> None:
    for path in sorted((shared / "names").glob("*_original.json")):
        about, shapes = read_list(path)
        if about["family"] not in ("stable-cascade", "flux1-vae"):
            found = kind_of(shapes, beside_factors=False)
            assert found is not None, path.name
            assert found.is_checkpoint, path.name
