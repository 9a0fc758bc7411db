"""Schedule-free training: the average is the weighted mean that defines it, and it is what a run is judged by."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from diffjax.train import loop, paths
from diffjax.train.checkpoint import open_checkpoints
from diffjax.train.errors import ConfigError
from diffjax.train.optim import build_lr, build_optimizer, evaluation_params
from diffjax.train.optim.schedule_free import where_z_is
from diffjax.train.parts import prepare
from diffjax.train.state import abstract_state, load_run


@pytest.mark.parametrize("power", [2.0, 0.0])
def test_the_average_is_the_mean_of_z_weighted_by_the_learning_rate(power):
    steps, b1 = 12, 0.8
    config = {"name": f"schedule_free(base='sgd', power={power})", "lr": 0.3, "warmup": 5, "b1": b1, "clip": 100.0}
    optimizer, lr = build_optimizer(config, steps), build_lr(config, steps)
    curvature = jnp.array([0.5, 1.0, 2.0])
    y = z = np.array([1.0, -2.0, 3.0])
    params = jnp.asarray(y, jnp.float32)
    state, update, seen = optimizer.init(params), jax.jit(optimizer.update), []
    rates, average = np.asarray(jax.jit(jax.vmap(lr))(np.arange(steps))), jax.jit(evaluation_params)
    for step in range(steps):
        updates, state = update(curvature * params, state, params)
        params = optax.apply_updates(params, updates)
        # Defazio et al. 2024, equations 3 to 5, by the definition of the mean and not by a recursion.
        z = z - rates[step] * np.asarray(curvature) * y
        seen.append(z)
        weights = rates[: step + 1] ** power
        x = weights @ np.array(seen) / weights.sum()
        y = (1 - b1) * z + b1 * x
        # float32 recursions over a dozen steps; dividing by b1 loses little.
        np.testing.assert_allclose(average(state, params), x, atol=2e-5)
        np.testing.assert_allclose(params, y, atol=2e-5)


def test_the_average_ends_nearer_than_the_iterate_under_noise_without_a_schedule():
    config = {"name": "schedule_free()", "lr": 0.05, "b1": 0.9}
    optimizer = build_optimizer(config, 600)
    target = jnp.linspace(-1, 1, 64)

    @jax.jit
    def run(key):
        def step(carry, key):
            params, state = carry
            grad = params - target + 2.0 * jax.random.normal(key, target.shape)
            updates, state = optimizer.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.zeros(64)
        (params, state), _ = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, 600))
        return evaluation_params(state, params), state[0].z

    average, iterate = run(jax.random.key(0))
    error = lambda x: float(jnp.mean((x - target) ** 2))
    # 64 coordinates: each mean square is known to 18 %, the ratio is far larger.
    assert error(average) < 0.3 * error(iterate) and error(average) < 0.05


def test_other_optimisers_are_judged_by_their_own_parameters():
    params = {"w": jnp.ones(2)}
    state = build_optimizer({"name": "adamw"}, 5).init(params)
    assert evaluation_params(state, params) is params and where_z_is(state) is None


def test_decay_rules_rates_and_freezing_hold_inside():
    params = {name: np.ones(2, np.float32) for name in "abc"}
    config = {
        "name": "schedule_free(base='sgd')", "lr": 0.1, "weight_decay": 1.0, "freeze": ["c"],
        "decay_rules": [("a", 1.0), ("", 0.0)], "lr_rules": [("a", 0.5), ("", 1.0)],
    }  # fmt: skip
    optimizer = build_optimizer(config, 5)

    @jax.jit
    def step(params):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
        return evaluation_params(state, optax.apply_updates(params, updates))

    after = step(params)
    # The mean of one z is z.
    np.testing.assert_allclose(after["a"], 1 - 0.1 * 0.5 * 2, rtol=1e-6)
    np.testing.assert_allclose(after["b"], 1 - 0.1, rtol=1e-6)
    np.testing.assert_array_equal(after["c"], 1.0)


@pytest.mark.slow
def test_a_run_without_other_averages_is_opened_at_the_average(tmp_path):
    config = ConfigDict(
        dict(
            data="digits()", batch_size=16, num_steps=6, checkpoint_every=6, log_every=6, ema=(),
            model=dict(name="mlp", width=8, depth=1),
            optim=dict(name="schedule_free()", lr=1e-2, freeze=("^cond/label",)),
        )
    )  # fmt: skip
    loop.train(config, str(tmp_path), stream=io.StringIO())
    run, raw = load_run(str(tmp_path)), load_run(str(tmp_path), ema="raw")
    assert (run.ema, raw.ema) == ("schedule_free", "raw")
    _, parts = prepare(config)
    _, state = open_checkpoints(tmp_path / "checkpoints").restore(abstract_state(parts))
    expected = paths.named_leaves(evaluation_params(state.opt_state, state.params))
    for name, leaf in paths.named_leaves(run.params).items():
        # One rounding of float32: the compiler fuses what here runs operation by operation.
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-6, atol=1e-7)
    moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (run.params, raw.params)), strict=True)]
    assert any(moved)
    with pytest.raises(ConfigError, match="this run keeps: schedule_free, raw"):
        load_run(str(tmp_path), ema="power(std=0.1)")
