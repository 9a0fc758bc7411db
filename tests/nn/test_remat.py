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


@pytest.mark.parametrize(
    "name", ["dit", "mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dit, unrolled", "unet"))]
)
def test_recomputing_lowers_the_peak_of_the_compiled_step(name):
    memory = {
        policy: step(BUILD[name](remat=policy)).memory_analysis().temp_size_in_bytes for policy in ("none", "full")
    }
    # By how much depends on what a block holds beside its input; a third off is less than any of these saves.
    assert memory["full"] < memory["none"] / 1.5, memory


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_change_no_gradient(policy):
    x, w = jax.random.normal(jax.random.key(0), (2, 4, 4))

    def loss(f, w):
        for _ in range(3):
            x_new = f(x, w)
        return jnp.sum(x_new**2)

    block = lambda x, w: jnp.tanh(x @ w) @ w
    want = jax.grad(lambda w: loss(block, w))(w)
    np.testing.assert_allclose(jax.grad(lambda w: loss(remat(block, policy), w))(w), want, rtol=1e-6)


def saved(policy, f, *args):
    """Shapes of what is kept for the backward pass besides the arguments."""
    from jax.ad_checkpoint import saved_residuals

    return sorted(a.shape for a, why in saved_residuals(remat(f, policy), *args) if "argument" not in why)


def test_what_each_policy_keeps():
    def block(x, w):
        h = jnp.sin(x @ w)  # a product with weights
        return jnp.sin(jnp.einsum("btc,bsc->bts", h, h))  # one of activations with each other

    x, w = jnp.ones((2, 3, 5)), jnp.ones((5, 7))
    assert saved("full", block, x, w) == []
    assert saved("dots_no_batch", block, x, w) == [(2, 3, 7)]
    assert saved("dots", block, x, w) == [(2, 3, 3), (2, 3, 7)]


def test_settings_from_before_the_policies_still_mean_the_same():
    assert BUILD["mlp"](remat=True).config["remat"] is True
    with pytest.raises(ValueError, match="remat='ful': known: none, full, dots, dots_no_batch; did you mean 'full'"):
        BUILD["mlp"](remat="ful")
