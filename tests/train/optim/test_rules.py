"""Learning rates by rule and freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.train import paths
from diffjax.train.optim import build_optimizer

PARAMS = {
    "inp": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.array([0.0, -0.0, 1e-37])},
    "out": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)},
}
ONES = jax.tree.map(jnp.ones_like, PARAMS)
NAMES = ["adamw", "adafactor", "lion", "muon", "sgd", "schedule_free()", "schedule_free(base='sgd')"]


def trained(config, steps=3, grads=ONES):
    optimizer = build_optimizer({"lr": 0.1, **config}, steps)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_each_parameter_has_the_learning_rate_of_its_first_rule():
    rules = [("^inp/.*bias", 5.0), ("^inp/", 0.25), ("", 1.0)]
    after, _ = trained({"name": "sgd", "b1": 0.0, "lr_rules": rules}, steps=4)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), after, PARAMS)
    np.testing.assert_allclose(moved["inp"]["bias"], -0.4 * 5, rtol=1e-6)
    np.testing.assert_allclose(moved["inp"]["kernel"], -0.4 / 4, rtol=1e-5)
    np.testing.assert_allclose(moved["out"]["kernel"], -0.4, rtol=1e-5)


def test_the_rule_scales_weight_decay_as_well():
    config = {"name": "adamw", "weight_decay": 0.5, "lr_rules": [("out", 0.1), ("", 1.0)]}
    after, _ = trained(config, steps=3, grads=jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(after["out"]["kernel"], (1 - 0.1 * 0.5 * 0.1) ** 3, rtol=1e-6)


def test_lr_rules_must_cover_every_trained_parameter():
    with pytest.raises(ValueError, match="no lr rule covers out/bias, out/kernel"):
        trained({"lr_rules": [("inp", 1.0)]})
    trained({"lr_rules": [("inp", 1.0)], "freeze": ["^out/"]})


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_keep_their_bits_and_have_no_moments(name):
    config = {"name": name, "weight_decay": 0.1, "clip": 1.0}
    after, state = trained({**config, "freeze": ["^inp/", "out/bias$"]})
    free, whole = trained(config)
    for part in ("inp/kernel", "inp/bias", "out/bias"):
        a, b = (np.asarray(paths.named_leaves(tree)[part]) for tree in (after, PARAMS))
        assert a.tobytes() == b.tobytes(), part
        assert not any(leaf_name.endswith(part) for leaf_name in paths.named_leaves(state))
    assert not np.array_equal(after["out"]["kernel"], PARAMS["out"]["kernel"])
    assert not np.array_equal(free["inp"]["kernel"], PARAMS["inp"]["kernel"])
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    if name not in ("adafactor",):
        # 11 of the 17 numbers are frozen; each moment of the others has 6, each of all 17.
        moments = round((size(whole) - size(state)) / 11)
        assert moments in (1, 2) and size(whole) - size(state) == 11 * moments


def test_clipping_does_not_see_frozen_parameters():
    huge = {**ONES, "inp": jax.tree.map(lambda p: 1e6 * jnp.ones_like(p), PARAMS["inp"])}
    config = {"name": "sgd", "b1": 0.0, "clip": 1.0, "freeze": ["^inp/"]}
    after, _ = trained(config, steps=1, grads=huge)
    # The norm of eight ones.
    np.testing.assert_allclose(after["out"]["kernel"], 1 - 0.1 / 8**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"freeze": ["^inp/", "^imp/"]}, r"'\^imp/' is found in no parameter's name; names: inp/bias, inp/kernel"),
        ({"freeze": [""]}, "leaves no parameter to train"),
        ({"freeze": ["("]}, "expected regexes"),
        ({"freeze": [3]}, "expected regexes"),
        ({"lr_rules": [("", 0.0)]}, "freeze"),
        ({"lr_rules": ["inp"]}, r"expected \(regex, factor\)"),
        ({"lr_rules": [("", float("inf"))]}, "0 < factor < inf"),
    ],
)
def test_wrong_rules_say_what_is_allowed(config, message):
    with pytest.raises(ValueError, match=message):
        trained(config)


@pytest.mark.parametrize(
    "config, names",
    [
        ({}, ["0/count", "0/mu/w", "0/nu/w", "1/count"]),
        ({"name": "adamw", "clip": 1.0, "weight_decay": 0.1}, ["1/count", "1/mu/w", "1/nu/w", "3/count"]),
        ({"name": "lion", "clip": 1.0}, ["1/count", "1/mu/w", "2/count"]),
        ({"name": "sgd"}, ["0/trace/w", "1/count"]),
    ],
)
def test_the_names_in_checkpoints_stay(config, names):
    state = build_optimizer(config, 10).init({"w": jnp.ones(2)})
    assert sorted(paths.named_leaves(state)) == names
