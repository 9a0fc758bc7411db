"""Stages of U-Nets: what is computed again for the backward pass, and settings that make none."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from diffjax.models import from_config
from diffjax.models.unets.blocks import MidStage, Stage
from diffjax.nn import Compute, functional
from diffjax.nn.functional import names_of


def products(jaxpr, inside=False):
    """For each product of attention, with an axis for the samples, whether it is computed again."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.params["dimension_numbers"][1][0]:
            yield inside
        again = inside or "policy" in equation.params
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner, again)


def mid(kind, remat):
    stage = Stage(kind, 8, 1, 8, head_width=4, heads=2, depth=(1,), context_width=32, groups=4, attention_groups=4)
    compute = Compute(remat=remat)
    net = functional(lambda rngs: MidStage(stage, compute=compute, rngs=rngs))
    x, temb, context = jnp.zeros((2, 4, 4, 8)), jnp.zeros((2, 8)), jnp.zeros((2, 3, 32))
    return jax.make_jaxpr(net.apply)(net.shapes, x, temb, context)


def uvit(remat):
    config = dict(_class_name="UViT", img_size=4, patch_size=2, embed_dim=8, depth=2, num_heads=1)
    model = from_config(config, remat=remat)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.make_jaxpr(model.apply)(params, jnp.zeros((2, 4, 4, 3)), jnp.zeros(2))


@pytest.mark.parametrize(
    "trace, count",
    [
        (lambda remat: mid("UNetMidBlock2D", remat), 2),
        (lambda remat: mid("UNetMidBlock2DCrossAttn", remat), 4),
        (lambda remat: mid("UNetMidBlock2DSimpleCrossAttn", remat), 2),
        (uvit, 6),
    ],
    ids=["self", "cross", "added", "uvit"],
)
def test_every_attention_is_computed_again(trace, count):
    assert list(products(trace("full").jaxpr)) == [True] * count
    assert list(products(trace("none").jaxpr)) == [False] * count


TINY = dict(
    _class_name="UNet2DConditionModel", block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
    attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=6,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
PLAIN = dict(
    _class_name="UNet2DModel", block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
)  # fmt: skip
SIMPLE = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(norm_num_groups=3), "norm_num_groups=3 does not divide .* 8; the nearest"),
        (dict(norm_num_groups=0), "norm_num_groups=0: expected an integer >= 1"),
        (dict(attention_head_dim=None), "attention_head_dim=None: expected int"),
        (dict(attention_head_dim=9), "attention_head_dim=9: its transformers need .* at most .*, 8"),
        (dict(attention_head_dim=3, down_block_types=SIMPLE), "attention_head_dim=3 does not divide the channels 8"),
        (dict(transformer_layers_per_block=(1, 1, 1)), "transformer_layers_per_block has 3 values for 2 block_out"),
        (dict(transformer_layers_per_block=((1,), (1,))), "needs reverse_transformer_layers_per_block"),
        (
            dict(transformer_layers_per_block=((1,), 1), reverse_transformer_layers_per_block=(1, (1,))),
            r"reverse_transformer_layers_per_block=.*: \(1,\) is for a stage of 2 layers",
        ),
        (dict(addition_embed_type="text_time", projection_class_embeddings_input_dim=9), "addition_time_embed_dim"),
        (dict(addition_embed_type="image"), "addition_embed_type='image' needs encoder_hid_dim"),
        (dict(addition_embed_type="text"), "addition_embed_type_num_heads=64 does not divide .* 6"),
        (dict(encoder_hid_dim=4, cross_attention_dim=(6, 6)), r"cross_attention_dim=\(6, 6\): one number is needed"),
        (dict(time_embedding_type="fourier", time_embedding_dim=7), "time_embedding_dim=7: .*even"),
        (dict(layers_per_block=0), "layers_per_block=0: expected an integer >= 1"),
        (dict(layers_per_block=(1, 0)), "layers_per_block=0: expected an integer >= 1"),
        (dict(downsample_padding=2), "downsample_padding=2 is not supported; supported: 0, 1"),
        (dict(PLAIN, norm_num_groups=3), "norm_num_groups=3 does not divide the channels 8"),
        (dict(PLAIN, layers_per_block=0), "layers_per_block=0: expected an integer >= 1"),
        (dict(PLAIN, attention_head_dim=9), "attention_head_dim=9: expected channels of a head, at most 8"),
    ],
)
def test_settings_that_make_no_stages(change, message):
    with pytest.raises(ValueError, match=message):
        from_config((TINY if "_class_name" not in change else {}) | change)


def test_a_transformer_may_have_no_layers():
    model = from_config(dict(TINY, transformer_layers_per_block=(0, 1)))
    names = names_of(jax.eval_shape(model.init, jax.random.key(0)))
    assert "down_blocks/0/attentions/0/proj_out/kernel" in names
    assert {name.partition("/attn")[0] for name in names if "/attn1/" in name} == {
        "mid_block/attentions/0/transformer_blocks/0:1"
    }


LABELS = "class_embed_type=None, num_class_embeds=None"
CONTROL = dict(
    {k: v for k, v in TINY.items() if k != "up_block_types"}, _class_name="ControlNetModel",
    conditioning_embedding_out_channels=(4, 4),
)  # fmt: skip


@functools.cache
def built(config):
    model = from_config(json.loads(config))
    return model, jax.eval_shape(model.init, jax.random.key(0))


def call(config, given):
    model, params = built(json.dumps(config))
    shapes = dict(x=(2, 4, 4, 4), t=(2,), context=(2, 3, 6)) | given
    arrays = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items() if isinstance(v, tuple)}
    arrays |= {k: [jax.ShapeDtypeStruct(a, jnp.float32) for a in v] for k, v in shapes.items() if isinstance(v, list)}
    return jax.eval_shape(model.apply, params, arrays.pop("x"), arrays.pop("t"), **arrays)


FULL = [(2, 4, 4, 8), (2, 2, 2, 8), (2, 2, 2, 8)]


@pytest.mark.parametrize(
    "change, given, message",
    [
        ({}, dict(y=(2,)), f"y is given, but the network has no use for it .{LABELS}.; leave it out"),
        ({}, dict(pooled=(2, 5)), "pooled is given, but .*addition_embed_type=None"),
        ({}, dict(time_ids=(2, 6)), "time_ids is given, but .*addition_embed_type=None"),
        ({}, dict(image=(2, 5)), "image is given, but .*encoder_hid_dim_type=None, addition_embed_type=None"),
        ({}, dict(hint=(2, 32, 32, 3)), "hint is given, but .*addition_embed_type=None"),
        ({}, dict(cond=(2, 5)), "cond is given, but .*time_cond_proj_dim=None"),
        ({}, dict(context=None), "this network needs context"),
        ({}, dict(context=(2, 3, 5)), r"context has shape \(2, 3, 5\); expected \[2, any, 6\]"),
        ({}, dict(context=(1, 3, 6)), "context has shape"),
        ({}, dict(mask=(2, 4)), r"mask has shape \(2, 4\); expected \[2, 3\]"),
        (dict(time_cond_proj_dim=5), dict(cond=(2, 4)), r"cond has shape \(2, 4\); expected \[2, 5\]"),
        (dict(num_class_embeds=5), dict(y=(3,)), r"y has shape \(3,\); expected \[2\]"),
        (
            dict(addition_embed_type="text_time", addition_time_embed_dim=2, projection_class_embeddings_input_dim=9),
            dict(pooled=(2, 5), time_ids=(2, 3)),
            "pooled has 5 channels and 3 time_ids 6; together .*input_dim=9",
        ),
        (dict(addition_embed_type="text_image"), dict(pooled=(2, 6), image=(2, 5)), r"image has .*\[2, 6\]"),
        ({}, dict(mid_residual=(2, 4, 4, 8)), r"mid_residual of shapes \[\(2, 4, 4, 8\)\]"),
        ({}, dict(adapter=FULL[:1]), "1 features of an adapter; expected 2, .* or 3 with one for the middle"),
        ({}, dict(adapter=[*FULL, FULL[-1]]), "4 features of an adapter"),
        ({}, dict(adapter=[*FULL[:2], FULL[0]]), r"adapter\[2\] has shape \(2, 4, 4, 8\); expected \[2, 2, 2, 8\]"),
        (dict(mid_block_type=None), dict(adapter=FULL), "3 features of an adapter; expected 2, one for each"),
        (
            dict(up_block_types=("ResnetUpsampleBlock2D", "UpBlock2D")),
            dict(x=(2, 5, 4, 4)),
            "x is 5x4: ResnetUpsampleBlock2D makes 6x4 where the way down had 5x4",
        ),
        (CONTROL, dict(picture=(1, 8, 8, 3)), r"picture has shape \(1, 8, 8, 3\); expected \[2, 8, 8, 3\]"),
        (CONTROL, dict(picture=(2, 8, 8, 3), pooled=(2, 5)), "ControlNetModel: pooled is given"),
        (PLAIN | dict(in_channels=4), dict(context=None, x=(2, 5, 4, 4)), "x is 5x4; .* sides divisible by 2"),
        (PLAIN | dict(in_channels=4), dict(context=None, y=(2,)), f"has no use for y .{LABELS}"),
        (PLAIN | dict(in_channels=4, num_class_embeds=3), dict(context=None, y=(1,)), "y has shape"),
    ],
)
def test_inputs_that_do_not_fit(change, given, message):
    with pytest.raises(ValueError, match=message):
        call(change if "_class_name" in change else TINY | change, given)


def test_sides_that_are_odd_come_back():
    # The means of the one and the convolution of the other make different halves, and the way up follows both.
    down = ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D")
    assert call(TINY | dict(down_block_types=down), dict(x=(2, 5, 7, 4))).shape == (2, 5, 7, 4)
