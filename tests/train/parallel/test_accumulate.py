import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.train.parallel.accumulate import microbatches, whole

ROWS = {"x": jnp.arange(24.0).reshape(12, 2), "y": jnp.linspace(-1, 1, 12)}
PARAMS = {"w": jnp.array([0.5, -0.25]), "b": jnp.array(0.1)}


def row_loss(params, rows, key):
    error = rows["x"] @ params["w"] + params["b"] - rows["y"]
    return error**2, {"error": error}


def closed_form():
    """The gradient of the mean square of `x w + b - y`, by hand and in float64."""
    x, y, w = (np.asarray(a, np.float64) for a in (ROWS["x"], ROWS["y"], PARAMS["w"]))
    error = x @ w + 0.1 - y
    return error, {"w": 2 * x.T @ error / 12, "b": 2 * error.mean()}


@pytest.mark.parametrize("loop", ["scan", "unroll", "auto"])
@pytest.mark.parametrize("rows, groups", [(0, 1), (12, 1), (3, 1), (1, 4), (2, 3), (1, 1)])
def test_parts_give_the_gradient_of_the_whole(loop, rows, groups):
    gradient = jax.jit(microbatches(row_loss, rows=rows, groups=groups, loop=loop))
    losses, aux, grads = gradient(PARAMS, ROWS, jax.random.key(0))
    error, want = closed_form()
    # float32 sums of 12 numbers of size 300.
    np.testing.assert_allclose(grads["w"], want["w"], rtol=1e-6)
    np.testing.assert_allclose(grads["b"], want["b"], rtol=1e-6)
    # Every row's own values, in the order in which the rows came.
    np.testing.assert_allclose(losses, error**2, rtol=1e-5)
    np.testing.assert_allclose(aux["error"], error, rtol=1e-5)


def test_each_group_keeps_its_rows():
    seen = []

    def place(rows):
        seen.append(np.asarray(rows["y"]).tolist())
        return rows

    rows = {"y": jnp.arange(12)}
    loss = lambda params, rows, key: (params * rows["y"], None)
    microbatches(loss, rows=2, groups=3, loop="unroll", place=place)(1.0, rows, jax.random.key(0))
    # Three groups of four rows; the first part has the first two of each.
    assert seen == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_dropout_draws_anew_in_each_part():
    loss = lambda params, rows, key: (params * jax.random.normal(key, rows.shape), None)
    losses, _, _ = microbatches(loss, rows=2, loop="scan")(1.0, jnp.zeros(6), jax.random.key(0))
    assert len(set(np.asarray(losses).tolist())) == 6
    first, _, _ = microbatches(loss, rows=6)(1.0, jnp.zeros(6), jax.random.key(0))
    np.testing.assert_array_equal(first, whole(loss)(1.0, jnp.zeros(6), jax.random.key(0))[0])


def test_a_scan_holds_one_part_at_a_time():
    def wide(params, rows, key):
        return jnp.sum(jnp.tanh(rows @ params) ** 2, axis=-1), None

    def peak(rows):
        gradient = jax.jit(microbatches(wide, rows=rows, loop="scan"))
        shapes = jax.ShapeDtypeStruct((32, 512), jnp.float32), jax.ShapeDtypeStruct((512, 32), jnp.float32)
        return gradient.lower(*shapes, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    # 512 x 512 activations of tanh at once, or 32 rows of them.
    shapes = dict(whole=peak(0), parts=peak(32))
    assert shapes["parts"] < shapes["whole"] / 3, shapes


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="12 rows do not divide into 2 groups' microbatches of 5 rows"):
        microbatches(row_loss, rows=5, groups=2)(PARAMS, ROWS, jax.random.key(0))
    with pytest.raises(ValueError, match="unknown accumulate_loop 'while'; known: auto, scan, unroll"):
        microbatches(row_loss, rows=5, loop="while")
