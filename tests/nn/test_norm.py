"""Normalisation and dropout against float64 numpy and Flax's own layers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax.nn import GroupNorm, dropout, group_norm, layer_norm, modulate


def normal(*shape, seed=0, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1.0, shape).astype(np.float32)


@pytest.mark.parametrize("shape, groups", [((3, 4, 5, 12), 4), ((2, 7, 6), 1), ((2, 6), 6), ((2, 3, 2, 2, 8), 2)])
def test_group_norm_is_flax_group_norm(shape, groups, run):
    x, scale, bias = normal(*shape), normal(shape[-1], seed=1), normal(shape[-1], seed=2)
    theirs = nnx.GroupNorm(shape[-1], num_groups=groups, epsilon=1e-5, rngs=nnx.Rngs(0))
    theirs.scale[...], theirs.bias[...] = scale, bias
    # A group of one value normalises to rounding noise over sqrt(eps): 1e-7 / 3e-3.
    tolerance = 1e-3 if len(shape) == 2 else 1e-5
    ours = jax.jit(partial(group_norm, groups=groups))(x, scale, bias)
    np.testing.assert_allclose(ours, run(theirs, x), atol=tolerance, rtol=1e-5)


def test_group_norm_of_a_constant_is_the_bias():
    x = np.full((1, 4, 4, 4), 1000.1, np.float32)
    out = jax.jit(partial(group_norm, groups=2))(x, np.ones(4, np.float32), np.full(4, 0.5, np.float32))
    # E[x^2] - E[x]^2 of 1e6 rounds to about +-0.1 instead of 0, and could be negative without the clip.
    assert np.all(np.isfinite(out))
    np.testing.assert_allclose(out, 0.5, atol=0.3)


def test_adaptive_group_norm_modulates_the_normalised_input(run):
    x, shift, scale = normal(2, 3, 3, 8), normal(2, 8, seed=1), normal(2, 8, seed=2)
    layer = GroupNorm(8, 4)
    layer.scale[...], layer.bias[...] = normal(8, seed=3), normal(8, seed=4)
    expected = run(layer, x) * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(run(layer, x, shift, scale), expected, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_layer_norm_against_float64(mean):
    x = normal(4, 5, 96, mean=mean)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    # The mean of values of size 30 is rounded to 30 * 6e-8 * a few.
    np.testing.assert_allclose(jax.jit(layer_norm)(x), expected, atol=1e-5 if mean else 2e-6)


def test_statistics_are_float32_in_half_precision():
    x = jnp.asarray(normal(2, 4, 4, 32, mean=8.0), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    out = jax.jit(layer_norm)(x)
    assert out.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits of the result; statistics in bfloat16 would be off by 8 * 2**-8 = 0.03 before the division.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2**-7)
    grouped = jax.jit(partial(group_norm, groups=8))(x, np.ones(32, np.float32), np.zeros(32, np.float32))
    assert grouped.dtype == jnp.bfloat16


def test_modulate_broadcasts_over_the_middle():
    x, shift, scale = normal(2, 3, 5), normal(2, 5, seed=1), normal(2, 5, seed=2)
    out = np.asarray(jax.jit(modulate)(x, shift, scale))
    for i in range(2):
        expected = x[i].astype(np.float64) * (1 + scale[i]) + shift[i]
        np.testing.assert_allclose(out[i], expected, atol=1e-5)


@pytest.mark.parametrize("width", [64, 63])
def test_dropout_keeps_the_mean_and_the_rate(width):
    x = np.ones((400, width), np.float32)
    out = np.asarray(jax.jit(lambda x, key: dropout(x, 0.25, key))(x, jax.random.key(0)))
    error = (0.25 * 0.75 / out.size) ** 0.5
    assert abs((out == 0).mean() - 0.25) < 5 * error
    np.testing.assert_allclose(out[out != 0], 1 / 0.75, rtol=1e-4)
    # Entries that share a 32-bit draw are independent: the correlation of neighbours has standard error 1 / sqrt(n).
    left, right = (out[:, i : i + width - 1 : 2][:, : width // 2].ravel() for i in (0, 1))
    assert abs(np.corrcoef(left, right)[0, 1]) < 5 / len(left) ** 0.5


def test_dropout_needs_a_key_and_a_rate():
    x = jnp.asarray(normal(4, 6))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
