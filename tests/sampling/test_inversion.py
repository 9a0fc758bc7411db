"""Inversion against exact flows: order of the encoding, exact inverses of Euler's step, and the arc between noises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3, 0.1]), np.diag([1.0, 0.1, 0.01]))
MIXTURE = dj.Mixture([1.0, 2.0], [[1.0, 0.0], [-0.6, 0.5]], [[[0.5, 0.1], [0.1, 0.4]], [[0.3, 0.0], [0.0, 0.6]]])
SOLVERS = {"euler": dj.euler, "heun": dj.heun, "heun(alpha)": partial(dj.heun, "alpha"), "dpmpp_2m": dj.dpmpp_2m}
exact_flow = jax.jit(partial(MIXTURE.flow, rtol=1e-12))


def at_front(grid, n):
    """The grid with its first level repeated until it has n steps."""
    return dj.Level(*(jnp.asarray(np.pad(field, (n + 1 - len(field), 0), mode="edge")) for field in grid))


def rmse(a, b):
    return np.sqrt(np.mean(np.subtract(a, b) ** 2))


def grids(schedule, steps, s_min=0.1, s_max=10.0):
    return [dj.custom(schedule, schedule.time(dj.logsnr(schedule, n, s_min=s_min, s_max=s_max).logsnr)) for n in steps]


@pytest.mark.parametrize("name", SOLVERS)
def test_encoding_is_the_flow_to_the_solvers_order(name, x64):
    solver, steps = SOLVERS[name](), (32, 64)
    x0 = np.random.default_rng(0).normal(size=(6, 2)) * 0.5

    @jax.jit
    def run(x0, grid):
        up = dj.encode(solver, MIXTURE.denoise, x0, grid)
        return up, dj.decode(solver, MIXTURE.denoise, up, grid)

    for schedule in (dj.VP(), dj.Flow()):
        made = grids(schedule, steps)
        exact = exact_flow(x0, made[0].at(-1), made[0].at(0))
        outs = [run(x0, at_front(grid, steps[-1])) for grid in made]
        slope = np.log2(rmse(outs[0][0], exact) / rmse(outs[1][0], exact))
        assert abs(slope - solver.order) < 0.2, slope
        back = np.log2(rmse(outs[0][1], x0) / rmse(outs[1][1], x0))  # errors there and back may cancel
        assert back > solver.order - 0.2, back


@pytest.mark.parametrize("name", SOLVERS)
def test_encoding_from_sigma_zero_to_alpha_zero(name, x64):
    x0 = jax.jit(lambda key: GAUSSIAN.sample(key, 5))(jax.random.key(0))
    schedule, clean = dj.Flow(), dj.Level(*np.array([0.0, 1.0, 0.0]))
    run = jax.jit(lambda x0, grid: dj.encode(SOLVERS[name](), GAUSSIAN.denoise, x0, grid))
    exact = jax.jit(lambda x0: GAUSSIAN.flow(x0, clean, schedule(np.array(1.0))))(x0)
    errors = [rmse(run(x0, at_front(dj.uniform(schedule, n), 256)), exact) for n in (64, 256)]
    assert errors[1] < 0.05 and errors[0] / errors[1] > 2.5, errors


def test_ddim_inversion_reads_the_cleaner_state(x64):
    # Mokady et al. 2023, Eq. 3, written out: x' = sqrt(a'/a) x + sqrt(a') (sqrt(1/a' - 1) - sqrt(1/a - 1)) eps(x).
    grid = dj.custom(dj.ddpm(), [400, 200])
    x = np.random.default_rng(0).normal(size=(3, 3))
    a1, a = grid.alpha**2
    run = lambda x: (GAUSSIAN.denoise(x, grid.at(1)).eps, dj.encode(dj.ddim_inversion(), GAUSSIAN.denoise, x, grid))
    eps, got = map(np.asarray, jax.jit(run)(x))
    expected = np.sqrt(a1 / a) * x + np.sqrt(a1) * (np.sqrt(1 / a1 - 1) - np.sqrt(1 / a - 1)) * eps
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_fixed_point_iterations_invert_the_step_itself(x64):
    # Eight coarse steps: far from the flow, and yet the way back is the way there.
    grid = dj.karras(dj.VP(), 8, s_min=0.2, s_max=20.0)
    x0 = np.random.default_rng(0).normal(size=(6, 2)) * 0.5
    error = {}
    back = jax.jit(lambda up: dj.decode(dj.euler(), MIXTURE.denoise, up, grid))
    for k in (0, 2, 8, 40):
        up = jax.jit(lambda x0, k=k: dj.encode(dj.ddim_inversion(k), MIXTURE.denoise, x0, grid))(x0)
        error[k] = rmse(back(up), x0)
    assert error[0] > 0.05 and error[0] > error[2] > error[8] > error[40] and error[40] < 1e-8, error


def test_inversion_calls_no_network_at_sigma_zero():
    seen = []

    def denoise(x, level):
        jax.debug.callback(lambda s: seen.append(float(s)), level.sigma)
        return GAUSSIAN.denoise(x, level)

    grid = dj.uniform(dj.Flow(), 4)
    for solver in (dj.euler(), dj.dpmpp_2m(), dj.ddim_inversion(2)):
        seen.clear()
        out = jax.jit(lambda x, s=solver: dj.encode(s, denoise, x, grid))(np.ones((2, 3), np.float32))
        assert np.isfinite(out).all()
        jax.effects_barrier()
        assert min(seen) > 0 and len(seen) == solver.nfe(4)


def test_slerp():
    a, b = (np.random.default_rng(i).normal(size=(3, 4, 5)).astype(np.float32) for i in (0, 1))
    unit = lambda v: v / np.sqrt(np.sum(v**2, axis=(1, 2), keepdims=True))
    a, b = unit(a), unit(b)
    angle = lambda p, q: np.arccos(np.sum(np.multiply(p, q), axis=(1, 2)))
    slerp = jax.jit(dj.slerp)
    share = np.array([0.25, 0.5, 0.9], np.float32)
    out = np.asarray(slerp(a, b, share))
    np.testing.assert_allclose(np.sum(out**2, axis=(1, 2)), 1, rtol=1e-5)  # stays on the sphere
    np.testing.assert_allclose(angle(a, out), angle(a, b) * np.array([0.25, 0.5, 0.9]), rtol=1e-4)  # at even speed
    np.testing.assert_allclose(slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(slerp(a, b, 1.0), b, atol=1e-6)
    np.testing.assert_allclose(slerp(a, 2 * a, 0.5), 1.5 * a, rtol=1e-5)  # parallel
    np.testing.assert_allclose(slerp(a, -a, 0.25), 0.5 * a, atol=1e-6)  # opposite
    assert np.isfinite(jax.jit(jax.grad(lambda a: dj.slerp(a, a * 1.0, 0.3).sum()))(a)).all()
    assert np.isfinite(slerp(a * 0, b, 0.5)).all()


def test_messages():
    with pytest.raises(ValueError, match="iterations"):
        dj.ddim_inversion(-1)
    with pytest.raises(ValueError, match="one shape"):
        dj.slerp(jnp.ones((2, 3)), jnp.ones((3,)), 0.5)
    eps = dj.denoiser(lambda x, t: x, dj.EPS)
    with pytest.raises(ValueError, match="eps head is undefined at alpha = 0"):
        dj.encode(dj.ddim_inversion(1), eps, jnp.ones((1, 3)), dj.uniform(dj.Flow(), 4))
