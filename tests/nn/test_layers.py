"""Attention, convolutions and residual blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax.nn import Conv, DiTBlock, MLPBlock, PixelAttention, ResBlock, SelfAttention, double, halve


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_attention_against_a_loop_in_float64(run):
    layer = SelfAttention(12, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = normal(2, 5, 12)
    w, b = (np.asarray(a[...], np.float64) for a in (layer.qkv.kernel, layer.qkv.bias))
    out_w, out_b = (np.asarray(a[...], np.float64) for a in (layer.out.kernel, layer.out.bias))
    expected = np.zeros((2, 5, 12))
    for i in range(2):
        q, k, v = np.split(x[i] @ w + b, 3, axis=-1)
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(4.0))
            expected[i][:, part] = weights / weights.sum(-1, keepdims=True) @ v[:, part]
    np.testing.assert_allclose(run(layer, x), expected @ out_w + out_b, atol=1e-5)


def test_pixel_attention_is_the_identity_at_first_and_equivariant(run):
    layer = PixelAttention(8, 2, groups=4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = normal(2, 3, 4, 8)
    np.testing.assert_array_equal(run(layer, x), x)
    layer.attention.out.kernel[...] = normal(8, 8)
    order = np.random.default_rng(1).permutation(12)
    shuffled = x.reshape(2, 12, 8)[:, order].reshape(x.shape)
    expected = np.asarray(run(layer, x)).reshape(2, 12, 8)[:, order].reshape(x.shape)
    np.testing.assert_allclose(run(layer, shuffled), expected, atol=2e-5)


def test_resampling():
    x = normal(2, 4, 6, 3)
    np.testing.assert_array_equal(double(x), x.repeat(2, axis=1).repeat(2, axis=2))
    means = [[x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(halve(x), np.moveaxis(np.array(means), 2, 0), atol=1e-6)
    np.testing.assert_allclose(halve(double(x)), x, atol=1e-6)


def test_conv_is_a_correlation_with_zero_padding():
    layer = Conv(1, 1, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.zeros((1, 5, 5, 1), np.float32)
    x[0, 0, 2, 0] = 1.0
    kernel = np.asarray(layer.kernel[...])[:, :, 0, 0]
    expected = np.zeros((5, 5), np.float32)
    expected[0:2, 1:4] = kernel[::-1, ::-1][1:]
    np.testing.assert_allclose(layer(x)[0, :, :, 0], expected, atol=1e-6)


@pytest.mark.parametrize("resample, side", [(None, 4), ("up", 8), ("down", 2)])
def test_res_block_starts_as_its_skip(resample, side, run):
    layer = ResBlock(4, 4, cond_width=6, groups=2, resample=resample, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = normal(2, 4, 4, 4)
    skip = {None: x, "up": double(x), "down": halve(x)}[resample]
    assert skip.shape[1:3] == (side, side)
    np.testing.assert_allclose(run(layer, x, normal(2, 6)), skip, atol=1e-6)


def test_res_block_sees_its_condition_and_drops_with_a_key(run):
    layer = ResBlock(4, 8, cond_width=6, groups=2, dropout_rate=0.5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.conv2.kernel[...] = normal(3, 3, 8, 8)
    x = normal(2, 4, 4, 4)
    out = np.asarray(run(layer, x, normal(2, 6)))
    assert out.shape == (2, 4, 4, 8)
    assert np.abs(out - run(layer, x, normal(2, 6, seed=1))).max() > 0.1
    assert np.abs(out - run(layer, x, normal(2, 6), jax.random.key(0))).max() > 0.1


@pytest.mark.parametrize("make", [
    lambda rngs: DiTBlock(8, 2, 16, dropout_rate=0.5, dtype=jnp.float32, rngs=rngs),
    lambda rngs: MLPBlock(8, 16, cond_width=8, dropout_rate=0.5, dtype=jnp.float32, rngs=rngs),
])  # fmt: skip
def test_adaln_blocks_are_the_identity_at_first(make, run):
    layer = make(nnx.Rngs(0))
    x, cond = normal(2, 5, 8), normal(2, 8, seed=1)
    np.testing.assert_array_equal(run(layer, x, cond), x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(layer))):
        if "modulation" in str(path):
            owner = layer if "mlp" not in str(path) else layer.mlp
            name = str(path[-1].key)
            getattr(owner.modulation, name)[...] = normal(*leaf.shape)
    out = np.asarray(run(layer, x, cond))
    assert np.abs(out - x).max() > 0.1
    assert np.abs(out - run(layer, x, normal(2, 8, seed=2))).max() > 0.1
    assert np.abs(out - run(layer, x, cond, jax.random.key(0))).max() > 0.1
