"""Gradients that are sums over rows, tokens or pixels, in networks that compute in bfloat16.

Added one by one in bfloat16, like terms stop counting when the sum is 256 times as large as one of them. XLA's CPU back
end does so where a sum runs over several axes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax.nn import Condition, Conv, Linear, SelfAttention, modulate, plus, times

ROWS = 4096


def gradient_of_mean(module, x):
    """By the parameters, of the mean over rows of the sum over channels."""
    graph, params = nnx.split(module)
    return jax.jit(jax.grad(lambda p: nnx.merge(graph, p)(x).astype(jnp.float32).sum() / ROWS))(params)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (lambda **kwargs: Linear(2, 4, **kwargs), (16, 256, 2)),
        (lambda **kwargs: Conv(2, 4, **kwargs), (16, 16, 16, 2)),
    ],
)
def test_a_bias_counts_every_row(layer, shape):
    grads = gradient_of_mean(layer(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), jnp.zeros(shape))
    assert grads["bias"][...].dtype == jnp.float32
    np.testing.assert_array_equal(grads["bias"][...], np.ones(4))  # 4096 times 2**-12


def test_the_bias_of_the_values_counts_every_token():
    # With keys of zero every token is given the mean of all values, and so their bias.
    layer = SelfAttention(2, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.out.kernel[...] = jnp.eye(2)
    grads = gradient_of_mean(layer, jnp.zeros((16, 256, 2)))
    np.testing.assert_allclose(grads["qkv"]["bias"][...], [0, 0, 0, 0, 1, 1], atol=1e-6)


def test_a_shift_and_a_scale_count_every_token():
    x = jnp.ones((1, 16, 256, 2), jnp.bfloat16)
    zero = jnp.zeros((1, 2), jnp.bfloat16)
    mean = lambda shift, scale: modulate(x, shift, scale).astype(jnp.float32).sum() / ROWS
    for grad in jax.jit(jax.grad(mean, (0, 1)))(zero, zero):
        np.testing.assert_array_equal(grad.astype(np.float32), np.ones((1, 2)))


def test_the_row_of_a_label_counts_every_sample():
    settings = dict(waves=2, time_embed="sinusoidal", time_scale=1.0, dtype=jnp.bfloat16)
    graph, params = nnx.split(Condition(2, 1, **settings, rngs=nnx.Rngs(0)))
    t, y = jnp.zeros(ROWS), jnp.zeros(ROWS, jnp.int32)
    grads = jax.jit(jax.grad(lambda p: nnx.merge(graph, p)(t, y).astype(jnp.float32).sum() / ROWS))(params)
    np.testing.assert_array_equal(grads["label"]["embedding"][...], [[1, 1], [0, 0]])


def test_in_float32_they_are_the_operators():
    rng = np.random.default_rng(0)
    x, dx = rng.normal(size=(2, 2, 5, 3, 4)).astype(np.float32)
    a, da = rng.normal(size=(2, 2, 1, 1, 4)).astype(np.float32)
    for ours, plain in ((plus, jnp.add), (times, jnp.multiply)):
        ways = lambda f: (*jax.jvp(f, (x, a), (dx, da)), *jax.vjp(f, x, a)[1](dx))
        both = [jax.jit(ways, static_argnums=0)(f) for f in (ours, plain)]
        for got, wanted in zip(*both, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_nothing_of_the_size_of_x_is_kept_for_a_factor():
    x, a = jnp.ones((8, 3)), jnp.ones((1, 3))
    kept = jax.tree.leaves(jax.eval_shape(lambda x, a: jax.vjp(times, x, a)[1], x, a))
    assert sorted(leaf.shape for leaf in kept) == [(1, 3), (8, 3)]
