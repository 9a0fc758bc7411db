import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models import dit
from diffjax.nn.attention import attend


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_and_its_gradients_are_those_of_jax(scale):
    shapes = (2, 7, 3, 8), (2, 5, 3, 8), (2, 5, 3, 8)
    given = [jax.random.normal(jax.random.key(i), shape, "float32") for i, shape in enumerate(shapes)]
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda *given, fn=fn: jnp.sum(jnp.sin(fn(*given, scale=scale))), (0, 1, 2)))(*given)
        for fn in (attend, jax.nn.dot_product_attention)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        # Scores and gradients of size 1: some roundings of float32.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)


def test_attention_in_float16_is_that_of_float32_rounded():
    given = [jax.random.normal(jax.random.key(i), (2, 7, 3, 8), "float16") for i in range(3)]
    ours, wide = jax.jit(lambda *given: (attend(*given), attend(*(a.astype("float32") for a in given))))(*given)
    assert ours.dtype == jnp.float16
    np.testing.assert_allclose(np.float32(ours), wide, rtol=2**-10, atol=1e-6)


def test_attention_of_one_query_to_one_key_is_its_value():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 1, 1, 4), "bfloat16") for i in range(3))
    np.testing.assert_array_equal(jax.jit(attend)(q, k, v), v)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_in_bfloat16_rounds_to_it_where_it_hands_on_alone(scale):
    shapes = (2, 7, 3, 8), (2, 5, 3, 8), (2, 5, 3, 8), (2, 7, 3, 8)
    *given, g = (np.asarray(jax.random.normal(jax.random.key(i), s, "bfloat16")) for i, s in enumerate(shapes))

    # Without the leave to keep results of bfloat16 in float32 between operations: the roundings are what is looked at.
    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def value_and_gradients(g, *given):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, scale=scale), *given)
        return out, *back(g)

    found = value_and_gradients(g, *given)
    q, k, v, g = (a.astype(np.float64) for a in (*given, g))
    factor, dot = scale or 8**-0.5, functools.partial(np.einsum, optimize=True)
    weights = np.exp(factor * dot("btnd,bsnd->bnts", q, k))
    weights /= weights.sum(-1, keepdims=True)

    def gradients(q, k, v, g, sign):
        """The output and the gradients for q, k, v; of sizes and with sign 1 the sums of the sizes of their terms."""
        by_weight = dot("btnd,bsnd->bnts", g, v)
        by_score = factor * weights * (by_weight + sign * (weights * by_weight).sum(-1, keepdims=True))
        yield dot("bnts,bsnd->btnd", weights, v)
        yield dot("bnts,bsnd->btnd", by_score, k)
        yield dot("bnts,btnd->bsnd", by_score, q)
        yield dot("bnts,btnd->bsnd", weights, g)

    truths, sizes = gradients(q, k, v, g, -1), gradients(*map(np.abs, (q, k, v, g)), 1)
    # Rounded to bfloat16, by 2^-8 at most: the weights and the result, or by_weight, by_score and the result. Scores,
    # the softmax and all sums are in float32.
    for a, truth, size, roundings in zip(found, truths, sizes, (2, 3, 3, 2), strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.all(np.abs(np.float64(a) - truth) <= roundings * 2**-8 * size)


@pytest.mark.often("4")
@pytest.mark.parametrize("size", [1, 4])
def test_float32_rounds_no_worse_than_jax_does(size, x64):
    # Against float64, over draws: at size 4 scores reach 40, and single errors of either vary tenfold.
    def definition(q, k, v, scale):
        return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(scale * jnp.einsum("btnd,bsnd->bnts", q, k)), v)

    def gradient(fn, given):
        return jax.grad(lambda q, k, v: jnp.sum(jnp.sin(fn(q, k, v, scale=0.3))), (0, 1, 2))(*given)

    def errors(key):
        shapes = (2, 7, 3, 8), (2, 5, 3, 8), (2, 5, 3, 8)
        keys = jax.random.split(key, 3)
        given = [size * jax.random.normal(k, s, "float32") for k, s in zip(keys, shapes, strict=True)]
        truth = gradient(definition, [a.astype("float64") for a in given])
        largest = lambda fn: [jnp.abs(a - b).max() for a, b in zip(gradient(fn, given), truth, strict=True)]
        return jnp.array(largest(attend)), jnp.array(largest(jax.nn.dot_product_attention))

    ours, theirs = jax.jit(jax.vmap(errors))(jax.random.split(jax.random.key(0), 64))
    assert np.all(np.median(ours, 0) <= 1.5 * np.median(theirs, 0))
    assert np.all(np.max(ours, 0) <= 3 * np.max(theirs, 0))


def test_scores_of_any_size_are_finite():
    q, k, v = (np.full((1, 3, 1, 2), value, np.float32) for value in (1e4, 1e4, 2.0))
    k[:, 0] *= -1
    np.testing.assert_array_equal(jax.jit(attend)(q, k, v), v)
    grads = jax.jit(jax.grad(lambda *given: jnp.sum(attend(*given)), (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_cudnn_says_what_it_needs_and_gives_way_where_it_is_not():
    q = jax.random.normal(jax.random.key(0), (1, 2, 1, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="needs bfloat16 or float16, here it is float32"):
        attend(*3 * (q.astype(jnp.float32),), implementation="cudnn")
    with pytest.raises(ValueError, match="dit: attention_impl='cudnn' needs dtype='bfloat16'"):
        dit(shape=(4, 4, 1), attention_impl="cudnn")
    with pytest.raises(ValueError, match="width=24 over heads=2 is 12"):
        dit(shape=(4, 4, 1), attention_impl="cudnn", dtype="bfloat16", width=24, heads=2)
    for width in (12, 264):
        with pytest.raises(ValueError, match=f"multiple of 8 channels, at most 256 .* here they have {width}"):
            attend(*3 * (jnp.zeros((1, 2, 1, width), jnp.bfloat16),), implementation="cudnn")
    if jax.default_backend() == "cpu":
        for a in (q, q.astype(jnp.float16)):
            np.testing.assert_array_equal(attend(a, a, a, implementation="cudnn"), attend(a, a, a))


def test_float64_attention_is_that_of_float32_but_for_rounding(x64):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 4), jnp.float64) for i in range(3))
    for scale in (None, 0.3):
        single = jax.jit(attend)(*(a.astype(jnp.float32) for a in (q, k, v)), scale)
        double = jax.jit(attend)(q, k, v, scale)
        assert single.dtype == jnp.float32 and double.dtype == jnp.float64
        # Products of some 10 float32 numbers of size 1.
        np.testing.assert_allclose(double, single, rtol=1e-5, atol=1e-6)


def test_a_shift_of_all_keys_changes_nothing_in_float64(x64):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 4), jnp.float64) for i in range(3))
    grad = jax.jit(jax.grad(lambda shift: jnp.sum(attend(q, k + shift, v) ** 2)))(jnp.zeros(4))
    # The true gradient is zero; a softmax in float32 gives 1e-7.
    assert np.abs(grad).max() < 1e-13
