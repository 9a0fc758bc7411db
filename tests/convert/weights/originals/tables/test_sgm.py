"""Names of SDXL's modules in the code of its authors, which kohya's scripts are built on."""

import pytest

from diffjax.convert.weights.originals.tables.sgm import sgm_name

NAMES = {
    "conv_in": "input_blocks.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": "input_blocks.4.1.transformer_blocks.1.attn2.to_k",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
    "up_blocks.1.resnets.2.conv_shortcut": "output_blocks.5.0.skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "encoder.layers.0.self_attn.q_proj": None,
}


@pytest.mark.parametrize("module", NAMES)
def test_sgm_name(module):
    assert sgm_name(module, 2, (True, True, False)) == NAMES[module]


def test_an_upsampler_follows_the_attention_that_there_is():
    # Stable Diffusion 1 and 2, whose coarsest level has none.
    assert sgm_name("up_blocks.0.upsamplers.0.conv", 2, (False, True, True, True)) == "output_blocks.2.1.conv"
    assert sgm_name("up_blocks.1.upsamplers.0.conv", 2, (False, True, True, True)) == "output_blocks.5.2.conv"
