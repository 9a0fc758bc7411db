"""A module as pure functions: what is accepted, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax.nn import Fixed, Linear, functional, rngs_of, stack


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.Dict({f"layer{i}": nnx.Linear(3, 3, rngs=rngs) for i in range(12)})

    def __call__(self, x):
        for i in range(12):
            x = jnp.tanh(self.layers[f"layer{i}"](x))
        return x

    def first(self, x):
        return self.layers["layer0"](x)


@pytest.fixture(scope="module")
def net():
    return functional(lambda rngs: Net(rngs))


@pytest.fixture(scope="module")
def params(net):
    return jax.jit(net.init)(jax.random.key(0))


def test_parameters_are_a_plain_dict_and_the_function_uses_each_by_name(net, params):
    assert type(params) is dict and type(params["layers"]) is dict
    x = np.linspace(-1, 1, 6).reshape(2, 3).astype(np.float32)
    expected = x
    for i in range(12):
        layer = params["layers"][f"layer{i}"]
        expected = np.tanh(expected @ layer["kernel"] + layer["bias"])
    np.testing.assert_allclose(net.apply(params, x), expected, atol=1e-6)
    first = x @ params["layers"]["layer0"]["kernel"]
    np.testing.assert_allclose(net.apply(params, x, method="first"), first, atol=1e-6)


def test_insertion_order_of_the_dict_does_not_matter(net, params):
    x = jnp.ones((2, 3))
    backwards = {"layers": dict(reversed(params["layers"].items()))}
    np.testing.assert_array_equal(net.apply(backwards, x), net.apply(params, x))


class Two(nnx.Module):
    """Two stacked layers, each on an input of its own."""

    def __init__(self, rngs):
        self.layers = stack(lambda rngs: Linear(3, 2, dtype=jnp.float32, rngs=rngs), 0, 2, rngs=rngs)

    def __call__(self, x):
        return jax.vmap(lambda layer, x: layer(x))(self.layers["0:2"], x)


def test_arrays_of_numpy_are_parameters_too():
    two = functional(lambda rngs: Two(rngs))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), two.shapes)
    np.testing.assert_array_equal(jax.jit(lambda x: two.apply(params, x))(jnp.ones((2, 3))), 4)


def test_shapes_say_what_init_returns(net, params):
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), net.shapes)


def test_parameters_of_another_type_and_those_that_are_fixed():
    class Sized(nnx.Module):
        def __init__(self, rngs):
            self.count, self.kernel = nnx.Param(jnp.arange(3)), nnx.Param(jnp.ones(3))
            self.waves = nnx.Dict({"0": Fixed(jnp.ones(2))})

    net = functional(Sized, "bfloat16")
    assert net.fixed == ("waves/0",)
    types = jax.tree.map(lambda a: str(a.dtype), net.shapes)
    assert types == {"count": "int32", "kernel": "bfloat16", "waves": {"0": "bfloat16"}}
    assert jax.tree.map(lambda a: str(a.dtype), net.init(jax.random.key(0))) == types


def test_a_renamed_leaf_is_refused(net, params):
    layers = dict(params["layers"])
    layers["layer99"] = layers.pop("layer3")
    with pytest.raises(ValueError, match=r"missing layers/layer3/bias.*unexpected layers/layer99/bias"):
        net.apply({"layers": layers}, jnp.ones((2, 3)))


def test_a_missing_and_a_wrong_leaf_are_refused(net, params):
    layers = {name: layer for name, layer in params["layers"].items() if name != "layer7"}
    with pytest.raises(ValueError, match="missing layers/layer7/bias, layers/layer7/kernel, unexpected nothing"):
        net.apply({"layers": layers}, jnp.ones((2, 3)))
    layers = dict(params["layers"], layer7={"kernel": jnp.ones((3, 4)), "bias": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"layers/layer7/kernel \(3, 4\) instead of \(3, 3\)"):
        net.apply({"layers": layers}, jnp.ones((2, 3)))


def test_hidden_state_is_refused():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.drop = nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    with pytest.raises(ValueError, match="drop"):
        functional(lambda rngs: Noisy(rngs))


def test_keys_are_those_of_flax():
    key = jax.random.key(3)
    ours, flax = rngs_of(key), nnx.Rngs(key)
    for _ in range(3):
        assert jax.random.key_data(ours.params()).tolist() == jax.random.key_data(flax.params()).tolist()
    layer = lambda rngs: nnx.Linear(3, 4, bias_init=nnx.initializers.normal(), rngs=rngs)
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(getattr(layer(rngs_of(key)), leaf)[...], getattr(layer(nnx.Rngs(key)), leaf)[...])
