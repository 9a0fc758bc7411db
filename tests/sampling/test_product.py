"""Products of solvers: independent parts sample as alone, dependent ones as the joint flow, and one may wait."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

PAIR = {"a": dj.Gaussian(np.array([0.4]), np.array([[0.2]])), "b": dj.Gaussian(np.zeros(2), np.diag([1.0, 0.1]))}


def independent(x, level):
    return {name: PAIR[name].denoise(x[name], level[name]) for name in x}


def test_independent_parts_are_sampled_as_alone():
    grids = {"a": dj.karras(dj.EDM(), 8), "b": dj.uniform(dj.Flow(), 8)}
    solvers = {"a": dj.dpmpp_2m(), "b": dj.ddim()}
    x = {"a": 80 * jnp.ones((3, 1)), "b": jnp.ones((3, 2))}
    out = jax.jit(lambda x, levels: dj.sample(dj.product(solvers), independent, x, levels))(x, grids)
    for name in x:
        alone = dj.sample(solvers[name], PAIR[name].denoise, x[name], grids[name])
        np.testing.assert_allclose(out[name], alone, rtol=1e-5, atol=1e-6)


def test_two_halves_of_one_state_are_its_joint_flow(x64):
    # A correlated Gaussian cut in two: with equal grids the product is the solver on the whole.
    whole = dj.Gaussian(np.array([0.4, -0.3]), np.array([[1.0, 0.6], [0.6, 0.5]]))

    def joint(x, level):
        p = whole.denoise(jnp.concatenate([x["a"], x["b"]], axis=1), level["a"])
        return {"a": dj.Prediction(p.x0[:, :1], p.eps[:, :1]), "b": dj.Prediction(p.x0[:, 1:], p.eps[:, 1:])}

    x = jnp.array([[1.0, -2.0], [0.3, 0.5]])
    grid = dj.karras(dj.VP(), 12)
    solver = dj.product({"a": dj.dpmpp_2m(), "b": dj.dpmpp_2m()})
    # One grid for all parts is enough.
    out = dj.sample(solver, joint, {"a": x[:, :1], "b": x[:, 1:]}, grid)
    expected = dj.sample(dj.dpmpp_2m(), whole.denoise, x, grid)
    np.testing.assert_allclose(jnp.concatenate([out["a"], out["b"]], 1), expected, rtol=1e-12)


@pytest.mark.parametrize("loop", ["scan", "host"])
def test_a_part_that_waits_is_sampled_later(loop):
    # "a" moves in the first half of the steps, "b" in the second; each gets what it gets alone.
    a, b = dj.karras(dj.EDM(), 5), dj.uniform(dj.Flow(), 5)
    pad = lambda grid, before, after: dj.Level(*(np.pad(f, (before, after), mode="edge") for f in grid))
    grids = {"a": pad(a, 0, 5), "b": pad(b, 5, 0)}
    x = {"a": 80 * jnp.ones((3, 1)), "b": jnp.ones((3, 2))}
    solver = dj.product({"a": dj.dpmpp_2m(), "b": dj.dpmpp_2m()})
    trace = lambda info: info.prediction["b"].x0
    out, traced = dj.sample(solver, independent, x, grids, loop=loop, trace=trace)
    np.testing.assert_allclose(out["a"], dj.sample(dj.dpmpp_2m(), PAIR["a"].denoise, x["a"], a), rtol=1e-5)
    np.testing.assert_allclose(out["b"], dj.sample(dj.dpmpp_2m(), PAIR["b"].denoise, x["b"], b), rtol=1e-5, atol=1e-6)
    assert traced.shape == (10, 3, 2)


def test_each_part_draws_its_own_noise():
    grid = dj.karras(dj.EDM(), 4)
    x = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    same = dj.Gaussian(np.zeros(2), np.eye(2))
    denoise = lambda x, level: {name: same.denoise(x[name], level[name]) for name in x}
    solver = dj.product({"a": dj.ddim(1.0), "b": dj.ddim(1.0)})
    out = dj.sample(solver, denoise, x, grid, jax.random.key(0))
    assert np.abs(out["a"] - out["b"]).min() > 1e-3
    alike = dj.sample(solver, denoise, x, grid, noise=lambda i, j: {name: jnp.ones((2, 2)) for name in x})
    np.testing.assert_array_equal(alike["a"], alike["b"])


def test_a_part_that_is_done_asks_nothing_at_zero_noise():
    # The denoiser of a finite data set divides by sigma; gradients and the search for NaN must not see that.
    points = dj.Empirical(np.array([[0.5], [-0.5]]))
    denoise = lambda x, level: {"a": points.denoise(x["a"], level["a"]), "b": PAIR["b"].denoise(x["b"], level["b"])}
    short = dj.karras(dj.EDM(), 3)
    grids = {"a": dj.Level(*(np.pad(f, (0, 2), mode="edge") for f in short)), "b": dj.karras(dj.EDM(), 5)}
    solver = dj.product({"a": dj.ddim(), "b": dj.ddim()})
    run = lambda a: dj.sample(solver, denoise, {"a": a, "b": jnp.ones((2, 2))}, grids, check_finite=True)["a"].sum()
    assert np.isfinite(jax.jit(jax.grad(run))(jnp.ones((2, 1)))).all()


def test_messages():
    grid, x = dj.karras(dj.EDM(), 4), {"a": jnp.ones((2, 1)), "b": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="at least one solver"):
        dj.product({})
    with pytest.raises(ValueError, match=r"once a step.*'a': 199"):
        dj.product({"a": dj.heun()})
    solver = dj.product({"a": dj.ddim(), "b": dj.ddim()})
    with pytest.raises(ValueError, match=r"x must be a dict of \['a', 'b'\], got \['a'\]"):
        dj.sample(solver, independent, {"a": x["a"]}, grid)
    moved = dj.product({"a": dj.churn(dj.euler(), dj.EDM()), "b": dj.ddim()})
    with pytest.raises(ValueError, match="'a' calls its denoiser elsewhere"):
        dj.sample(moved, independent, x, grid, jax.random.key(0))
    with pytest.raises(ValueError, match="result must be a dict"):
        dj.sample(solver, lambda x, level: PAIR["a"].denoise(x["a"], level["a"]), x, grid)
    with pytest.raises(ValueError, match="same number of steps"):
        dj.sample(solver, independent, x, {"a": grid, "b": dj.karras(dj.EDM(), 5)})
    with pytest.raises(ValueError, match="one grid for each array"):
        dj.sample(solver, independent, x, {"a": grid})
