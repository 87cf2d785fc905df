"""The autoencoder's two layouts: pairs written down by hand, and every tensor of the original one."""

from __future__ import annotations

import pytest
from layouts import ldm_vae

from bake.keys import vae
from bake.keys.places import Place, split_parameter

PAIRS = [
    ("encoder.down.1.block.0.conv1", "encoder.down_blocks.1.resnets.0.conv1"),
    ("encoder.down.2.downsample.conv", "encoder.down_blocks.2.downsamplers.0.conv"),
    ("encoder.down.1.block.0.nin_shortcut", "encoder.down_blocks.1.resnets.0.conv_shortcut"),
    ("decoder.up.3.block.2.norm2", "decoder.up_blocks.0.resnets.2.norm2"),
    ("decoder.up.0.block.1.conv2", "decoder.up_blocks.3.resnets.1.conv2"),
    ("decoder.up.1.upsample.conv", "decoder.up_blocks.2.upsamplers.0.conv"),
    ("decoder.mid.block_1.conv1", "decoder.mid_block.resnets.0.conv1"),
    ("decoder.mid.block_2.conv1", "decoder.mid_block.resnets.1.conv1"),
    ("encoder.mid.attn_1.norm", "encoder.mid_block.attentions.0.group_norm"),
    ("encoder.mid.attn_1.q", "encoder.mid_block.attentions.0.to_q"),
    ("encoder.mid.attn_1.proj_out", "encoder.mid_block.attentions.0.to_out.0"),
    ("decoder.norm_out", "decoder.conv_norm_out"),
]


@pytest.fixture
def original():
    return {split_parameter(name)[0]: {"weight": (Place(name),)} for name, _ in ldm_vae(1)}


@pytest.mark.parametrize(("ldm", "diffusers"), PAIRS)
def test_a_module_is_found_under_its_other_name(original, ldm: str, diffusers: str) -> None:
    shapes = dict(ldm_vae(1))
    assert vae.aliases(original, shapes)[diffusers] == original[ldm]


def test_the_way_back_gives_every_original_name(original) -> None:
    shapes = dict(ldm_vae(1))
    older = ("query", "key", "value", "proj_attn")
    diffusers = {
        path: {"weight": (Place(path),)}
        for path in vae.aliases(original, shapes)
        if not path.endswith((*older, ".to_out"))
    }
    found = vae.aliases(diffusers, dict.fromkeys(diffusers, (1, 1)))
    same_names = {path for path in original if path.endswith(("conv_in", "conv_out", "quant_conv"))}
    assert {path for path in found if path in original} == set(original) - same_names
    for ldm, other in PAIRS:
        assert found[ldm] == diffusers[other]
