import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models import dit, mlp, unet
from diffjax.nn import POLICIES, remat

SHAPE = (8, 8, 1)
BUILD = {
    "dit": lambda **more: dit(shape=SHAPE, patch=2, width=32, depth=6, heads=4, **more),
    "dit, unrolled": lambda **more: dit(shape=SHAPE, patch=2, width=32, depth=6, heads=4, scan=False, **more),
    "mlp": lambda **more: mlp(shape=SHAPE, width=64, depth=8, **more),
    "unet": lambda **more: unet(
        shape=SHAPE, width=16, mults=(1, 1), blocks=2, attention=(), head_width=16, groups=4, **more
    ),
}


def step(model):
    """The gradient of a loss, compiled: cheaply, as only its memory is looked at."""

    def loss(params, x, t):
        return jnp.mean(model.apply(params, x, t) ** 2)

    params = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((64, *SHAPE), jnp.float32)
    lowered = jax.jit(jax.grad(loss)).lower(params, x, jax.ShapeDtypeStruct((64,), jnp.float32))
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.slow
def test_recomputing_lowers_the_peak_of_the_compiled_step():
    # In a scan. Of unrolled blocks XLA's CPU back end merges the two computations, so for these see the next test.
    memory = {p: step(BUILD["dit"](remat=p)).memory_analysis().temp_size_in_bytes for p in ("none", "full")}
    assert memory["full"] < memory["none"] / 1.5, memory


def kept(f, *args):
    """Shapes of what the backward pass is given, arguments included: the leaves of the function of `jax.vjp`."""
    return sorted(leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args)))


@pytest.mark.often("dit, unrolled")
@pytest.mark.parametrize("name", ["mlp", "unet", "dit, unrolled"])
def test_recomputing_asks_for_fewer_kept_activations(name):
    def size(policy):
        model = BUILD[name](remat=policy)
        params = jax.eval_shape(model.init, jax.random.key(0))
        x, t = jax.ShapeDtypeStruct((64, *SHAPE), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.float32)
        loss = lambda params, x, t: jnp.mean(model.apply(params, x, t) ** 2)
        return sum(math.prod(s) for s in kept(loss, params, x, t) if 64 in s[:1])

    assert size("full") < size("none") / 1.5


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_change_no_gradient(policy):
    x, w = jax.random.normal(jax.random.key(0), (2, 4, 4))

    def loss(f, w):
        for _ in range(3):
            x_new = f(x, w)
        return jnp.sum(x_new**2)

    block = lambda x, w: jnp.tanh(x @ w) @ w
    gradient = lambda f: jax.jit(jax.grad(lambda w: loss(f, w)))(w)
    np.testing.assert_allclose(gradient(remat(block, policy)), gradient(block), rtol=1e-6)


def test_what_each_policy_keeps():
    def block(x, w):
        h = jnp.sin(x @ w)  # a product with weights
        return jnp.sin(jnp.einsum("btc,bsc->bts", h, h))  # one of activations with each other

    x, w = jnp.ones((2, 3, 5)), jnp.ones((5, 7))
    inputs = [(2, 3, 5), (5, 7)]
    assert kept(remat(block, "full"), x, w) == inputs
    assert kept(remat(block, "dots_no_batch"), x, w) == sorted([*inputs, (2, 3, 7)])
    assert kept(remat(block, "dots"), x, w) == sorted([*inputs, (2, 3, 3), (2, 3, 7)])


def test_settings_from_before_the_policies_still_mean_the_same():
    assert BUILD["mlp"](remat=True).config["remat"] is True
    with pytest.raises(ValueError, match="remat='ful': known: none, full, dots, dots_no_batch; did you mean 'full'"):
        BUILD["mlp"](remat="ful")
