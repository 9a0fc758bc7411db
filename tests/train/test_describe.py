"""What `inspect` counts, against hand counts and against XLA where XLA counts right."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from diffjax.train import describe


def count(f, *shapes):
    return describe.flops(jax.make_jaxpr(f)(*(jnp.zeros(s) for s in shapes)).jaxpr)


def test_flops_of_products_scans_and_branches():
    matmul = 2 * 3 * 5 * 7
    assert count(jnp.matmul, (3, 5), (5, 7)) == matmul
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * matmul
    assert count(jax.jit(jnp.matmul), (3, 5), (5, 7)) == matmul
    repeat = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=6)[0]
    assert count(repeat, (3, 5), (5, 5)) == 6 * 2 * 3 * 5 * 5
    branch = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)
    assert count(branch, (3, 5), (5, 5)) == 2 * 2 * 3 * 5 * 5


@pytest.mark.parametrize("groups", [1, 4])
def test_flops_of_a_convolution_and_its_gradients(groups):
    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    # Each of the 2 x 6 x 6 x 12 outputs is a sum of 3 x 3 x 8 / groups products.
    once = 2 * (2 * 6 * 6 * 12) * 9 * 8 // groups
    shapes = (2, 8, 8, 8), (3, 3, 8 // groups, 12)
    assert count(conv, *shapes) == once
    if groups == 1:
        # Forward, the weights' gradient with as many products, the input's with the zeros of its padding, at 8 x 8.
        grads = jax.grad(lambda x, w: conv(x, w).sum(), argnums=(0, 1))
        assert count(grads, *shapes) == pytest.approx(2 * once + once * 8 * 8 / (6 * 6))


def test_flops_agree_with_xla_on_a_network_without_loops():
    from diffjax.train.parts import prepare
    from diffjax.train.setup import abstract_batch
    from diffjax.train.state import abstract_state
    from diffjax.train.step import make_train_step

    config, parts = prepare(ConfigDict(dict(batch_size=64, model=dict(name="mlp", width=128, depth=2))))
    step, inputs = make_train_step(parts, config), (abstract_state(parts), abstract_batch(config, parts))
    ours = describe.flops(jax.make_jaxpr(step)(*inputs).jaxpr)
    xla = jax.jit(step).lower(*inputs).cost_analysis()["flops"]
    # XLA counts the elementwise operations as well, of which random numbers and Adam have many.
    assert 0.5 * xla < ours < xla
