"""A ControlNet for FLUX.1 that says nothing changes nothing; what it is given is checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models import from_config

TINY = {
    "num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 2, "num_single_layers": 2,
    "axes_dims_rope": [2, 2, 4], "in_channels": 4, "joint_attention_dim": 6, "pooled_projection_dim": 5,
}  # fmt: skip


def network(kind, **change):
    return from_config(TINY | {"_class_name": kind} | change)


@pytest.fixture(scope="module")
def chain():
    """`run(scale, noise)`: the transformer with a ControlNet whose parameters are the initial ones with a wave of
    that height on top; `run()`: without it."""
    transformer, controlnet = network("FluxTransformer2DModel"), network("FluxControlNetModel", num_layers=1)
    shapes = dict(x=(2, 4, 4), t=(2,), context=(2, 3, 6), pooled=(2, 5))
    rng = np.random.default_rng(0)
    first = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes.values()]
    given = dict(positions=np.arange(12).reshape(4, 3))
    params, start = (jax.jit(m.init)(jax.random.key(i)) for i, m in enumerate((transformer, controlnet)))

    @jax.jit
    def run(scale, noise):
        weights = jax.tree.map(lambda a: a + noise * jnp.sin(jnp.arange(a.size)).reshape(a.shape), start)
        double, single = controlnet.apply(weights, *first, **given, cond=first[0], scale=scale)
        return transformer.apply(params, *first, **given, residuals=double, single_residuals=single)

    alone = jax.jit(lambda: transformer.apply(params, *first, **given))
    return lambda *how: np.asarray(run(*how) if how else alone())


@pytest.mark.slow
def test_what_says_nothing_changes_nothing(chain):
    alone = chain()
    np.testing.assert_array_equal(chain(1.0, 0.0), alone)
    np.testing.assert_array_equal(chain(0.0, 0.1), alone)
    assert np.abs(chain(1.0, 0.1) - alone).max() > 1e-3


def test_a_fresh_one_learns():
    model, rng = network("FluxControlNetModel", num_layers=1, num_single_layers=1), np.random.default_rng(0)
    first = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 4, 4), (2,), (2, 3, 6), (2, 5))]
    params = jax.jit(model.init)(jax.random.key(0))
    zeros = {name: params[name] for name in ("controlnet_blocks", "controlnet_single_blocks")}
    assert not any(leaf.any() for leaf in jax.tree.leaves(zeros))

    def loss(zeros):
        given = dict(cond=first[0], positions=np.arange(12).reshape(4, 3))
        return sum(jnp.sum(a * (1 + a)) for a in model.apply(params | zeros, *first, **given))

    for name, leaves in jax.jit(jax.grad(loss))(zeros).items():
        assert all(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(leaves)), name


def call(model, **change):
    given = dict(x=(2, 4, 4), t=(2,), context=(2, 3, 6), pooled=(2, 5), positions=(4, 3), cond=(2, 4, 4)) | change
    dtype = {"mode": jnp.int32}
    given = {k: jax.ShapeDtypeStruct(shape, dtype.get(k, jnp.float32)) for k, shape in given.items()}
    first = [given.pop(name) for name in ("x", "t", "context", "pooled")]
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.eval_shape(model.apply, params, *first, **given)


def test_a_network_without_blocks_of_a_kind_has_no_residuals_for_them():
    double, single = call(network("FluxControlNetModel", num_single_layers=0))
    assert double.shape == (2, 2, 4, 8) and single is None


@pytest.mark.parametrize(
    "settings, change, message",
    [
        ({}, {"mode": (2,)}, "takes no mode"),
        ({"num_mode": 3}, {}, r"needs mode, \[B\] int below 3"),
        ({}, {"cond": (2, 5, 4)}, r"cond has shape \(2, 5, 4\)"),
        ({"conditioning_embedding_channels": 4}, {"cond": (2, 16, 24, 3)}, "cond, cut into tokens, has shape"),
        ({"conditioning_embedding_channels": 3}, {}, "conditioning_embedding_channels=3 .*in_channels=4"),
    ],
)
def test_inputs_that_do_not_fit(settings, change, message):
    with pytest.raises(ValueError, match=message):
        call(network("FluxControlNetModel", **settings), **change)
