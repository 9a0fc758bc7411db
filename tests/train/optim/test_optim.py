import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.train.optim import build_lr, build_optimizer


def descend(config, params, grad, steps, num_steps=None):
    """The parameters after `steps` updates with gradients `grad(params)`."""
    optimizer = build_optimizer(config, num_steps or steps)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state):
        updates, state = optimizer.update(grad(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = update(params, state)
    return params


def test_gradient_descent_on_a_quadratic():
    curvature = jnp.array([0.5, 1.0, 2.0])
    x = descend({"name": "sgd", "b1": 0.0, "lr": 0.1}, jnp.ones(3), lambda x: curvature * x, 20)
    np.testing.assert_allclose(x, (1 - 0.1 * np.array([0.5, 1.0, 2.0])) ** 20, rtol=1e-5)


def test_momentum_on_a_quadratic_is_a_linear_recurrence():
    x = descend({"name": "sgd", "b1": 0.9, "lr": 0.1}, jnp.float32(1), lambda x: 2 * x, 15)
    # (x, v) -> (x - lr v', v') with v' = b1 v + 2 x.
    exact = np.linalg.matrix_power(np.array([[1 - 0.2, -0.09], [2.0, 0.9]]), 15) @ [1.0, 0.0]
    assert float(x) == pytest.approx(exact[0], abs=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "lion"])
def test_sign_methods_walk_lr_a_step_under_a_constant_gradient(name):
    grad = lambda x: jnp.array([3.0, -0.02])
    x = descend({"name": name, "lr": 0.01}, jnp.zeros(2), grad, 10)
    # Adam divides by |g| + eps: 0.02 + 1e-8.
    np.testing.assert_allclose(x, [-0.1, 0.1], rtol=1e-5)


def test_weights_decay_by_the_first_rule_that_matches():
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "embed": jnp.ones(3)}
    config = {
        "name": "adamw",
        "lr": 0.1,
        "weight_decay": 0.5,
        "decay_rules": [("bias$", 0.0), ("^dense/", 1.0), (".*", 0.2)],
    }
    after = descend(config, params, lambda p: jax.tree.map(jnp.zeros_like, p), 7)
    np.testing.assert_allclose(after["dense"]["kernel"], (1 - 0.1 * 0.5) ** 7, rtol=1e-6)
    np.testing.assert_array_equal(after["dense"]["bias"], 1)
    np.testing.assert_allclose(after["embed"], (1 - 0.1 * 0.5 * 0.2) ** 7, rtol=1e-6)


def test_weight_decay_without_rules_is_for_all():
    after = descend({"name": "sgd", "lr": 0.1, "weight_decay": 0.5}, jnp.ones(2), jnp.zeros_like, 1)
    np.testing.assert_allclose(after, 0.95, rtol=1e-6)


def test_uncovered_parameters_are_listed():
    config = {"name": "adamw", "weight_decay": 0.1, "decay_rules": [("kernel", 1.0)]}
    params = {"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "scale": jnp.ones(2)}
    with pytest.raises(ValueError, match="no decay rule covers dense/bias, scale") as error:
        build_optimizer(config, 10).init(params)
    assert "dense/kernel" not in str(error.value)


def test_clip_is_by_the_norm_over_all_leaves():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    zeros, sgd = jax.tree.map(jnp.zeros_like, grads), {"name": "sgd", "b1": 0.0, "lr": 1.0}
    step = descend({**sgd, "clip": 2.5}, zeros, lambda _: grads, 1)
    np.testing.assert_allclose(step["a"], [-1.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(step["b"], [-2.0], rtol=1e-6)
    free = descend({**sgd, "clip": 5.1}, zeros, lambda _: grads, 1)
    np.testing.assert_allclose(free["b"], [-4.0], rtol=1e-6)


def test_lr_curves():
    steps = np.arange(130)
    curve = lambda **config: np.asarray(jax.jit(jax.vmap(build_lr({"lr": 2.0, **config}, 100)))(steps))
    truth = optax.cosine_decay_schedule(2.0, 100, alpha=0.1)
    np.testing.assert_allclose(curve(schedule="cosine(final=0.1)"), truth(steps), rtol=1e-5)
    np.testing.assert_array_equal(curve(), 2.0)
    flat = curve(schedule="flat_linear(flat=0.4, final=0.02)")
    np.testing.assert_array_equal(flat[:41], 2.0)
    np.testing.assert_allclose(np.diff(flat[40:101]), -2 * 0.98 / 60, rtol=1e-4)
    np.testing.assert_allclose(flat[100:], 0.04, rtol=1e-5)
    root = curve(schedule="inverse_sqrt(ref=25)")
    np.testing.assert_allclose(root[[0, 25, 100]], [2.0, 2.0, 1.0], rtol=1e-6)


def test_warmup_rises_to_lr_then_the_schedule_starts():
    lr = build_lr({"lr": 1.0, "warmup": 10, "schedule": "cosine()"}, 110)
    np.testing.assert_allclose([lr(s) for s in range(11)], [*np.arange(1, 11) / 10, 1.0], rtol=1e-6)
    np.testing.assert_allclose([lr(60), lr(110)], [0.5, 0.0], atol=1e-6)


def test_the_optimizer_uses_the_lr_of_each_step():
    config = {"name": "sgd", "b1": 0.0, "lr": 0.3, "warmup": 4, "schedule": "flat_linear()"}
    x = descend(config, jnp.float32(0), jnp.ones_like, 20)
    assert float(x) == pytest.approx(-sum(float(build_lr(config, 20)(s)) for s in range(20)), rel=1e-5)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"name": "adamm"}, "did you mean 'adam"),
        ({"lrr": 1.0}, "did you mean 'lr'"),
        ({"lr": -1e-3}, "expected 0 < lr"),
        ({"lr": 0.0}, "expected 0 < lr"),
        ({"lr": float("nan")}, "expected 0 < lr"),
        ({"lr": "1e-3"}, "expected 0 < lr"),
        ({"b2": 1.0}, "expected 0 <= b2 < 1"),
        ({"clip": -1.0}, "expected 0 <= clip"),
        ({"warmup": 11}, "warmup <= num_steps = 10"),
        ({"warmup": 1.5}, "integer"),
        ({"schedule": "cosin()"}, "did you mean 'cosine'"),
        ({"schedule": "flat_linear(flat=1.0)"}, "flat < 1"),
        ({"name": "adam", "weight_decay": 0.1}, "use 'adamw'"),
        ({"name": "adamw", "decay_rules": [("(", 1.0)]}, "decay rule"),
        ({"name": "adamw", "decay_rules": [(".*", -1.0)]}, "0 <= factor"),
    ],
)
def test_wrong_configs_say_what_is_allowed(config, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build_optimizer(config, 10).init({"w": jnp.ones(2)})


def test_a_scale_of_ones_own():
    config = {"name": "optax:scale_by_adam", "lr": 0.01}
    np.testing.assert_allclose(descend(config, jnp.zeros(2), jnp.ones_like, 3), -0.03, rtol=1e-5)
