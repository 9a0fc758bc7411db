"""What every network promises, on small ones with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models import MODELS
from diffjax.registry import build
from diffjax.train import paths

SHAPE, CLASSES = (8, 8, 2), 3
SPECS = {
    "mlp": "mlp(width=16, depth=2, dropout=0.5)",
    "unet": "unet(width=8, mults=(1, 2), blocks=1, attention=(4,), head_width=8, groups=4, dropout=0.5)",
    "dit": "dit(patch=2, width=16, depth=2, heads=2, mlp_ratio=2.0, dropout=0.5)",
}


def randomised(params, scale=0.2):
    """The parameters with noise added, so that no branch is still switched off by a zero initialisation."""
    leaves, tree = jax.tree.flatten(jax.device_get(params))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [a + scale * rng.normal(size=a.shape).astype(np.float32) for a in leaves])


@pytest.fixture(scope="module", params=SPECS)
def net(request):
    """`(model, initial parameters, randomised parameters, jitted apply)`."""
    model = build(SPECS[request.param], MODELS, "model", shape=SHAPE, num_classes=CLASSES)
    params = jax.jit(model.init)(jax.random.key(0))
    return model, params, randomised(params), jax.jit(model.apply)


@pytest.fixture(scope="module")
def inputs():
    x = jax.random.normal(jax.random.key(1), (4, *SHAPE))
    return x, jnp.array([0.1, 0.4, 0.7, 0.9]), jnp.array([0, 1, 2, 3])


def test_output_starts_at_exactly_zero(net, inputs):
    _, params, _, apply = net
    out = apply(params, *inputs)
    assert out.shape == inputs[0].shape and out.dtype == jnp.float32
    assert np.all(np.asarray(out) == 0)


def test_parameters_are_float32_and_the_config_rebuilds_the_network(net):
    model, params, _, _ = net
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    again = build(model.config, MODELS, "model")
    same = jax.jit(again.init)(jax.random.key(0))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))
    other = jax.jit(model.init)(jax.random.key(1))
    assert not jax.tree.all(jax.tree.map(np.array_equal, params, other))


def test_every_input_has_an_effect(net, inputs):
    _, _, params, apply = net
    x, t, y = inputs
    out = np.asarray(apply(params, x, t, y))
    for other in (apply(params, x + 0.1, t, y), apply(params, x, t + 0.05, y), apply(params, x, t, (y + 1) % 4)):
        # Each sample on its own: none may depend on another's input only.
        assert np.abs(out - other).max((1, 2, 3)).min() > 1e-3


@pytest.mark.often("mlp", "dit")
def test_no_label_is_the_null_label(net, inputs):
    _, _, params, apply = net
    x, t, _ = inputs
    np.testing.assert_allclose(apply(params, x, t), apply(params, x, t, jnp.full(4, CLASSES)), atol=1e-5)


def test_a_sample_alone_is_a_sample_in_a_batch(net, inputs):
    _, _, params, apply = net
    together = np.asarray(apply(params, *inputs))
    for i in range(4):
        alone = apply(params, *(a[i : i + 1] for a in inputs))[0]
        # Other batch sizes take other matrix kernels: sums of about 100 terms in another order.
        np.testing.assert_allclose(alone, together[i], atol=1e-5 * np.abs(together).max())


@pytest.mark.often("mlp", "dit")
def test_dropout_only_with_a_key(net, inputs):
    _, _, params, apply = net
    out = np.asarray(apply(params, *inputs))
    np.testing.assert_array_equal(out, apply(params, *inputs))
    first, again, second = (np.asarray(apply(params, *inputs, key=jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - out).max() > 1e-2 and np.abs(first - second).max() > 1e-2


@pytest.mark.often("mlp", "dit")
def test_gradients_are_finite_and_reach_every_parameter(net, inputs):
    model, _, params, _ = net
    grads = jax.jit(jax.grad(lambda p: (model.apply(p, *inputs) ** 2).mean()))(params)
    for name, leaf in paths.named_leaves(grads).items():
        assert np.all(np.isfinite(leaf)), name
        # A bias of a key shifts all logits of a query alike, so nothing; the other two thirds count.
        assert np.abs(leaf).max() > 1e-9, name


def test_sharding_rules_cover_every_parameter_with_its_rank(net):
    model, params, _, _ = net
    leaves = paths.named_leaves(params)
    for name, axes in paths.match(model.rules, leaves, "sharding").items():
        assert len(axes) in (0, leaves[name].ndim), name
        groups = [(axis,) if axis is None or isinstance(axis, str) else axis for axis in axes]
        flat = [axis for group in groups for axis in group if axis]
        assert set(flat) <= {"fsdp", "tensor"} and len(flat) == len(set(flat)), name
    kernels = [n for n in leaves if n.endswith("kernel")]
    assert all(any(paths.match(model.rules, [n], "sharding")[n]) for n in kernels)


@pytest.mark.often("mlp", "dit")
@pytest.mark.parametrize("name", SPECS)
def test_half_precision_stays_close(name, inputs):
    common = dict(shape=SHAPE, num_classes=CLASSES)
    wide, half = (build(SPECS[name], MODELS, "model", **common, dtype=dtype) for dtype in ("float32", "bfloat16"))
    params = randomised(jax.jit(wide.init)(jax.random.key(0)), 0.05)
    a, b = (np.asarray(jax.jit(m.apply)(params, *inputs)) for m in (wide, half))
    assert b.dtype == np.float32
    # bfloat16 rounds each layer to 2**-9; a dozen layers add up to a few per cent, a wrong cast would be all of it.
    assert 0 < np.sqrt(np.mean((a - b) ** 2)) < 0.05 * np.sqrt(np.mean(a**2))


def test_wrong_inputs_are_refused(net, inputs):
    model, _, params, _ = net
    x, t, y = inputs
    with pytest.raises(ValueError, match=r"x has shape \(4, 4, 8, 2\); this network was built for \[B, 8, 8, 2\]"):
        model.apply(params, x[:, :4], t, y)
    with pytest.raises(ValueError, match=r"t has shape \(\); expected one per sample, \[4\]"):
        model.apply(params, x, t[0], y)
    with pytest.raises(ValueError, match=r"y has shape \(3,\)"):
        model.apply(params, x, t, y[:3])
    with pytest.raises(ValueError, match="y has dtype float32; expected integer"):
        model.apply(params, x, t, y.astype(jnp.float32))
