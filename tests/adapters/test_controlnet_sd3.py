"""The ControlNet of Stable Diffusion 3: what its residuals do to the denoiser, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import params_of

from diffjax.models import from_config

SHARED = dict(
    sample_size=8, in_channels=2, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=6,
    caption_projection_dim=8, pooled_projection_dim=5, pos_embed_max_size=6,
)  # fmt: skip
DENOISER = from_config(dict(SHARED, _class_name="SD3Transformer2DModel", num_layers=3, out_channels=2))
LARGE = dict(SHARED, _class_name="SD3ControlNetModel", num_layers=2, joint_attention_dim=None, use_pos_embed=False)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X, T, CONTEXT, POOLED = normal(0, 2, 4, 8, 2), jnp.array([5, 900]), normal(1, 2, 3, 6), normal(2, 2, 5)
CONTROL = normal(3, 2, 4, 8, 2)


@pytest.mark.slow
def test_residuals_of_zero_leave_every_bit():
    net = from_config(dict(SHARED, _class_name="SD3ControlNetModel", num_layers=1), scan=False)
    # One operation after the other: within one program XLA may round the last bit of a fused sum another way.
    denoiser = from_config(dict(DENOISER.config, num_layers=2), scan=False)
    params, learnt = params_of(denoiser), params_of(net)
    # Its last layers as they are made; the others have no part in what it says then.
    made = {name: learnt[name] for name in learnt if name != "controlnet_blocks"}
    made |= jax.jit(lambda key: {"controlnet_blocks": net.init(key)["controlnet_blocks"]})(jax.random.key(6))
    residuals = lambda params, scale: net.apply(params, X, T, CONTEXT, POOLED, CONTROL, scale=scale)
    denoise = lambda given: denoiser.apply(params, X, T, CONTEXT, POOLED, residuals=given)
    alone = denoise(None)
    # As it is made, and at scale 0 whatever it has learnt.
    for given in (residuals(made, 1.0), residuals(learnt, 0.0)):
        assert all((a == 0).all() for a in given)
        np.testing.assert_array_equal(denoise(given), alone)
    assert np.abs(denoise(residuals(learnt, 1.0)) - alone).max() > 0.01


def test_a_fresh_one_learns():
    net = from_config(dict(LARGE))
    tokens = normal(7, 2, 8, 8)
    loss = lambda params: sum(jnp.sum(a * (1 + a)) for a in net.apply(params, tokens, T, None, POOLED, CONTROL))
    gradients = jax.jit(jax.grad(loss))(jax.jit(net.init)(jax.random.key(6)))
    assert np.abs(gradients["controlnet_blocks"]["0:2"]["kernel"]).max() > 0.01


def test_the_text_has_no_order():
    # Joint attention without positions of the text is a sum over its tokens.
    params = params_of(DENOISER)
    run = jax.jit(lambda context: DENOISER.apply(params, X, T, context, POOLED))
    out = run(CONTEXT)
    # Other orders of the same sums.
    np.testing.assert_allclose(run(CONTEXT[:, jnp.array([2, 0, 1])]), out, atol=1e-5 * np.abs(out).max())
    assert np.abs(run(CONTEXT.at[:, 0].set(0)) - out).max() > 1e-3


def test_one_without_positions_takes_the_tokens_of_the_denoiser():
    net = from_config(dict(LARGE))
    params = jax.jit(net.init)(jax.random.key(6))
    shapes = jax.eval_shape(DENOISER.init, jax.random.key(4))
    tokens = jax.eval_shape(lambda params: DENOISER.apply(params, X, method="tokens"), shapes)
    assert tokens.shape == (2, 8, 8)
    tokens = normal(7, *tokens.shape)
    residuals = jax.jit(net.apply)(params, tokens, T, None, POOLED, CONTROL)
    assert [a.shape for a in residuals] == [tokens.shape] * 2
    for wrong, message in ((X, "x has shape"), (tokens[:, 1:], r"x has shape \(2, 7, 8\); expected \[2, 8, 8\]")):
        with pytest.raises(ValueError, match=message):
            net.apply(params, wrong, T, None, POOLED, CONTROL)
    with pytest.raises(ValueError, match="takes no context"):
        net.apply(params, tokens, T, CONTEXT, POOLED, CONTROL)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(caption_projection_dim=9), "caption_projection_dim=9.* num_attention_heads \\* attention_head_dim = 8"),
        (dict(qk_norm="l2"), "qk_norm='l2' is not supported; supported: None, 'layer_norm'"),
        (dict(pos_embed_max_size=0), "pos_embed_max_size=0: expected an integer >= 1"),
        (dict(dual_attention_layers=3), "dual_attention_layers=3: expected tuple"),
        (dict(num_layers=0), "num_layers=0: expected an integer >= 1"),
        (dict(pos_embed_type="rope"), "pos_embed_type='rope' is not supported; supported: 'sincos', None"),
        (dict(pos_embed_typo=1), "unknown setting 'pos_embed_typo'.*did you mean 'pos_embed_type'"),
    ],
)
def test_what_makes_no_network_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_config(dict(SHARED, _class_name="SD3ControlNetModel") | change)


@pytest.mark.parametrize(
    "given, keywords, message",
    [
        ((normal(0, 2, 5, 8, 2), T, CONTEXT, POOLED), {}, "patch_size=2 does not divide the sides of x, 5, 8"),
        ((normal(0, 2, 4, 14, 2), T, CONTEXT, POOLED), {}, r"x has shape \(2, 4, 14, 2\).*sides up to 12 only"),
        ((X, T, CONTEXT, POOLED[:1]), {}, r"pooled has shape \(1, 5\); expected \[2, 5\]"),
        ((X, T, CONTEXT, POOLED), dict(residuals=()), "residuals are empty"),
        ((X, T, CONTEXT, POOLED), dict(residuals=[X]), r"residuals\[0\] has shape .*expected \[2, 8, 8\]"),
        ((X, T, CONTEXT, POOLED), dict(skip_layers=[3]), "skip_layers has 3; the layers are 0 to 2"),
    ],
)
def test_inputs_that_do_not_fit_are_told(given, keywords, message):
    shapes = jax.eval_shape(DENOISER.init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: DENOISER.apply(params, *given, **keywords), shapes)
