"""Optimisers against PyTorch's, and against what their definitions promise of one step."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.train.optim import OPTIMIZERS, build_optimizer

PARITY = Path(__file__).parents[2] / "parity"
_spec = importlib.util.spec_from_file_location("parity_optimizers", PARITY / "optimizers.py")
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)
GOLDEN = json.loads((PARITY / "golden" / "optimizers.json").read_text())["cases"]


def walk(config, params, grad, steps):
    """The parameters after each of `steps` updates with gradients `grad(params, step)`, and the last state."""
    optimizer = build_optimizer(config, steps)
    state, seen = optimizer.init(params), []

    @jax.jit
    def update(params, state, step):
        updates, state = optimizer.update(grad(params, step), state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        params, state = update(params, state, step)
        seen.append(params)
    return seen, state


def one_step(config, grads, params=None):
    """What the first update adds to the parameters, at a learning rate of 1 without warm-up."""
    params = jax.tree.map(np.zeros_like, grads) if params is None else params
    optimizer = build_optimizer({"lr": 1.0, **config}, 10)
    return jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])(grads, params)


OURS = {
    "adamw": dict(name="adamw", lr=0.05, b1=0.9, b2=0.99, weight_decay=0.1),
    "sgd": dict(name="sgd", lr=0.05, b1=0.9),
    "adafactor": dict(name="adafactor(least=2)", lr=0.05),
    "muon": dict(name="muon(nesterov=False)", lr=0.05),
}
# float32 on both sides, 8 steps of numbers near 1; Muon's iteration magnifies rounding by its slope of 3.4 five times.
TOLERANCE = {"adamw": 2e-6, "sgd": 2e-6, "adafactor": 5e-6, "muon": 2e-5}


@pytest.mark.parametrize("name", OURS)
def test_eight_steps_of_pytorch(name):
    start = {"kernel": jnp.asarray(parity.START, jnp.float32)}
    grad = lambda p, step: {"kernel": parity.gradient(p["kernel"], step, jnp)}
    ours, _ = walk(OURS[name], start, grad, parity.STEPS)
    theirs = np.array(GOLDEN[name]["states"])
    np.testing.assert_allclose([p["kernel"] for p in ours], theirs, atol=TOLERANCE[name])
    # Far more than the tolerance: the optimiser does move.
    assert np.abs(theirs[-1] - parity.START).mean() > 10 * TOLERANCE[name]


def test_muon_moves_every_direction_of_a_matrix_alike():
    grads = {"kernel": jax.random.normal(jax.random.key(0), (12, 30))}
    moved = np.asarray(one_step({"name": "muon(rms=0.0)"}, grads)["kernel"])
    values = np.linalg.svd(moved, compute_uv=False) / np.sqrt(30 / 12)
    # Five iterations of Jordan's quintic leave singular values in this band around 1 and not at 1.
    assert values.min() > 0.65 and values.max() < 1.25
    # Those of the gradient spread more than twice as far, and the singular vectors are the gradient's.
    before = np.linalg.svd(grads["kernel"], compute_uv=False)
    assert before.max() / before.min() > 2 * values.max() / values.min()
    u, _, vt = np.linalg.svd(grads["kernel"], full_matrices=False)
    inside = u.T @ moved @ vt.T
    assert np.abs(inside - np.diag(np.diag(inside))).max() < 1e-3


@pytest.mark.parametrize("shape", [(40, 40), (16, 64), (64, 16), (3, 3, 8, 16)])
def test_muon_steps_have_the_rms_of_adams(shape):
    moved = one_step({"name": "muon()"}, {"kernel": jax.random.normal(jax.random.key(1), shape)})["kernel"]
    # 0.2 for an orthogonal matrix of full rank; the singular values are within the band of the test above.
    assert 0.2 * 0.65 < float(jnp.sqrt(jnp.mean(moved**2))) < 0.2 * 1.25


def test_muon_takes_a_stack_as_its_matrices_and_a_convolution_as_one(x64):
    stack = np.asarray(jax.random.normal(jax.random.key(2), (3, 8, 20))) * np.array([1.0, 10.0, 0.1])[:, None, None]
    conv = np.asarray(jax.random.normal(jax.random.key(3), (3, 3, 4, 8)))
    moved = one_step({"name": "muon()"}, {"stack": stack, "conv": conv})
    alone = one_step({"name": "muon()"}, {**{f"m{i}": stack[i] for i in range(3)}, "flat": conv.reshape(36, 8)})
    # The same iterations on the same numbers, in other kernels; float64, since each iteration magnifies rounding.
    for i in range(3):
        np.testing.assert_allclose(moved["stack"][i], alone[f"m{i}"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(moved["conv"].reshape(36, 8), alone["flat"], rtol=0, atol=1e-12)


def test_muon_leaves_vectors_tables_and_outer_layers_to_adam():
    grads = {
        "blocks": {"up": {"kernel": jnp.ones((2, 4, 8)) * 3, "bias": jnp.ones((2, 8)) * 3}},
        "inp": {"kernel": jnp.full((4, 8), -3.0)},
        "cond": {"label": {"embedding": jnp.full((5, 8), 3.0)}},
        "out": {"kernel": jnp.full((8, 4), 3.0)},
    }
    moved = one_step({"name": "muon()"}, grads)
    for leaf in (moved["blocks"]["up"]["bias"], moved["cond"]["label"]["embedding"], moved["out"]["kernel"]):
        np.testing.assert_allclose(leaf, -1.0, rtol=1e-5)
    np.testing.assert_allclose(moved["inp"]["kernel"], 1.0, rtol=1e-5)
    assert float(jnp.max(jnp.abs(moved["blocks"]["up"]["kernel"]))) < 0.5
    chosen = one_step({"name": "muon(adam='^blocks/')"}, grads)
    np.testing.assert_allclose(chosen["blocks"]["up"]["kernel"], -1.0, rtol=1e-5)
    assert float(jnp.max(jnp.abs(chosen["out"]["kernel"]))) < 0.9


def test_adafactor_is_exact_where_squared_gradients_have_rank_one():
    rows, columns = jnp.array([1.0, 0.2, 30.0]), jnp.array([2.0, 0.01])
    grads = {"kernel": jnp.outer(rows, columns) * jnp.array([[1, -1], [-1, -1], [1, 1.0]])}
    moved = one_step({"name": "adafactor(least=2, relative=False)"}, grads)["kernel"]
    np.testing.assert_allclose(moved, -jnp.sign(grads["kernel"]), rtol=1e-5)


def test_adafactor_steps_are_relative_to_the_parameter():
    params = {"a": jnp.full((4, 4), 50.0), "b": jnp.zeros((4, 4))}
    moved = one_step({"name": "adafactor()", "lr": 0.01}, jax.tree.map(jnp.ones_like, params), params)
    np.testing.assert_allclose(moved["a"], -0.01 * 50.0, rtol=1e-5)
    np.testing.assert_allclose(moved["b"], -0.01 * 1e-3, rtol=1e-5)


def test_adafactor_remembers_rows_and_columns():
    state = lambda name: jax.eval_shape(build_optimizer({"name": name}, 9).init, params)
    size = lambda name: sum(leaf.size for leaf in jax.tree.leaves(state(name)))
    params = {"kernel": jax.ShapeDtypeStruct((5, 256, 160), jnp.float32)}
    # Two counts and placeholders are what else there is.
    assert 5 * (256 + 160) <= size("adafactor") <= 5 * (256 + 160) + 4
    assert size("adamw") >= 2 * 5 * 256 * 160


def test_lion_steps_by_the_sign_of_the_interpolated_momentum():
    second = jnp.array([-0.05, -0.2])
    grad = lambda p, step: jnp.where(step == 0, jnp.ones(2), second)
    seen, _ = walk({"name": "lion", "lr": 0.01, "b1": 0.9, "b2": 0.99}, jnp.zeros(2), grad, 2)
    # 0.9 * 0.01 + 0.1 * second is 0.004 and -0.011: the one goes on, the other turns.
    np.testing.assert_allclose(seen[1], [-0.02, 0.0], atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "sgd", "rms", "adafactor(relative=False)", "muon()"])
def test_all_reach_the_minimum_of_a_quadratic(name):
    key = jax.random.key(4)
    target = {"kernel": jax.random.normal(key, (6, 8)), "bias": jnp.array([1.0, -2.0])}
    grad = lambda p, step: jax.tree.map(lambda p, t: p - t, p, target)
    start = jax.tree.map(jnp.zeros_like, target)
    config = {"name": name, "lr": 0.05, "schedule": "flat_linear(flat=0.4, final=0.0)"}
    seen, _ = walk(config, start, grad, 300)
    off = [sum(float(jnp.sum((p[k] - target[k]) ** 2)) for k in target) for p in (start, seen[-1])]
    assert off[1] < 1e-3 * off[0]


def test_a_whole_optimiser_of_optax_is_used_for_its_direction():
    grad = lambda p, step: parity.gradient(p, step, jnp)
    start = jnp.asarray(parity.START, jnp.float32)
    config = dict(lr=0.02, warmup=3, schedule="cosine()", weight_decay=0.1)
    whole, _ = walk({"name": "optax:adam(b1=0.8)", **config}, start, grad, 9)
    ours, _ = walk({"name": "adamw(b1=0.8)", **config}, start, grad, 9)
    np.testing.assert_allclose(whole[-1], ours[-1], atol=1e-6)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"name": "muonn"}, "did you mean 'muon'"),
        ({"name": "muon(ns_stesp=3)"}, "did you mean 'ns_steps'"),
        ({"name": "adafactor(0.8)"}, "positional"),
        ({"name": "optax.contrib:schedule_free_adamw"}, "schedule_free(base="),
        ({"name": "optax:global_norm"}, "global_norm"),
        ({"name": "optax:cosine_decay_schedule(1.0, 5)"}, "not an optax.GradientTransformation"),
        ({"name": "schedule_free(bse='sgd')"}, "schedule_free(base="),
        ({"name": "schedule_free()", "b1": 0.0}, "0 < b1 < 1"),
    ],
)
def test_wrong_names_say_what_is_allowed(config, message):
    with pytest.raises(ValueError) as error:
        build_optimizer(config, 10)
    assert message in str(error.value)


def test_every_name_is_tried_here():
    assert set(OPTIMIZERS) == {"adam", "adamw", "adafactor", "lion", "muon", "rms", "sgd", "schedule_free"}
