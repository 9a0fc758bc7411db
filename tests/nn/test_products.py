"""Products and convolutions with rules of their own, differentiated in every way, against XLA's own in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nn import Conv, Linear
from diffjax.nn.conv import convolution
from diffjax.nn.linear import product

LAYOUT = ("NHWC", "HWIO", "NHWC")
PAIRS = {
    "product": (product, jnp.dot, (2, 5, 3), (3, 4)),
    **{
        f"{h}x{w}": (
            convolution,
            lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT),
            (2, 6, 5, 3),
            (h, w, 3, 4),
        )
        for h, w in ((1, 1), (3, 3), (2, 4), (7, 3))
    },
}
WAYS = {
    "value": lambda f, x, k: f(x, k),
    "both": lambda f, x, k: jax.grad(f, (0, 1))(x, k),
    "input": lambda f, x, k: jax.grad(f)(x, k),
    "kernel": lambda f, x, k: jax.grad(f, 1)(x, k),
    "forward": lambda f, x, k: jax.jvp(f, (x, k), (x, k)),
    "forward, input": lambda f, x, k: jax.jvp(lambda x: f(x, k), (x,), (x,)),
    "linearised": lambda f, x, k: jax.linearize(f, x, k)[1](x, k),
    "gradient of each": lambda f, x, k: jax.vmap(jax.grad(f, (0, 1)), (0, None))(jnp.stack([x, 2 * x]), k),
    "gradient at each": lambda f, x, k: jax.vmap(jax.grad(f, (0, 1)), (None, 0))(x, jnp.stack([k, 2 * k])),
    "forward over reverse": lambda f, x, k: jax.jvp(lambda k: jax.grad(f, 1)(x, k), (k,), (k,)),
    "reverse over reverse": lambda f, x, k: jax.grad(lambda k: jnp.sum(jax.grad(f, 0)(x, k) ** 2))(k),
    "recomputed": lambda f, x, k: jax.grad(jax.checkpoint(f), (0, 1))(x, k),
    "in a loop": lambda f, x, k: jax.grad(
        lambda k: jax.lax.scan(lambda c, i: (c + f(x, i * k), None), 0.0, jnp.arange(3.0))[0]
    )(k),
}


# The suite compiles at level 0, and the forms for CPUs are made for the default, 3.
COMPILERS = None, {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def along(way, fn):
    """The way through `sum(y + y^2 / 2)` of `y = fn(x, kernel)`: a polynomial of the inputs with no negative factor."""

    def total(x, kernel):
        y = fn(x, kernel)
        return jnp.sum(y + y * y / 2)

    return jax.jit(lambda x, kernel: jax.tree.leaves(WAYS[way](total, x, kernel)))


@pytest.mark.often("product-*", "3x3-both", "3x3-gradient of each", "3x3-reverse over reverse", "2x4-both")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pair", PAIRS)
def test_derivatives_are_those_of_xla_in_float64(pair, way):
    ours, theirs, *shapes = PAIRS[pair]
    # Positive, so that nothing cancels.
    x, kernel = (np.asarray(jax.random.uniform(jax.random.key(i), s, minval=0.5)) for i, s in enumerate(shapes))
    outputs, (channels_in, channels_out) = jax.eval_shape(theirs, x, kernel).size, kernel.shape[-2:]
    with jax.enable_x64(True):
        truth = along(way, theirs)(np.float64(x), np.float64(kernel))
    lowered = along(way, ours).lower(x, kernel)
    for options in COMPILERS:
        found = lowered.compile(compiler_options=options)(x, kernel)
        for a, b in zip(found, truth, strict=True):
            assert (a.dtype, b.dtype) == (np.float32, np.float64)
            # A term passes at most so many roundings, those of the longest chain of sums and some products, each with
            # a standard error of 2^-24 / sqrt(3) at most; four of them.
            last = outputs if a.ndim == 0 else outputs // channels_out + kernel.size // channels_in
            roundings = 2 * kernel.size // channels_out + last + 8
            np.testing.assert_allclose(a, b, rtol=4 * 2**-24 * np.sqrt(roundings / 3), atol=0)


@pytest.mark.parametrize("pair", PAIRS)
def test_nothing_is_computed_for_what_is_fixed(pair):
    fn, _, *shapes = PAIRS[pair]
    x, kernel = map(jnp.ones, shapes)
    jaxpr = str(jax.make_jaxpr(lambda x: jax.jvp(lambda x: fn(x, kernel), (x,), (x,)))(x))
    # The value and the change with the input.
    assert jaxpr.count("dot_general[") + jaxpr.count("conv_general_dilated[") == 2


@pytest.mark.parametrize("make", [lambda **a: Linear(3, 4, **a), lambda **a: Conv(3, 4, **a)])
def test_gradients_of_layers_in_bfloat16_are_float32(make):
    from flax import nnx

    layer = make(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    total = lambda layer: jnp.sum(layer(jnp.ones((2, 4, 4, 3))).astype(jnp.float32))
    grads = nnx.jit(nnx.grad(total))(layer)
    assert grads["kernel"][...].dtype == jnp.float32
    # 32 ones for each weight, but for the padding of a convolution.
    assert np.asarray(grads["kernel"][...]).max() == 32
